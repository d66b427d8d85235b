"""price=true with real price jobs: they time trainings, share records, and are measured anew where broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from tiny_training import write_store

pytestmark = pytest.mark.slow

TRAINING = (
    *("datastore.name=digits", "model=shufflenet_v2_x0_5", "recipe=demo", "recipe.epochs=2"),
    *("recipe.global_batch=8", "cluster=foreground"),
)


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cli, str]:
    """A workspace with a datastore, and what the first price=true printed."""
    cli = Cli(tmp_path_factory.mktemp("priced") / "workspace")
    write_store(cli.workspace / "datastores" / "digits" / "v1", {"train": 40, "val": 13})
    return cli, cli.process(*TRAINING, "price=true").stdout


def record_of(cli: Cli) -> Path:
    (path,) = cli.workspace.glob("runs/.times-*/*")
    return path


def test_a_price_job_times_a_training_and_submits_nothing(priced: tuple[Cli, str]) -> None:
    cli, printed = priced
    (row,) = cli.jobs()
    assert (row["stage"], row["state"], row["label"]) == ("price", "finished", "price-shufflenet_v2_x0_5")
    assert list(row["result"]) == ["images_per_second"]
    assert f"{row['id']}\n1 training" in printed
    assert printed.endswith("nothing was submitted (price=true)\n")
    record = json.loads(record_of(cli).read_text())
    assert (record["run"], record["device"], record["short"]) == (row["run"], "CPU", True)
    assert list(record["train"]) == ["16"]
    assert record["memory"] > 10**8
    parts = [record[name] for name in ("startup", "after")] + [record["validation"]["batch"]]
    assert all(part["wall"] > 0 and part["cpu"] > 0 for part in parts)
    assert not (Path(row["dir"]) / "checkpoints").exists()
    assert json.loads(cli("report", "--json").stdout) == []


def test_trainings_of_the_same_shape_are_not_timed_again(priced: tuple[Cli, str]) -> None:
    cli, _ = priced
    words = ("-m", *TRAINING[:3], *TRAINING[4:], "price=true", "recipe.epochs=1,3", "seed=0,1", "sweep=four")
    printed = cli(*words).stdout
    assert "4 trainings · done after" in printed
    assert len(cli.jobs()) == 1
    times = [line.split()[1] for line in printed.splitlines()[2:6]]
    assert times[0] == times[1]
    assert times[2] == times[3]


def test_a_broken_record_is_measured_anew(priced: tuple[Cli, str]) -> None:
    cli, _ = priced
    record_of(cli).write_text('{"version": 1, "train":')
    assert "timed by" in cli(*TRAINING, "price=true").stdout
    (row,) = cli.jobs()
    assert (row["attempt"], row["state"]) == (2, "finished")
    assert json.loads(record_of(cli).read_text())["run"] == row["run"]


def test_two_prices_at_once_share_one_job(priced: tuple[Cli, str], tmp_path: Path) -> None:
    cli, _ = priced
    words = [word for word in TRAINING if word != "cluster=foreground"]
    command = [
        sys.executable,
        "-m",
        "hpc_imagenet",
        *words,
        "cluster=local",
        "loader.workers=0",
        "price=true",
    ]
    both = [
        subprocess.Popen(command, env=cli.env, cwd=cli.cwd, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert all("nothing was submitted" in text for text in printed)
    runs = {row["run"]: row for row in cli.jobs() if row["executor"] == "local"}
    assert [row["state"] for row in runs.values()] == ["finished"]
    cli.close()


def test_a_training_records_its_own_times_and_is_free_when_finished(priced: tuple[Cli, str]) -> None:
    cli, _ = priced
    cli(*TRAINING)
    record = json.loads(record_of_run(cli, "train"))
    assert (record["short"], list(record["train"])) == (False, ["16"])
    printed = cli(*TRAINING, "price=true").stdout
    assert "finished" in printed
    assert "1 training · 1 of them free: finished, or running already\n" in printed
    longer = cli(*TRAINING[:3], *TRAINING[4:], "recipe.epochs=3", "price=true").stdout
    (row,) = [line for line in longer.splitlines() if " device " in line]
    assert row.split()[-1] == record["run"].partition("-")[0]


def record_of_run(cli: Cli, stage: str) -> str:
    (run,) = [row["run"] for row in cli.jobs() if row["stage"] == stage]
    (text,) = [
        path.read_text()
        for path in cli.workspace.glob("runs/.times-*/*")
        if json.loads(path.read_text())["run"] == run
    ]
    return text


def test_a_price_job_that_fails_is_one_error_line(priced: tuple[Cli, str]) -> None:
    cli, _ = priced
    done = cli(*TRAINING, "recipe.freeze=true", f"model.weights={os.devnull}", "price=true", code=2)
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_sizes_of_a_schedule_are_timed_each(priced: tuple[Cli, str]) -> None:
    cli, _ = priced
    grow = ("recipe.start_size=8", "recipe.grow_from=0", "recipe.grow_to=1", "recipe.epochs=4")
    words = [word for word in TRAINING if "epochs" not in word and "size" not in word]
    cli(*words, *grow, "recipe.size=24", "recipe.val_size=24", "recipe.val_resize=24", "price=true")
    timed = [json.loads(path.read_text()) for path in cli.workspace.glob("runs/.times-*/*")]
    assert [list(each["train"]) for each in timed if "8" in each["train"]] == [["8", "24"]]


def test_a_search_is_priced_without_the_trials_that_cannot_be_trained(priced: tuple[Cli, str]) -> None:
    cli, _ = priced
    words = ("+search=tpe", "model=shufflenet_v2_x0_5,maxvit_t", "search.trials=4", "search.parallel=1")
    fixed = [word for word in TRAINING if not word.startswith("model=")]
    printed = cli.process(*words, *fixed, "recipe.size=16,12", "price=true").stdout
    left_out = [line for line in printed.splitlines() if "of the search cannot be trained: " in line]
    assert len(left_out) == 2
    assert all("does not fit model.name=maxvit_t" in line for line in left_out)
    rows = [line for line in printed.splitlines() if " device " in line or " data " in line]
    assert len(rows) == 2
    assert "4 trials by 1 worker: " in printed
