"""A separate, low-priority process that copies and hashes shards, so that training does not wait for it.

A thread would not do: it takes Python's global lock several times per block, and a low-priority thread that
holds the lock while it waits for a CPU blocks all decoding threads. The process reads one JSON request per
line from stdin, and writes one JSON reply per request to stdout. A worker of concurrent.futures would not do
either: it cannot be stopped during a copy, and a killed parent leaves its semaphores behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.backends.storage_backend import explain_os_errors
from hpc_imagenet.datastore.file_hash import hash_file
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

# Slurm sends its warning, and SIGTERM, to every process of a job, so that rsync and ssh end as well. The
# training saves meanwhile, and may still need a shard.
_SLURM_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
NICE = 10  # niceness: a tenth of a core's time beside a process that uses all of it


class CopyProcess:
    """Copies files of one version, one at a time. The process starts with the first request.

    Args:
        url: URL of the storage backend.
        version: path of the version within the backend.
        scratch: folder that is filled, for error messages.
    """

    def __init__(self, url: str, version: str, scratch: Path) -> None:
        self._command = [sys.executable, "-m", __name__, url, version, str(scratch), str(os.getpid())]
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # protects the attributes
        self._request_lock = threading.Lock()  # held during a request

    def close(self) -> None:
        """Kill the process and a running copy, from any thread; later requests raise."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.kill()
            with self._request_lock, process:
                pass

    def fetch(self, file: File, target: Path) -> None:
        """Fetch a file of the version; see `StorageBackend.fetch`.

        Raises:
            UserError: the fetch failed, the disk is full, or the process ended.
        """
        self._request("fetch", file, target)

    def hash(self, path: Path, file: File) -> str:
        """Return the hash of a local file, in the form of `file.hash`.

        Raises:
            UserError: the file cannot be read, or the process ended.
        """
        return self._request("hash", file, path)

    def _request(self, command: str, file: File, path: Path) -> str:
        request = json.dumps({"command": command, "file": asdict(file), "path": str(path)})
        with self._request_lock:
            reply = None
            while reply is None:
                reply = self._reply(f"{request}\n".encode(), file)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply["result"]

    def _reply(self, request: bytes, file: File) -> dict[str, str] | None:
        """Return the reply to a request; None if a signal of Slurm has ended the process."""
        process = self._running_process(file)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
        line = process.stdout.readline()
        try:
            reply: dict[str, str] = json.loads(line)
        except ValueError:
            with process:  # its next reply would belong to this request
                process.kill()
            if line:
                wrote = line.decode(errors="replace").strip()
                raise UserError(f"the copy process wrote {wrote!r} instead of a JSON reply") from None
            if -process.returncode in _SLURM_SIGNALS:
                return None
            raise UserError(
                f"{file.path}: the copy process ended unexpectedly (exit code {process.returncode})"
            ) from None
        return reply

    def _running_process(self, file: File) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise UserError(f"{file.path} was not copied: the copy process is closed")
            if self._process is None or self._process.poll() is not None:
                # Unbuffered: a request that a dead process has not read must not be written again on closing.
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
                )
            return self._process


def _lower_priority(url: str) -> None:
    """Leave the CPUs to the training where it reads shards in place until they are copied."""
    os.nice(max(0, NICE - os.nice(0)))
    if hasattr(os, "SCHED_IDLE") and not versions.is_remote(url):  # Linux
        # Niceness is not enough: between two images a core is free, and the copy keeps it for a whole write.
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(url: str, version: str, scratch: str, parent: str) -> None:
    """Serve requests until stdin is closed or the process `parent` is gone."""
    _lower_priority(url)

    def exit_without_parent(_: int) -> None:  # called for each block; a killed parent cannot end its children
        if os.getppid() != int(parent):
            os._exit(1)

    backend = None
    for line in sys.stdin:
        request = json.loads(line)
        file, path, result = File(**request["file"]), Path(request["path"]), ""
        try:
            with explain_os_errors("cluster.scratch", scratch):
                if request["command"] == "hash":
                    result = hash_file(path, file, exit_without_parent)
                else:
                    backend = backend or versions.open_backend(url)
                    backend.fetch(f"{version}/{file.path}", file, path, exit_without_parent)
        except (UserError, OSError) as error:
            reply = {"error": str(error)}
        else:
            reply = {"result": result}
        try:
            print(json.dumps(reply), flush=True)
        except BrokenPipeError:
            os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
