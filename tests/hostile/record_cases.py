"""Hostile records: files of a run that another version, a copy or a power failure left damaged.

`jobs`, `show`, `report` and `retry` are run on each: they show the run or refuse in one line, and end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case
from command_line import Cli

from hpc_imagenet.errors import UserError

_RUN: dict[str, Any] = {
    "run.json": {
        "format": 2,
        "stage": "train",
        "model": "resnet18",
        "label": "x",
        "created": "2020-01-01T00:00:00",
    },
    "attempts/1/submitted.json": {"executor": "local", "time": "2020-01-01T00:00:00+00:00", "job_id": "1"},
    "attempts/1/started.json": {"time": "2020-01-01T00:00:00+00:00", "host": "n1", "restarts": 0},
    "attempts/1/outcome.json": {
        "state": "finished",
        "reason": "",
        "result": {"top1": 0.5},
        "time": "2020-01-01",
    },
    "progress.json": {"done": 1, "total": 2, "unit": "images", "rate": 1.0, "note": ""},
    "lease.json": {"attempt": 1, "restarts": 0, "host": "n1", "token": "x"},
    "config.yaml": b"cluster: {executor: local}\nstage: {name: train}\n",
}


def run(**files: Any) -> Callable[[Path], str]:
    """Return the work of a case: give commands on a run of which some files are replaced."""

    def work(folder: Path) -> str:
        cli = Cli(folder / "workspace")
        place = folder / "workspace" / "runs" / "abc123-x"
        for name, content in {**_RUN, **{_NAMES[key]: value for key, value in files.items()}}.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        (row,) = json.loads(cli("jobs", "--json").stdout)
        for words in (
            ("jobs",),
            ("show", "abc"),
            ("report",),
            ("logs", "abc"),
            ("retry", "abc", "--dry-run"),
        ):
            done = cli(*words, code=None)
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            if "Traceback" in done.stderr or done.returncode not in (0, 1, 2):
                raise AssertionError(f"{words}: {done.stderr[-300:]}")
            if done.returncode == 2 and len(errors) != 1:
                raise UserError(f"{words}: {done.stderr!r}")
            if any(not (char.isprintable() or char in "\n") for char in done.stdout + done.stderr):
                raise AssertionError(f"{words} printed control characters: {done.stdout!r}")
        return str(row["state"])

    return work


_NAMES = {name.rpartition("/")[2].partition(".")[0]: name for name in _RUN}
_ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e"

_INPUTS: list[tuple[str, Callable[[Path], str], str]] = [
    ("all is well", run(), "ok: finished"),
    *(
        (f"{key} {what}", run(**{key: content}), expected)
        for key, expected in (
            ("run", "ok: "),
            ("outcome", "ok: "),
            ("submitted", "ok: "),
            ("started", "ok: "),
        )
        for what, content in (
            ("is empty", b""),
            ("is cut", b'{"format": 2, "sta'),
            ("is not UTF-8", b"\xff\xfe\xfd"),
            ("is a list", b"[]"),
            ("is nested 100,000 deep", b"[" * 100_000),
            (
                "has numbers for texts",
                {"format": 1, "stage": 1, "label": 2, "created": 3, "state": 4, "executor": 5},
            ),
        )
    ),
    (
        "progress with huge numbers",
        run(progress={"done": 10**400, "total": 1e308, "rate": -1}),
        "ok: finished",
    ),
    ("progress with NaN", run(progress=b'{"done": NaN, "total": Infinity}'), "ok: finished"),
    ("label of escape sequences", run(run={**_RUN["run.json"], "label": _ESCAPES}), "ok: finished"),
    ("label of 5,000 characters", run(run={**_RUN["run.json"], "label": "a" * 5000}), "ok: finished"),
    ("reason of escape sequences", run(outcome={"state": "failed", "reason": _ESCAPES}), "ok: failed"),
    ("a state that does not exist", run(outcome={"state": "splendid"}), "ok: failed"),
    ("top-1 that is a text", run(outcome={"state": "finished", "result": {"top1": "high"}}), "ok: finished"),
    ("a run of another version", run(run={**_RUN["run.json"], "format": 99}), "ok: finished"),
    (
        "an executor that does not exist",
        run(submitted={"executor": "cloud", "time": "x"}, outcome=b"{}"),
        "ok: failed",
    ),
    (
        "logs in another folder",
        run(submitted={"executor": "local", "logs": "/etc", "job_id": "*"}),
        "ok: finished",
    ),
    ("a lease without keys", run(lease={}), "ok: finished"),
    ("a config that is a list", run(config=b"- a\n"), "ok: finished"),
    (
        "a config with a Python object",
        run(config=b"!!python/object/apply:os.system ['true']\n"),
        "ok: finished",
    ),
    ("a config that is nested 5,000 deep", run(config=b"a: " + b"[" * 5000), "ok: finished"),
    ("a config with a NUL byte", run(config=b"cluster: \0"), "ok: finished"),
]

CASES = [Case("record", name, work, expected) for name, work, expected in _INPUTS]
