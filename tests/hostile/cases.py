"""Hostile inputs: what each is, how it is given to the package, and the one line that is expected.

A case runs the package on its input and returns what was accepted, in a few words. A refusal is the
`UserError` that it raises. Any other exception, and anything left behind that looks whole, fails the case.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_stage import config_of, run_stage

from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import MAX_LINE, error_line
from hpc_imagenet.stages.work import download, process

SYNSETS = (Synset(1, "n001", "kite"), Synset(2, "n002", "tench, Tinca tinca"))
HANG = 60  # s after which a case counts as hanging: a limit, not a measurement
FILES = {"train": ilsvrc_writer.TRAIN, "val": ilsvrc_writer.VAL, "devkit": ilsvrc_writer.DEVKIT}


@dataclass(frozen=True)
class Case:
    """One hostile input."""

    kind: str  # of input, such as tar
    name: str  # what is hostile about it
    run: Callable[[Path], str]  # takes an empty folder; returns what was accepted
    expected: str  # a part of the error line or, after "ok: ", of what `run` returns


@dataclass(frozen=True)
class Judgement:
    """What became of a case."""

    line: str  # the error, or "ok: " and what was accepted
    problem: str  # empty if it is as expected


def judge(case: Case, folder: Path) -> Judgement:
    """Run a case in an empty folder."""
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(HANG)
    try:
        line = f"ok: {case.run(folder)}"
    except UserError as error:
        line = error_line(error)
        if "\n" in line or len(line) > MAX_LINE or not line.isprintable():
            return Judgement(repr(line), "not one printable line")
    except Exception as error:
        return Judgement(f"{type(error).__name__}: {error}", "an exception instead of one line")
    finally:
        signal.alarm(0)
    return Judgement(line, "" if case.expected in line else f"expected {case.expected!r}")


def _hang(*_: object) -> None:
    raise TimeoutError(f"no end within {HANG} s")


def run_stages(folder: Path, archives: dict[str, bytes], source: str = "", **settings: Any) -> dict[str, Any]:
    """Download and process three archives, and return the result of the process stage.

    Args:
        folder: an empty folder.
        archives: contents of `train`, `val` and `devkit`; those that are missing are sound.
        source: where they are fetched from, if not from a folder.
        settings: of the section `process`.

    Raises:
        UserError: an archive is refused.
        AssertionError: a refused archive has a receipt, or a refused dataset has a manifest.
    """
    if not source:
        write_archives(folder / "source", archives)
    config = config_of(folder / "workspace", source or folder / "source")
    for name, value in settings.items():
        setattr(config.process, name, value)
    stage = download
    try:
        run_stage(download, config)
        stage = process
        return run_stage(process, config)
    except UserError:
        workspace = folder / "workspace"
        assert not list(workspace.glob("datasets/*/manifest.json")), "a refused dataset looks whole"
        if stage is download:
            kept = workspace / "archives" / config.dataset.name
            assert receipt.missing_receipts(kept, FILES.values()), "a refused archive looks whole"
        raise


def write_archives(folder: Path, archives: dict[str, bytes]) -> None:
    """Write three archives; those that are missing in `archives` are sound."""
    folder.mkdir(parents=True)
    ilsvrc_writer.write_train(folder / FILES["train"], [("n001", [image(1)]), ("n002", [image(2)])])
    ilsvrc_writer.write_val(folder / FILES["val"], [image(3), image(4)])
    ilsvrc_writer.write_devkit(folder / FILES["devkit"], SYNSETS, [1, 2])
    for split, data in archives.items():
        (folder / FILES[split]).write_bytes(data)


def image(number: int) -> bytes:
    """Return a small JPEG with a comment, so that each differs."""
    from sample_images import encoded

    data = encoded(size=(16, 12), quality=50)
    comment = f"image {number}".encode()
    return data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]
