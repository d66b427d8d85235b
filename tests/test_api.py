"""The package from Python: five names, the same runs as the command line's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from door import Door, Gate, eventually
from sample_dataset import make_dataset

import hpc_imagenet
from hpc_imagenet import Handle, UserError
from hpc_imagenet.cli.commands import COMMANDS


@pytest.fixture
def python(door: Door) -> Iterator[Door]:
    """A workspace that this process and the command line both mean."""
    with mock.patch.dict(os.environ, door.env, clear=True):
        yield door


def held(url: str, name: str) -> str:
    """Return overrides of a download that waits until the gate is opened, and then fails."""
    return (
        f"+stage=download dataset=ilsvrc dataset.name={name} dataset.source={url}/birds cluster=local "
        "download.retries=0 download.timeout=120 cluster.parallel=2"
    )


def test_importing_it_imports_nothing_else() -> None:
    code = (
        "import sys, hpc_imagenet; before = set(sys.modules); "
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'submitit') if m in sys.modules]); "
        "hpc_imagenet.submit, hpc_imagenet.jobs; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_five_names_and_no_module_stands_in_their_way() -> None:
    import hpc_imagenet.cli.main  # imports what the command line needs

    assert len(hpc_imagenet.__all__) == 5
    assert all(callable(getattr(hpc_imagenet, name)) for name in hpc_imagenet.__all__)
    with pytest.raises(AttributeError):
        _ = hpc_imagenet.nothing


def test_a_handle_is_the_run_that_the_command_line_shows(python: Door, gate: tuple[Gate, str]) -> None:
    door, url = gate
    (run,) = hpc_imagenet.submit(held(url, "birds"))
    (again,) = hpc_imagenet.submit(held(url, "birds").split())
    assert run == again == hpc_imagenet.jobs("download-birds")[0] == hpc_imagenet.jobs()[0]
    assert [row["run"] for row in python.jobs()] == [run.id]
    assert run.state() in ("queued", "running")
    with pytest.raises(TimeoutError, match="after 0 s"):
        run.result(0)
    door.open.set()
    with pytest.raises(UserError, match=f"{run.id} failed: "):
        run.result(120)
    assert "404" in run.reason()
    eventually(lambda: run.reason() in run.logs())  # the outcome is written first
    assert run.state() == "failed" == hpc_imagenet.command("jobs", "--json")[0]["state"]


def test_a_sweep_is_a_run_a_combination_and_can_be_cancelled(python: Door, gate: tuple[Gate, str]) -> None:
    _, url = gate
    sweep = hpc_imagenet.submit(held(url, "birds,cats"))
    assert [type(run) for run in sweep] == [Handle, Handle]
    for run in sweep:
        run.cancel()
    assert {run.state() for run in sweep} == {"cancelled"} == set(python.states())
    assert {run.reason() for run in sweep} == {"by the cancel command"}
    sweep[0].retry()
    assert sweep[0].state() in ("queued", "running")
    sweep[0].cancel()


@pytest.mark.slow
def test_a_result_is_what_the_stage_returned(python: Door, tmp_path: Path) -> None:
    (run,) = hpc_imagenet.submit("+stage=download dataset=digits cluster=local wait=true")
    assert run.state() == "finished"
    assert run.result()["bytes"] > 0
    assert (
        f"already finished  {run.id}" in python("+stage=download", "dataset=digits", "cluster=local").stdout
    )
    assert "digits" in hpc_imagenet.command("jobs")


def test_a_dry_run_prints_what_the_command_line_does(
    python: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["+stage=pipeline", "dataset=digits", "cluster=local", "dry_run=true"]
    assert hpc_imagenet.submit(words) == []
    printed = capsys.readouterr().out
    told = python(*words).stdout
    assert told == f"{told.splitlines()[0]}\n{printed}"
    assert "would be submitted" in printed
    assert not python.runs()


# Each verb where all is well, and where something is not. A session is tried in stages/test_session.py.
VERB = {
    "jobs": ["", "--json", "--wrong"],
    "logs": ["download-digits", "nothing"],
    "cancel": ["download-digits", ""],
    "retry": ["download-digits"],
    "connect": ["download-digits"],
    "pause": ["download-digits"],
    "resume": ["download-digits session.time=5"],
    "report": ["", "--json"],
    "verify": ["digits --quick", "broken --quick", "nothing"],
    "datastores": ["", "--json", "list", "show nothing", "prune", "fetch"],
    "doctor": ["cluster=nowhere", "strange"],
}


@pytest.mark.slow
def test_every_verb_says_the_same_from_python(python: Door) -> None:
    for stage in ("download", "process"):
        python(f"+stage={stage}", "dataset=digits", "cluster=foreground")
    make_dataset(python.workspace, "broken")
    (python.workspace / "archives/broken/train-1.tar").unlink()
    assert set(VERB) == set(COMMANDS)
    codes = set()
    for name, lines in VERB.items():
        for line in [*lines, "--help"]:
            words = (name, *line.split())
            typed = python(*words, code=None)
            codes.add(typed.returncode)
            if typed.returncode == 0:
                told = hpc_imagenet.command(*words)
                assert told == (json.loads(typed.stdout) if "--json" in words else typed.stdout), words
                continue
            with pytest.raises(UserError) as error:
                hpc_imagenet.command(*words)
            assert error.value.printed == typed.stdout, words
            assert "\n" not in str(error.value)
            last = typed.stderr.removeprefix("error: ") or f"{name}: {typed.stdout.splitlines()[-1].strip()}"
            assert str(error.value) == last.strip(), words
    assert codes == {0, 1, 2}


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: hpc_imagenet.submit("model=resnet81 cluster=local"), "resnet18"),
        (lambda: hpc_imagenet.jobs("nothing"), "no run nothing"),
        (lambda: hpc_imagenet.command("repport"), "near: report"),
    ],
)
def test_what_is_wrong_is_one_line(python: Door, act: object, told: str) -> None:
    assert callable(act)
    with pytest.raises(UserError, match=told) as error:
        act()
    assert "\n" not in str(error.value)
    assert not python.runs()
