"""Workers of a search that are killed, cancelled or too many: no trial is lost, none is trained twice."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, eventually
from sample_dataset import write_coloured
from sample_search import SETTINGS, trials

from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.runs.attempt import now
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow
RATES = "recipe.learning_rate=tag(log, interval(0.001,0.1))"


@pytest.fixture
def searching(cli: Cli) -> Cli:
    write_coloured(cli.workspace / "datastores/tiny/v1", 24, noise=99)
    return cli


def begin(cli: Cli, *words: str, algorithm: str = "tpe") -> None:
    fixed = ("search.name=study", RATES, "cluster=local")
    cli(f"+search={algorithm}", *with_defaults([*SETTINGS, *fixed], words))


def running(cli: Cli) -> list[dict[str, Any]]:
    return [each for each in trials(cli, "study") if each["state"] == "running"]


def has_checkpoint(cli: Cli, trial: dict[str, Any]) -> bool:
    return (cli.workspace / "runs" / trial["run"] / "checkpoints/last.ckpt").exists()


def ended(cli: Cli) -> bool:
    return all(row["state"] not in ("queued", "running") for row in cli.jobs())


def test_trial_of_a_killed_worker_is_taken_over_and_its_work_kept(searching: Cli) -> None:
    begin(searching, "recipe.epochs=40", "search.trials=4", "search.parallel=2", "cluster.parallel=2")
    eventually(lambda: sum(has_checkpoint(searching, each) for each in running(searching)) == 2, 200)
    victim = running(searching)[random.Random(7).randrange(2)]
    (worker,) = [row for row in searching.jobs() if row["run"] == victim["worker"]]
    for process in [*searching.processes("submitit"), *searching.processes("start_task")]:
        if worker["run"] in " ".join(process.cmdline()) or worker["dir"] in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
    killed = now()
    eventually(lambda: ended(searching), 400)
    found = trials(searching, "study")
    assert [each["state"] for each in found] == ["finished"] * 4
    runs = RunStore(searching.workspace)
    taken = runs.run(victim["run"])
    outcomes = [attempt.outcome for attempt in taken.attempts()]
    assert [outcome.state for outcome in outcomes if outcome] == ["cancelled", "finished"]
    assert outcomes[0]
    assert "its worker has ended" in outcomes[0].reason
    assert outcomes[0].time <= killed  # not when another one has taken it over
    log = searching("logs", taken.id).stdout
    assert re.search(r"resuming from step [1-9]", log)
    others = [len(runs.run(each["run"]).attempts()) for each in found if each["run"] != victim["run"]]
    assert others == [1, 1, 1]
    states = {row["run"]: row["state"] for row in searching.jobs() if row["stage"] == "search"}
    assert sorted(states.values()) == ["failed", "finished"]
    # The same command finds nothing left to do.
    begin(searching, "recipe.epochs=40", "search.trials=4", "search.parallel=2", "cluster.parallel=2")
    eventually(lambda: ended(searching), 60)
    assert trials(searching, "study") == found


def test_cancelled_trial_leaves_its_worker(searching: Cli) -> None:
    begin(searching, "recipe.epochs=400", "search.trials=2", "search.parallel=1")
    eventually(lambda: any(has_checkpoint(searching, each) for each in running(searching)), 200)
    (first,) = running(searching)
    row = next(row for row in searching.jobs() if row["run"] == first["run"])
    assert (row["state"], row["executor"]) == ("running", "search")
    assert "cancelled" in searching("cancel", first["run"]).stdout
    eventually(lambda: [each["trial"] for each in running(searching)] == [1], 100)
    records = trials(searching, "study")
    assert (records[0]["state"], records[0]["reason"]) == ("failed", "by the cancel command")
    row = next(row for row in searching.jobs() if row["run"] == first["run"])
    assert row["state"] == "cancelled"
    # More trials are requested while the worker runs, and it takes them.
    begin(searching, "recipe.epochs=400", "search.trials=3", "search.parallel=1")
    eventually(lambda: has_checkpoint(searching, records[1]), 100)
    searching("cancel", records[1]["run"])
    eventually(
        lambda: [each["trial"] for each in running(searching) if has_checkpoint(searching, each)] == [2], 100
    )
    # Without the worker its trial has ended; a retried worker goes on with it.
    searching("cancel", "--sweep", "study")
    eventually(lambda: ended(searching), 60)
    (last,) = running(searching)
    states = {row["run"]: row["state"] for row in searching.jobs()}
    assert states[last["run"]] == "cancelled"
    assert Path(searching.workspace / "runs" / last["run"]).is_dir()
    searching("retry", last["worker"])
    eventually(lambda: len(RunStore(searching.workspace).run(last["run"]).attempts()) == 2, 100)
    searching("cancel", "--sweep", "study")


def test_full_disk_of_the_study_is_one_line_and_loses_nothing(searching: Cli) -> None:
    disk = searching.workspace / f"runs/.search-{os.geteuid()}"
    disk.mkdir(parents=True)

    def mount(*options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    if shutil.which("mount") is None or mount("size=40k", "mode=755"):
        pytest.skip("no permission to mount a file system")
    try:
        begin(searching, "recipe.epochs=20", "search.trials=3", "search.parallel=1", algorithm="median")
        eventually(lambda: ended(searching), 300)
        worker = next(row for row in searching.jobs() if row["stage"] == "search")
        assert worker["state"] == "failed"
        assert "no space left" in worker["reason"]
        assert "\n" not in worker["reason"]
        before = trials(searching, "study")
        assert mount("remount", "size=10m") == 0
        searching("retry", worker["run"])
        eventually(lambda: ended(searching), 300)
        found = trials(searching, "study")
        assert [each["trial"] for each in found] == [0, 1, 2]
        assert {each["state"] for each in found} <= {"finished", "pruned"}
        assert [each["values"] for each in found[: len(before)]] == [each["values"] for each in before]
        for line in (disk / "study/journal.log").read_text().splitlines():
            json.loads(line)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_commands_share_one_study(searching: Cli) -> None:
    words = ("search.trials=6", "search.parallel=3", "cluster.parallel=3")
    begin(searching, *words)
    begin(searching, *words)
    eventually(lambda: ended(searching), 300)
    found = trials(searching, "study")
    assert [each["trial"] for each in found] == list(range(6))
    assert {each["state"] for each in found} == {"finished"}
    assert len({each["values"]["recipe.learning_rate"] for each in found}) == 6
    assert len({each["worker"] for each in found}) > 1


def test_several_processes_train_each_trial_together(searching: Cli) -> None:
    rates = "recipe.learning_rate=0.01,1e-9,1e-8,2e-9"
    words = (rates, "recipe.epochs=6", "search.trials=4", "search.parallel=1", "cluster.tasks_per_node=2")
    begin(searching, *words, algorithm="asha")
    eventually(lambda: ended(searching), 400)
    found = trials(searching, "study")
    assert [each["state"] for each in found] == [
        "finished" if each["reused"] else each["state"] for each in found
    ]
    assert {each["state"] for each in found} <= {"finished", "pruned"}
    assert "finished" in {each["state"] for each in found}
    for each in found:
        run = RunStore(searching.workspace).run(each["run"])
        assert run.attempt
        assert len([log for log in run.attempt.logs() if log.suffix == ".out"]) == 2
