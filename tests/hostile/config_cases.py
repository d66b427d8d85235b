"""Hostile settings: command lines, files of settings, names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cases import Case
from command_line import Cli

from hpc_imagenet.errors import UserError

_SOUND = "dataset=ilsvrc", "dataset.name=x", "dataset.source=/x"


def run(*words: str, file: bytes | None = None) -> Callable[[Path], str]:
    """Return the work of a case: a dry run with these words, and a file `mine.yaml` of the group dataset."""

    def work(folder: Path) -> str:
        if file is not None:
            (folder / "mine" / "dataset").mkdir(parents=True)
            (folder / "mine" / "dataset" / "mine.yaml").write_bytes(file)
            given = ("--config-dir", str(folder / "mine"), "dataset=mine")
        else:
            keys = [word.partition("=")[0] for word in words]
            given = tuple(word for word in _SOUND if word.partition("=")[0] not in keys)
        done = Cli(folder / "workspace")(*given, "+stage=download", "dry_run=true", *words, code=None)
        if done.returncode == 2:
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1, done.stderr
            raise UserError(done.stderr.removeprefix("error: ").strip())
        assert done.returncode == 0, done.stderr
        return "a dry run"

    return work


_DEEP = b"a: " + b"[" * 5000
_INPUTS: list[tuple[str, Callable[[Path], str], str]] = [
    ("an unknown setting", run("dataset.sauce=1"), "dataset.sauce"),
    ("a name with a path upward", run("dataset.name=../../x"), "dataset.name"),
    ("a name with a slash", run("dataset.name=a/b"), "dataset.name"),
    ("a name that is hidden", run("dataset.name=.x"), "dataset.name"),
    ("a name of 5,000 characters", run(f"dataset.name={'a' * 5000}"), "dataset.name"),
    ("a name with escape sequences", run("dataset.name='\x1b[2J'"), "dataset.name"),
    ("an empty name", run("dataset.name=''"), "dataset.name"),
    ("a datastore with a path upward", run("datastore.name=../x"), "datastore.name"),
    ("a datastore name of v0", run("datastore.name=x@v0"), "datastore.name"),
    ("a number for a text", run("recipe.epochs=many"), "recipe.epochs"),
    ("a negative number", run("recipe.epochs=-1"), "recipe.epochs"),
    ("an infinite number", run("recipe.learning_rate=inf"), "recipe.learning_rate"),
    ("not a number", run("recipe.learning_rate=nan"), "recipe.learning_rate"),
    ("a number of 5,000 digits", run("seed=" + "9" * 5000), "the settings cannot be read"),
    ("a number of 10^400", run("recipe.learning_rate=1e400"), "recipe.learning_rate"),
    ("an open bracket", run("dataset.classes=[a"), "dataset.classes"),
    ("an interpolation of the environment", run("dataset.source=${oc.env:HOME}"), ""),
    ("an interpolation of itself", run("dataset.source=${dataset.source}"), ""),
    ("a target to instantiate", run("+dataset._target_=os.system"), "_target_"),
    ("a file of settings that is empty", run(file=b""), ""),
    ("a file of settings that is not UTF-8", run(file=b"name: \xff\xfe\n"), "the settings cannot be read"),
    ("a file of settings with tabs", run(file=b"name:\tx\n\t- y\n"), "mine.yaml"),
    ("a file of settings that is a list", run(file=b"- a\n- b\n"), "mine"),
    (
        "a file of settings with a Python object",
        run(file=b"name: !!python/object/apply:os.system ['true']\n"),
        "mine",
    ),
    ("a file of settings nested 5,000 deep", run(file=_DEEP), "the settings cannot be read"),
    ("a file of settings with control characters", run(file=b"name: \x00\x1b\n"), "mine.yaml"),
    ("a file of settings with a key twice", run(file=b"name: a\nname: b\n"), "mine"),
]

CASES = [Case("config", name, work, expected) for name, work, expected in _INPUTS]
