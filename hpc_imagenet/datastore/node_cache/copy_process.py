"""A process of its own that copies and hashes shards, so that training does not wait for it.

A thread would not do: it needs Python's lock a few times for every block, and one of low priority that holds
the lock while it waits for a CPU holds up all the threads that decode. The process runs at a low priority,
takes one order a line on its input (JSON), and answers in lines: how far it is, at last what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends.storage_backend import explain_os_errors, hash_file
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.node_cache.staging import Tell
from hpc_imagenet.errors import UserError

NICE = 10  # a tenth of a core's time beside one that wants all of it
EVERY = 0.1  # s between two words on how far it is


class CopyProcess:
    """Copies files of one version, one at a time. The process begins with the first order.

    Args:
        url: the place.
        version: the version's path in there.
        scratch: the folder that is filled, for errors.
    """

    def __init__(self, url: str, version: str, scratch: Path) -> None:
        self._command = [sys.executable, "-m", __name__, url, version, str(scratch)]
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._lock = threading.Lock()  # of the attributes
        self._turn = threading.Lock()  # to give an order

    def close(self) -> None:
        """End it, and a copy that is under way, from whatever thread; there will be no further one."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.kill()
            with self._turn, process:
                pass

    def fetch(self, file: File, target: Path, tell: Tell) -> None:
        """Bring a file of the version, as `transport.Place.fetch` does.

        Raises:
            UserError: that does, a disk is full, or the process was ended.
        """
        self._order("bring", file, target, tell)

    def hash(self, path: Path, file: File, tell: Tell) -> str:
        """Return the hash of a file of this machine, in the form of `file.hash`.

        Raises:
            UserError: it cannot be read, or the process was ended.
        """
        return self._order("hash", file, path, tell)

    def _order(self, what: str, file: File, target: Path, tell: Tell) -> str:
        order = {"what": what, "file": asdict(file), "target": str(target)}
        with self._turn:
            process = self._started(file)
            whole = False
            try:
                answer = _answer(process, json.dumps(order), tell)
                whole = answer is not None
            finally:
                if not whole:  # what it says next would be about this order still
                    with process:
                        process.kill()
        if answer is None:
            raise UserError(
                f"{file.path}: the process that copies it has ended (exit code {process.returncode})"
            )
        if "error" in answer:
            raise UserError(answer["error"])
        return str(answer["result"])

    def _started(self, file: File) -> subprocess.Popen[str]:
        with self._lock:
            if self._closed:
                raise UserError(f"{file.path} is not copied any more")
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            return self._process


def _answer(process: subprocess.Popen[str], order: str, tell: Tell) -> dict[str, Any] | None:
    """Give an order and return what came of it; None where the process ended over it.

    Raises:
        UserError: it said something that is no answer.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{order}\n")
        process.stdin.flush()
    for line in process.stdout:
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise UserError(f"the process that copies says {line.strip()!r}, which is no answer") from None
        if "done" not in answer:
            return answer
        tell(answer["done"])
    return None


def main(url: str, version: str, scratch: str) -> None:
    """Carry out orders until there are no more, or whoever gives them is gone."""
    os.nice(max(0, NICE - os.nice(0)))
    spoken = 0.0

    def tell(done: int) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= EVERY:
            spoken = time.monotonic()
            _say({"done": done})

    place = None
    for line in sys.stdin:
        order = json.loads(line)
        file, target, result = File(**order["file"]), Path(order["target"]), ""
        try:
            with explain_os_errors("cluster.scratch", scratch):
                if order["what"] == "hash":
                    result = hash_file(target, file, tell)
                else:
                    place = place or versions.open_backend(url)
                    place.fetch(f"{version}/{file.path}", file, target, tell)
        except (UserError, OSError) as error:
            _say({"error": str(error)})
        else:
            _say({"result": result})


def _say(answer: dict[str, Any]) -> None:
    """Say a line, or end at once, on whatever thread, where nobody listens any more."""
    try:
        print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
