"""Users of one machine: commands as other users, with a group, a home and a umask of their own. Needs root.

The users exist only in a private mount namespace, whose /etc/passwd and /etc/group name them; folders that
only root may enter and that hold Python are replaced there by ones that lead to it. The machine is not
changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

import hpc_imagenet

ROOT = Path(hpc_imagenet.__file__).resolve().parents[1]
GROUP = 64_200  # id of the group that alice and bob share
_UIDS = {"alice": 64_201, "bob": 64_202, "eve": 64_203}  # eve is in no group but her own
_ENTER = """
set -e
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/group /etc/group
{mounts}
umask {umask}
cd "$1"; shift
exec setpriv --reuid={uid} --regid={uid} --groups={groups} -- "$@"
"""


def available() -> bool:
    """Whether this process may act as other users: root, with mount namespaces."""
    if os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("unshare"):
        return False
    return not subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Drop root's rights, to which file modes do not apply."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


class Person:
    """One user: `alice("jobs")` runs `python -m hpc_imagenet jobs` as alice.

    Args:
        name: alice, bob (both in the group `lab`) or eve.
        folder: folder of the test, which all may enter.
        umask: octal.
    """

    def __init__(self, name: str, folder: Path, umask: str = "007") -> None:
        self.name, self.uid, self.umask, self.folder = name, _UIDS[name], umask, folder
        self.home = folder / name
        self.home.mkdir(mode=0o700, exist_ok=True)
        os.chown(self.home, self.uid, self.uid)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "USER": name,
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
        }
        _write_names(folder)

    def command(self, words: Sequence[str], cwd: Path | None = None) -> list[str]:
        """Return the command that root runs."""
        script = _ENTER.format(
            folder=self.folder / "names",
            mounts=_mounts(self.folder / "names"),
            umask=self.umask,
            uid=self.uid,
            groups=",".join(map(str, [self.uid] + [GROUP] * (self.name != "eve"))),
        )
        return ["unshare", "--mount", "sh", "-c", script, "sh", str(cwd or self.home), *words]

    def run(self, *words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command as this user."""
        return subprocess.run(
            self.command(words, cwd),
            capture_output=True,
            text=True,
            env=self.env | env,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def start(self, *words: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
        """Start a command as this user."""
        return subprocess.Popen(
            self.command(words, cwd),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            env=self.env | env,
        )

    def python(self, script: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run Python code as this user; `words` are its sys.argv[1:]."""
        return self.run(sys.executable, "-c", script, *words, cwd=cwd)

    def __call__(
        self, *words: str, code: int | None = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the package; its output never holds a traceback."""
        done = self.run(sys.executable, "-m", "hpc_imagenet", *words, cwd=cwd)
        assert "Traceback" not in done.stderr, done.stderr
        assert code is None or done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def refused(self, *words: str, cwd: Path | None = None) -> str:
        """Run a command that must be refused with one line, and return it."""
        lines = self(*words, code=2, cwd=cwd).stderr.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        return lines[0]

    def jobs(self, workspace: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self("jobs", f"workspace={workspace}", "--json").stdout)
        return rows


@contextlib.contextmanager
def ending(folder: Path) -> Iterator[None]:
    """Kill what the users have left running below a folder."""
    try:
        yield
    finally:
        for _ in range(20):
            found = [process for process in psutil.process_iter(["pid"]) if _is_left(process, folder)]
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not found:
                break
            psutil.wait_procs(found, 1)


def shared_folder(path: Path, mode: int = 0o2770) -> Path:
    """Make a folder of the group, owned by alice, that both may write: setgid, nothing for others."""
    path.mkdir()
    os.chown(path, _UIDS["alice"], GROUP)
    path.chmod(mode)
    return path


def _is_left(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        if process.uids().real in _UIDS.values():
            return str(folder) in " ".join([*process.cmdline(), process.environ().get("HOME", "")])
    return False


def _write_names(folder: Path) -> None:
    names = folder / "names"
    names.mkdir(exist_ok=True)
    users = "".join(f"{n}:x:{i}:{i}::{folder / n}:/bin/sh\n" for n, i in _UIDS.items())
    groups = "".join(f"{n}:x:{i}:\n" for n, i in _UIDS.items()) + f"lab:x:{GROUP}:alice,bob\n"
    (names / "passwd").write_text(Path("/etc/passwd").read_text() + users)
    (names / "group").write_text(Path("/etc/group").read_text() + groups)
    for name in ("passwd", "group"):
        (names / name).chmod(0o644)


def _mounts(names: Path) -> str:
    """Return commands that lead other users to Python and the package, past folders of root."""
    lines = []
    paths = [Path(path).resolve() for path in (sys.base_prefix, sys.prefix, ROOT)]
    for index, path in enumerate(dict.fromkeys(paths)):
        closed = [each for each in reversed(path.parents) if not each.stat().st_mode & 0o001]
        if closed:
            keep = names / f"keep{index}"
            keep.mkdir(exist_ok=True)
            lines += [
                f"mount --bind {path} {keep}",
                f"mount -t tmpfs -o mode=755 tmpfs {closed[0]}",
                f"mkdir -p {path}",
                f"mount --bind {keep} {path}",
            ]
    return "\n".join(lines)
