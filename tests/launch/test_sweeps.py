"""Sweeps: their names are made or given, and not part of a signature; cancel and retry select by them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import Cli, Gate

from hpc_imagenet.api import submit
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, QUEUED
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow

DOWNLOAD = ("+stage=download", "dataset=digits", "cluster.time=60")
SWEPT = ("-m", "dataset.revision=a,b,c", *DOWNLOAD)


def pending(commands: Path, *jobs: str) -> None:
    """Let squeue list these jobs as pending."""
    (commands / "queue").write_text("\n".join(f"{job}|PENDING|0|0|Priority" for job in jobs))


def sweeps(cli: Cli) -> list[list[str]]:
    return [row["sweeps"] for row in cli.jobs()]


def name_in(printed: str) -> str:
    """Return the sweep that a submission has printed, the same twice."""
    (name,) = re.findall(r"^cluster: .* · sweep: (\S+)$", printed, re.MULTILINE)
    assert f"python -m hpc_imagenet jobs --sweep {name} · " in printed
    return str(name)


def test_sweep_is_named_after_its_settings(cluster: Cli, commands: Path) -> None:
    name = name_in(cluster(*SWEPT).stdout)
    assert re.fullmatch(r"revision-[0-9a-f]{6}", name)
    assert sweeps(cluster) == [[name]] * 3
    assert len(cluster("jobs", "--sweep", name[:12]).stdout.splitlines()) == 4
    # The same combinations with other resources are the same sweep; other combinations are another one.
    pending(commands, "1_0", "1_1", "1_2")
    again = cluster(*SWEPT, "cluster.memory_gb=9")
    assert name_in(again.stdout) == name
    other = cluster("-m", "dataset.revision=a,b", *DOWNLOAD)
    assert name_in(other.stdout) != name
    assert other.stdout.count("already running") == 2
    assert [len(names) for names in sweeps(cluster)] == [2, 2, 1]


def test_sweep_can_be_named_and_joined(cluster: Cli) -> None:
    assert name_in(cluster(*SWEPT, "sweep=night").stdout) == "night"
    assert "sweep:" not in cluster(*DOWNLOAD).stdout
    cluster(*DOWNLOAD, "sweep=night", "dataset.revision=d")  # one run joins it
    assert sweeps(cluster) == [["night"]] * 3 + [[]] + [["night"]]
    cluster(*DOWNLOAD, "sweep=night", "dataset.revision=a")
    assert sweeps(cluster)[0] == ["night"]


def test_sweep_is_not_part_of_a_signature(cluster: Cli, commands: Path) -> None:
    cluster(*DOWNLOAD)
    pending(commands, "1")
    runs = cluster.runs()
    done = cluster(*DOWNLOAD, "sweep=night")
    assert "already running" in done.stdout
    assert cluster.runs() == runs
    assert sweeps(cluster) == [["night"]]


def test_finished_run_joins_a_sweep_unless_it_belongs_to_another_user(
    cluster: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster("+stage=download", "dataset=digits", "cluster=local", "wait=true")
    run = RunStore(cluster.workspace).all()[0]
    monkeypatch.setattr("hpc_imagenet.runs.store.write_json", denied)
    assert "already finished" in cluster(*DOWNLOAD, "sweep=first").stdout
    monkeypatch.undo()
    assert "already finished" in cluster(*DOWNLOAD, "sweep=second").stdout
    assert run.info["sweeps"] == ["second"]
    assert run.info["created"]
    assert cluster.states() == [FINISHED]


def denied(path: Path, _: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("sweep=a/b", "sweep=a/b is not a folder name"),
        ("sweep=''", "sweep= is not a folder name"),
        ("sweep=a,b", "sweep cannot be swept"),
        ("swep=a", "swep is an unknown setting; did you mean: sweep"),
    ],
)
def test_bad_name_of_a_sweep_is_refused(cluster: Cli, word: str, fragment: str) -> None:
    assert fragment in cluster.refused("-m", *DOWNLOAD, word)


def test_sweep_of_python_has_the_same_name(cluster: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_in(cluster(*SWEPT).stdout)
    for key, value in cluster.env.items():
        monkeypatch.setenv(key, value)
    submit([*SWEPT[1:]])
    assert sweeps(cluster) == [[name]] * 3


def test_sweep_is_cancelled_and_retried_as_one_array(cluster: Cli, commands: Path) -> None:
    cluster(*DOWNLOAD)
    cluster(*SWEPT, "sweep=night")
    pending(commands, "1", "2_0", "2_1", "2_2")
    before = len(list(commands.glob("script.*")))
    done = cluster("cancel", "--sweep", "night")
    assert done.stdout.count("cancelled  ") == 3
    assert (commands / "cancelled").read_text().split() == ["2_0", "2_1", "2_2"]
    assert cluster.states() == [QUEUED, CANCELLED, CANCELLED, CANCELLED]
    assert "no run of yours that matches is queued or running" in cluster("cancel", "--sweep", "night").stdout
    assert "retry: no run in" in cluster("retry", "--sweep", "night", "--running", code=2).stderr
    assert cluster("retry", "--sweep", "night").stdout.count("submitted") == 3
    scripts = list(commands.glob("script.*"))
    assert len(scripts) == before + 1
    newest = max(scripts, key=lambda path: int(path.suffix[1:]))
    assert "#SBATCH --array=0-2%" in newest.read_text()
    assert sweeps(cluster)[1:] == [["night"]] * 3


def test_cancelling_a_sweep_starts_no_job_of_the_queue(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    source = f"dataset.source={url}/a"
    cli("-m", "+stage=download", "dataset=digits", source, "dataset.name=a,b,c", "cluster=local", "sweep=s")
    cli.until("running", "queued", "queued")
    names = [line.split("-download-")[1] for line in cli("cancel", "--sweep", "s").stdout.splitlines()]
    assert names == ["b", "c", "a"]
    assert cli.states() == [CANCELLED] * 3
    assert len(held.waiting) <= 1


def test_failed_runs_are_retried_but_not_those_of_the_foreground(cli: Cli, gate: tuple[Gate, str]) -> None:
    held, url = gate
    held.open.set()
    words = ("+stage=download", "dataset=digits", f"dataset.source={url}/a", "download.retries=0")
    cli(*words, "dataset.name=a", "cluster=foreground", code=1)
    cli(*words, "dataset.name=b", "cluster=local", "wait=true", code=1)
    assert cli.states() == [FAILED, FAILED]
    done = cli("retry", "--failed")
    assert "left out  " in done.stderr
    assert "cluster=foreground" in done.stderr
    assert re.findall(r"^submitted  \w{8}-download-(\w)$", done.stdout, re.MULTILINE) == ["b"]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("cancel",), "cancel: give RUN …, or an option that selects runs"),
        (("retry",), "retry: give RUN …, or an option that selects runs"),
        (("cancel", "RUN", "--sweep", "s"), "cancel: give RUN …, or an option"),
        (("cancel", "--sweep", "s"), "--sweep s: no such sweep"),
        (("retry", "--failed"), "retry: no run in"),
    ],
)
def test_selection_that_selects_nothing_is_refused(
    cluster: Cli, commands: Path, words: tuple[str, ...], fragment: str
) -> None:
    cluster(*DOWNLOAD)
    pending(commands, "1")
    assert fragment in cluster.refused(*words)
