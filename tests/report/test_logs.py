"""The command `logs`: which attempt, rank and lines, and what is left out of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from recorded_runs import record_run

from hpc_imagenet.report import logs
from hpc_imagenet.runs.attempt import FAILED, FINISHED
from hpc_imagenet.runs.store import Run, RunStore

STARTING = "submitit INFO (2026-11-29 09:33:15,732) - Starting with JobEnvironment(job_id=1, hostname=n1)\n"
EXCEPTION = "submitit ERROR (2026-11-29 09:33:15,732) - Submitted job triggered an exception\n"


@pytest.fixture
def run(cli: Cli) -> Run:
    run = record_run(RunStore(cli.workspace), 1, FINISHED)
    write(run, 1, 0, out=f"{STARTING}epoch 1\nepoch 2\n")
    return run


def write(run: Run, attempt: int, rank: int, out: str = "", err: str = "") -> None:
    for end, text in (("out", out), ("err", err)):
        path = run.folder / "attempts" / str(attempt) / f"123_{rank}_log.{end}"
        path.write_bytes(text.encode(errors="surrogateescape"))


def test_lines_of_submitit_are_left_out(cli: Cli, run: Run) -> None:
    write(run, 1, 0, f"{STARTING}epoch 1\nabout submitit INFO\n", f"{EXCEPTION}Traceback\n  ValueError: x")
    assert cli("logs", run.id).stdout == "epoch 1\nabout submitit INFO\nTraceback\n  ValueError: x\n"


def test_escape_sequences_are_left_out(cli: Cli, run: Run) -> None:
    write(run, 1, 0, "\x1b[2J\x1b]0;title\x07[red]a[/]\tb\x9bc\r\nbar 1%\rbar 50%\rbar 99%\n\udcff\n")
    assert cli("logs", run.id).stdout == "[red]a[/]\tb\nbar 99%\n\ufffd\n"


def test_attempt_is_chosen(cli: Cli, run: Run) -> None:
    second = run.new_attempt()
    second.submit("local", host="elsewhere")
    second.end(FAILED, "the \x1b[1mreason")
    write(run, 2, 0, "again\n")
    done = cli("logs", run.id)
    assert done.stdout == "again\n"
    assert done.stderr.startswith(f"{run.id} · failed · the reason\n")
    done = cli("logs", run.id, "--attempt", "1", "-f")
    assert (done.stdout, done.stderr) == ("epoch 1\nepoch 2\n", "")
    assert f"{run.id} has no attempt 3; its attempts: 1 2" in cli.refused("logs", run.id, "--attempt", "3")


def test_ranks_are_labelled_and_chosen(cli: Cli, run: Run) -> None:
    for rank in (0, 1, 2, 10):
        write(run, 1, rank, f"{STARTING}out {rank}\n", f"err {rank}\n" * (rank != 2))
    assert cli("logs", run.id).stdout.splitlines() == [
        *("0: out 0", "0: err 0", "1: out 1", "1: err 1", "2: out 2", "10: out 10", "10: err 10")
    ]
    assert cli("logs", run.id, "--rank", "10").stdout == "out 10\nerr 10\n"
    assert f"{run.id} has no log of rank 3; its ranks: 0 1 2 10" in cli.refused("logs", run.id, "--rank=3")


@pytest.mark.slow
def test_last_lines_are_chosen(cli: Cli, run: Run) -> None:
    write(run, 1, 0, STARTING + "".join(f"{n}\n" for n in range(200_000)) + STARTING, "w1\nw2\nw3")
    assert cli("logs", run.id, "-n", "2").stdout == "199998\n199999\nw2\nw3\n"
    assert cli("logs", run.id, "-n", "0").stdout == ""
    assert cli("logs", run.id).stdout.count("\n") == 200_003
    assert "-n -1: give a number of lines" in cli.refused("logs", run.id, "-n", "-1")


def test_run_without_output_is_described(cli: Cli) -> None:
    run = record_run(RunStore(cli.workspace), 1)
    done = cli("logs", run.id)
    assert (done.stdout, done.stderr[:29]) == ("", f"{run.id} · queued · ")
    done = cli("logs", run.id, "--rank", "1")
    assert "queued" in done.stderr
    (cli.workspace / "runs/deadbeef-new").mkdir()
    assert cli("logs", "deadbeef").stderr == "deadbeef-new · queued · is being submitted\n"


def follow(run: Run, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Follow the logs of a run; at each poll the next step happens."""
    left = list(steps)
    monkeypatch.setattr(logs.time, "sleep", lambda _: left.pop(0)())
    logs.show_logs(run, follow=True, lines=1)
    assert not left


def test_follow_prints_what_is_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = record_run(RunStore(tmp_path), 1)
    attempt = run.attempt
    assert attempt
    write(run, 1, 0, "old\nlast\nincom")
    follow(
        run,
        monkeypatch,
        lambda: write(run, 1, 0, f"old\nlast\nincomplete\n{STARTING[:30]}"),
        lambda: write(
            run, 1, 0, f"old\nlast\nincomplete\n{STARTING}new 1\nnew 2\n", "first of stderr\nmore\n"
        ),
        lambda: attempt.end(FINISHED),
    )
    printed = capsys.readouterr().out
    # Stderr was empty at first: all that is written into it later is new.
    assert printed == "last\nincomplete\nnew 1\nnew 2\nfirst of stderr\nmore\n"


def test_run_that_is_deleted_ends_following(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = record_run(RunStore(tmp_path), 1)
    write(run, 1, 0, "line\n")
    follow(run, monkeypatch, lambda: run.folder.rename(tmp_path / "elsewhere"))
    captured = capsys.readouterr()
    assert captured.out == "line\n"
    assert "failed · was never submitted" in captured.err
