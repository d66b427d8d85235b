"""Print the logs of a run: stdout and stderr of its newest attempt, optionally followed."""

from __future__ import annotations

import codecs
import sys
import time
from pathlib import Path

from hpc_imagenet.launch.states import state
from hpc_imagenet.runs.store import Run

_POLL_INTERVAL = 0.3  # s


def show_logs(run: Run, follow: bool = False) -> None:
    """Print the logs of the newest attempt; with `follow`, until the run has ended."""
    offsets: dict[Path, int] = {}  # bytes already printed
    decoders: dict[Path, codecs.IncrementalDecoder] = {}  # a read may end within a character
    began = time.monotonic()
    while True:
        last = not follow or not state(run, began).active
        attempt = run.attempt
        for path in attempt.logs() if attempt else []:
            decoder = decoders.setdefault(path, codecs.getincrementaldecoder("utf-8")("replace"))
            with path.open("rb") as file:
                file.seek(offsets.get(path, 0))
                sys.stdout.write(decoder.decode(file.read(), final=last))
                offsets[path] = file.tell()
        sys.stdout.flush()
        if last:
            break
        time.sleep(_POLL_INTERVAL)
    final = state(run)
    if not any(offsets.values()) or final.reason:
        print(f"{run.id} · {final.name} · {final.reason or 'no output'}", file=sys.stderr)
