"""The command line at the far end of ssh: run what `remote/host_command.py` sent to this host.

A command that loses its connection goes on without output, so that a submission is completed; it is
interrupted after ten minutes.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from hpc_imagenet.cli.main import main, print_error
from hpc_imagenet.config.input.stored_settings import SENT
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home

ALONE = 600.0  # s that a command goes on after its connection was lost


def run_sent(encoded: str) -> None:
    """Run an encoded command line and exit with its code."""
    sent = json.loads(base64.urlsafe_b64decode(encoded))
    os.environ.update(sent["environment"])
    os.environ[SENT] = str(Path(sent["settings"]).absolute())
    for path, refusal in sent["local_paths"]:
        try:
            exists = expand_home(path).exists()
        except UserError:  # the home of a user of the other machine
            exists = False
        if not exists:
            sys.exit(print_error(UserError(refusal)))
    _watch_connection()
    main(sent["arguments"])


def _watch_connection() -> None:
    if sys.stdin.isatty():
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=_go_on_alone, daemon=True).start())
        return
    # Commands that are started from here, such as sbatch, must not read from the line.
    line, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    threading.Thread(target=_read_signals, args=(line,), daemon=True).start()


def _read_signals(line: int) -> None:
    while number := os.read(line, 1):
        os.killpg(os.getpgrp(), number[0])
    _go_on_alone()


def _go_on_alone() -> None:
    """Discard output, which would fail; end a command that does not end by itself."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    time.sleep(ALONE)
    os.killpg(os.getpgrp(), signal.SIGINT)


if __name__ == "__main__":
    run_sent(sys.argv[1])
