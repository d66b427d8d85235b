"""Carry out a command line on the host: the same output and exit code as if it were typed there.

On a terminal ssh passes keys and window size on (-t). Otherwise standard input of ssh is a line of signals to
cli/far_end.py: a byte is a signal's number, such as that of Ctrl-C, and its end is a lost connection.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from hpc_imagenet.config.host import Host, without_host
from hpc_imagenet.errors import UserError
from hpc_imagenet.remote.host_setup import MADE, SENT, environment_path, set_up_host
from hpc_imagenet.remote.parcels import Sending, make_sending
from hpc_imagenet.remote.shared_connection import CONNECTION_LOST, open_connection

_ENDS_WITHIN = 5.0  # s between a signal to the command there and the end of ssh
_NOT_SET_UP = 97  # exit code: the host lacks a parcel or the environment
# $1: the folder, $2: the environment, $3: the code, $4: what to run; then files that must exist.
_START = (
    'cd "$1" 2>/dev/null || exit 97; venv=$2; code=$3; run=$4; shift 4; '
    'for file; do [ -e "$file" ] || exit 97; done; '
    'PYTHONPATH="$PWD/$code" exec "$venv/bin/python" -m hpc_imagenet.cli.far_end "$run"'
)


def run_on_host(host: Host, arguments: Sequence[str], submits: bool) -> int:
    """Carry out a command line on the host and return its exit code; CONNECTION_LOST if it broke.

    Args:
        host: the host.
        arguments: the command line as typed.
        submits: whether the arguments are settings of a submission.

    Raises:
        UserError: the host cannot be reached or set up.
    """
    on_terminal = all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    words = arguments if submits else without_host(arguments)
    code = _carry_out(host, make_sending(host, words, submits), _on_terminal if on_terminal else _piped)
    if code == CONNECTION_LOST:
        print(_what_goes_on(host, arguments, submits), file=sys.stderr)
    return code


def output_on_host(host: Host, arguments: Sequence[str]) -> tuple[int, str]:
    """Return exit code and standard output of a command on the host; its errors are printed.

    Raises:
        UserError: the host cannot be reached or set up, or the connection broke.
    """
    output = b""

    def run(command: list[str]) -> int:
        nonlocal output
        # Standard input stays open, since its end is a lost connection.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            return process.wait()

    code = _carry_out(host, make_sending(host, arguments, submits=False), run)
    if code == CONNECTION_LOST:
        raise UserError(f"connection to {host.address} lost: give the command again")
    return code, output.decode(errors="replace")  # start-up files of the host may print anything


def _carry_out(host: Host, sending: Sending, run: Callable[[list[str]], int]) -> int:
    shell = open_connection(host)
    code, *others = sending.parcels
    environment = environment_path(code)
    needed = [f"{environment}{MADE}", *(f"{parcel.path}{SENT}" for parcel in sending.parcels)]
    line = {
        "arguments": sending.arguments,
        "environment": sending.environment,
        "settings": others[0].path,
        "local_paths": [[local.path, local.refusal] for local in sending.local_paths],
    }
    # Encoded, so that the user's login shell there, whichever it is, changes no character.
    encoded = base64.urlsafe_b64encode(json.dumps(line).encode()).decode()
    folder = host.folder.removeprefix("~/")
    words = ["exec", "sh", "-c", _START, "sh", folder, environment, code.path, encoded, *needed]
    command = [*shlex.split(shell), "-q", "-o", "BatchMode=yes", host.address, shlex.join(words)]
    status = run(command)
    if status == _NOT_SET_UP:
        set_up_host(host, shell, sending.parcels)
        status = run(command)
        if status == _NOT_SET_UP:
            raise UserError(f"cluster.host={host.address}: files vanish from {host.folder} there: try again")
    return status


def _on_terminal(command: list[str]) -> int:
    return subprocess.run([command[0], "-t", *command[1:]], check=False).returncode


def _piped(command: list[str]) -> int:
    """Run ssh so that signals reach the command there, which then prints how it ended."""
    # In a session of its own ssh is not ended by Ctrl-C itself.
    process = subprocess.Popen(
        [command[0], "-T", *command[1:]], stdin=subprocess.PIPE, start_new_session=True, bufsize=0
    )

    def pass_on(number: int) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(bytes([number]))

    def end(number: int, frame: FrameType | None) -> NoReturn:
        pass_on(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDS_WITHIN)
        sys.exit(128 + number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    interrupted = False
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                pass_on(signal.SIGINT)
    finally:
        process.terminate()
        process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _what_goes_on(host: Host, arguments: Sequence[str], submits: bool) -> str:
    lost = f"connection to {host.address} lost: jobs there go on"
    if submits and arguments[:1] != ["doctor"]:
        return (
            f"{lost}; python -m hpc_imagenet jobs shows what was submitted, and the same command submits the "
            "rest, nothing twice"
        )
    return f"{lost}; look again with python -m hpc_imagenet {shlex.join(arguments)}"
