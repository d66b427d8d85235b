"""Users of one machine in `test_second_user.py`: what alice has, and what the others may try."""

from __future__ import annotations

import functools
import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

from command_line import eventually
from other_users import Person, shared_folder

DIGITS = ("dataset=digits", "cluster=local")
DOWNLOAD = ("+stage=download", *DIGITS)
REFUSALS = ("PermissionError", "BlockingIOError")
CHECKPOINT = """
import sys
import torch
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from trained_samples import config_of, write_trained
"""


class Scene:
    """alice with her group's workspace and a private one that all may read; bob and eve, who attack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alice, self.bob, self.eve = (Person(name, folder) for name in ("alice", "bob", "eve"))
        self.lab = shared_folder(folder / "lab")
        self.open = folder / "open"  # of alice, for all to read, as with umask 022
        self.open.mkdir()
        os.chown(self.open, self.alice.uid, self.alice.uid)
        self.careless = Person("alice", folder, umask="022")
        self.mark = self.alice.home / "owned"
        self.here = f"workspace={self.lab}"

    @functools.cached_property
    def run(self) -> Path:
        """A finished run of alice in the group's workspace."""
        self.alice(*DOWNLOAD, self.here, "wait=true")
        (folder,) = (self.lab / "runs").glob("*-download-digits")
        return folder

    @property
    def queue(self) -> Path:
        """The folder of alice's queue on this host."""
        (folder,) = (self.run.parent / f".user-{self.alice.uid}/queue").iterdir()
        return folder

    @functools.cached_property
    def prepared(self) -> Path:
        """A run of bob with commands in its config, and with the id that alice's run will have."""
        lab = shared_folder(self.folder / "prepared")
        words = (f"cluster.setup=[{self.evil}]", "dataset.source=/missing")
        self.bob(*DOWNLOAD, f"workspace={lab}", *words, code=None)
        (run,) = (lab / "runs").glob("*-download-digits")
        eventually(lambda: (run / "attempts/1/outcome.json").exists())
        return run

    @functools.cached_property
    def checkpoints(self) -> Path:
        """A folder of the group."""
        return shared_folder(self.folder / "checkpoints")

    @functools.cached_property
    def public(self) -> Path:
        """A folder such as /tmp."""
        folder = self.folder / "public"
        folder.mkdir()
        folder.chmod(0o1777)
        return folder

    @functools.cached_property
    def precious(self) -> Path:
        """A file of alice with the text `kept`."""
        path = self.alice.home / "precious/file"
        self.write(self.alice, path, "kept")
        return path

    @property
    def evil(self) -> str:
        """A shell command that shows that alice has executed it."""
        return f"touch {self.mark}"

    def as_bob(self, script: str, *words: str) -> bool:
        """Whether code of bob ends without an error; any error but a refusal fails the test."""
        return _ends_well(self.bob.python(textwrap.dedent(script), *words))

    def as_eve(self, script: str, *words: str) -> bool:
        """Whether code of eve ends without an error; any error but a refusal fails the test."""
        return _ends_well(self.eve.python(textwrap.dedent(script), *words))

    def write(self, person: Person, path: Path, text: str) -> None:
        """Write a file as a user, who must be able to."""
        script = "import sys; from pathlib import Path; p = Path(sys.argv[1]); "
        script += "p.parent.mkdir(parents=True, exist_ok=True); p.write_text(sys.argv[2])"
        done = person.python(script, str(path), text)
        assert not done.returncode, done.stderr

    def executed(self, *words: str, because: str = "", cwd: Path | None = None, code: int | None = 2) -> bool:
        """Whether a command of alice executes what another user wrote; her jobs get the time to.

        Args:
            words: the command.
            because: what its error says: an attempt that is refused for another reason shows nothing.
            cwd: its folder.
            code: its exit code.
        """
        done = self.alice(*words, cwd=cwd, code=code)
        assert because in done.stderr, done.stderr
        return self.mark.exists()


def _ends_well(done: subprocess.CompletedProcess[str]) -> bool:
    last = done.stderr.strip().rpartition("\n")[2]
    assert not last or last.startswith(REFUSALS), done.stderr
    return done.returncode == 0


Attempt = Callable[[Scene], bool]
ATTEMPTS: dict[str, Attempt] = {}


def attempt(name: str) -> Callable[[Attempt], Attempt]:
    """Register an attempt, which returns whether it has succeeded."""

    def register(function: Attempt) -> Attempt:
        ATTEMPTS[name] = function
        return function

    return register
