"""What a run has printed: stdout and stderr of its newest attempt, followed while it goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hpc_imagenet.runs import Run
from hpc_imagenet.states import state

_EVERY = 0.3  # s


def show(run: Run, follow: bool = False) -> None:
    """Print the logs of the newest attempt; with `follow`, go on until the run has ended."""
    places: dict[Path, int] = {}
    while True:
        ended = not state(run).active
        attempt = run.attempt
        for path in attempt.logs() if attempt else []:
            with path.open("rb") as file:
                file.seek(places.get(path, 0))
                text = file.read()
                places[path] = file.tell()
            sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        if ended or not follow:
            break
        time.sleep(_EVERY)
    told = state(run)
    if not any(places.values()) or told.reason:
        print(f"{run.id} · {told.name} · {told.reason or 'nothing printed'}", file=sys.stderr)
