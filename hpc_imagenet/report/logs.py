"""What a run has printed: stdout and stderr of its newest attempt, followed while it goes on."""

from __future__ import annotations

import codecs
import sys
import time
from pathlib import Path

from hpc_imagenet.launch.states import state
from hpc_imagenet.runs.store import Run

_EVERY = 0.3  # s


def show_logs(run: Run, follow: bool = False) -> None:
    """Print the logs of the newest attempt; with `follow`, go on until the run has ended."""
    places: dict[Path, int] = {}
    decoders: dict[Path, codecs.IncrementalDecoder] = {}  # a character may be half written
    began = time.monotonic()
    while True:
        over = not follow or not state(run, began).active
        attempt = run.attempt
        for path in attempt.logs() if attempt else []:
            decoder = decoders.setdefault(path, codecs.getincrementaldecoder("utf-8")("replace"))
            with path.open("rb") as file:
                file.seek(places.get(path, 0))
                sys.stdout.write(decoder.decode(file.read(), final=over))
                places[path] = file.tell()
        sys.stdout.flush()
        if over:
            break
        time.sleep(_EVERY)
    told = state(run)
    if not any(places.values()) or told.reason:
        print(f"{run.id} · {told.name} · {told.reason or 'nothing printed'}", file=sys.stderr)
