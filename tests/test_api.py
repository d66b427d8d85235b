"""The Python API: its names, its handles, and the same runs as the command line."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import Cli, Gate, eventually
from sample_dataset import make_dataset
from servers import sshd

import hpc_imagenet
from hpc_imagenet import Handle, UserError
from hpc_imagenet.cli.commands import COMMANDS

sys.path.append(str(Path(__file__).resolve().parent / "training"))
from tiny_training import write_store


@pytest.fixture
def python(cli: Cli) -> Iterator[Cli]:
    """A workspace used by this process and the command line."""
    with mock.patch.dict(os.environ, cli.env, clear=True):
        yield cli


def held(url: str, name: str) -> str:
    """Return overrides of a download that blocks until the gate opens, and then fails."""
    return (
        f"+stage=download dataset=ilsvrc dataset.name={name} dataset.source={url}/birds cluster=local "
        "download.retries=0 download.timeout=120 cluster.parallel=2"
    )


@pytest.mark.slow
def test_import_does_not_load_other_modules() -> None:
    code = (
        "import sys, hpc_imagenet; before = set(sys.modules); "
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'submitit') if m in sys.modules]); "
        "hpc_imagenet.submit, hpc_imagenet.jobs; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_public_names_are_not_shadowed_by_modules() -> None:
    import hpc_imagenet.cli.main  # loads the submodules

    assert len(hpc_imagenet.__all__) == 10
    assert all(callable(getattr(hpc_imagenet, name)) for name in hpc_imagenet.__all__)
    with pytest.raises(AttributeError):
        _ = hpc_imagenet.nothing


@pytest.mark.slow
def test_handle_equals_the_run_of_the_command_line(python: Cli, gate: tuple[Gate, str]) -> None:
    server, url = gate
    (run,) = hpc_imagenet.submit(held(url, "birds"))
    (again,) = hpc_imagenet.submit(held(url, "birds").split())
    assert run == again == hpc_imagenet.jobs("download-birds")[0] == hpc_imagenet.jobs()[0]
    assert [row["run"] for row in python.jobs()] == [run.id]
    assert run.state() in ("queued", "running")
    with pytest.raises(TimeoutError, match="after 0 s"):
        run.result(0)
    server.open.set()
    with pytest.raises(UserError, match=f"{run.id} failed: "):
        run.result(120)
    assert "404" in run.reason()
    eventually(lambda: run.reason() in run.logs())  # the outcome is written before the log
    assert run.state() == "failed" == hpc_imagenet.command("jobs", "--json")[0]["state"]


@pytest.mark.slow
def test_sweep_returns_a_handle_per_combination_that_can_be_cancelled(
    python: Cli, gate: tuple[Gate, str]
) -> None:
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
def test_result_of_a_finished_stage(python: Cli, tmp_path: Path) -> None:
    (run,) = hpc_imagenet.submit("+stage=download dataset=digits cluster=local wait=true")
    assert run.state() == "finished"
    assert run.result()["bytes"] > 0
    assert (
        f"already finished  {run.id}" in python("+stage=download", "dataset=digits", "cluster=local").stdout
    )
    assert "digits" in hpc_imagenet.command("jobs")


@pytest.mark.slow
def test_dry_run_prints_the_same_as_the_command_line(python: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["+stage=pipeline", "dataset=digits", "cluster=local", "dry_run=true"]
    assert hpc_imagenet.submit(overrides) == []
    printed = capsys.readouterr().out
    expected = python(*overrides).stdout
    assert expected == f"{expected.splitlines()[0]}\n{printed}"
    assert "would be submitted" in printed
    assert not python.runs()


# Arguments of each command for which it succeeds or fails. Sessions are tested in stages/test_session.py.
ARGUMENTS = {
    "jobs": ["", "--json", "--wrong"],
    "logs": ["download-digits", "nothing"],
    "cancel": ["download-digits", ""],
    "retry": ["download-digits"],
    "connect": ["download-digits"],
    "pause": ["download-digits"],
    "resume": ["download-digits session.time=5"],
    "report": ["", "--json"],
    "show": ["download-digits", "process-digits --json", "nothing"],
    "evaluate": ["nothing", "download-digits"],
    "export": ["nothing out", "--format onnx"],
    "predict": ["nothing image.jpg", ""],
    "pull": ["nothing"],
    "tensorboard": ["nothing"],
    "verify": ["digits --quick", "broken --quick", "nothing"],
    "datastores": ["", "--json", "list", "show nothing", "prune", "fetch"],
    "doctor": ["cluster=nowhere", "strange"],
    "price": ["strange", "dataset=digits", "--json dataset=digits"],
}


def without_age(output: Any) -> Any:
    """Return the output of a command without the ages of runs, which change from one call to the next."""
    if isinstance(output, dict):
        return {key: value for key, value in output.items() if key != "age"}
    if isinstance(output, list):
        return [{key: value for key, value in row.items() if key != "age"} for row in output]
    return re.sub(r"\b\d+[smh]\b", "", output)


@pytest.mark.slow
def test_commands_give_the_same_output_as_the_command_line(python: Cli) -> None:
    for stage in ("download", "process"):
        python(f"+stage={stage}", "dataset=digits", "cluster=foreground")
    make_dataset(python.workspace, "broken")
    (python.workspace / "archives/broken/train-1.tar").unlink()
    assert set(ARGUMENTS) == set(COMMANDS)
    codes = set()
    for name, lines in ARGUMENTS.items():
        for line in [*lines, "--help"]:
            command = (name, *line.split())
            expected = python(*command, code=None)
            codes.add(expected.returncode)
            if expected.returncode == 0:
                output = json.loads(expected.stdout) if "--json" in command else expected.stdout
                assert without_age(hpc_imagenet.command(*command)) == without_age(output), command
                continue
            with pytest.raises(UserError) as error:
                hpc_imagenet.command(*command)
            assert error.value.printed == expected.stdout, command
            assert "\n" not in str(error.value)
            message = expected.stderr.removeprefix("error: ")
            message = message or f"{name}: {expected.stdout.splitlines()[-1].strip()}"
            assert str(error.value) == message.strip(), command
    assert codes == {0, 1, 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hpc_imagenet.submit("model=resnet81 cluster=local"), "resnet18"),
        (lambda: hpc_imagenet.jobs("nothing"), "no run nothing"),
        (lambda: hpc_imagenet.command("repport"), "did you mean: report"),
    ],
)
def test_invalid_input_is_a_one_line_user_error(python: Cli, call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert not python.runs()


PROTOTYPE = "datastore.name=digits model=shufflenet_v2_x0_5 recipe=demo recipe.global_batch=8"


@pytest.mark.slow
def test_a_prototype_reads_a_datastore_behind_ssh_through_copies(
    python: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"datastore.url=there:{python.cwd}/stores"
    with sshd(python.cwd) as shell:
        monkeypatch.setenv("RSYNC_RSH", shell)
        python.env["RSYNC_RSH"] = shell
        for words in (["+stage=download"], ["+stage=process"], ["+stage=upload", url]):
            python(*words, "dataset=digits", "cluster=foreground")
        scratch = f"cluster=local cluster.scratch={python.cwd}/scratch"
        prototype = hpc_imagenet.prototype(f"{PROTOTYPE} {url} {scratch}")
        gc.collect()
        assert prototype.batch()[0].shape == (8, 16, 16, 3)
        prototype.store.close()


@pytest.mark.slow
def test_a_prototype_reads_a_folder_in_place(python: Cli) -> None:
    write_store(python.cwd / "stores" / "digits" / "v1", {"train": 40, "val": 13})
    words = f"datastore.url={python.cwd}/stores cluster=local 'cluster.scratch=$OF_JOBS_ALONE'"
    assert hpc_imagenet.prototype(f"{PROTOTYPE} {words}").batch()[0].shape == (8, 16, 16, 3)
