"""A search from the command line: what is drawn, pruned, continued, reused and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Cli
from sample_dataset import write_coloured
from sample_search import SETTINGS, SPACE, trials

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.validate import version_finder
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow


@pytest.fixture
def searching(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path / "workspace")
    write_coloured(cli.workspace / "datastores/tiny/v1", 24, noise=99)
    yield cli
    cli.close()


def search(cli: Cli, *words: str, algorithm: str = "asha") -> list[dict[str, Any]]:
    """Run a search in the foreground and return its trials."""
    named = [word for word in words if word.startswith("search.name=")] or ["search.name=study"]
    words = tuple(dict.fromkeys((*with_defaults(SETTINGS, words), *named, "cluster=foreground")))
    done = cli(f"+search={algorithm}", *words)
    assert "sweep: " in done.stdout
    return trials(cli, named[0].partition("=")[2])


def test_same_command_with_more_trials_continues_and_repeats_itself(searching: Cli) -> None:
    words = (*SPACE, "search.parallel=1")
    first = search(searching, *words, "search.trials=2", "search.seed=3")
    assert [each["trial"] for each in first] == [0, 1]
    more = search(searching, *words, "search.trials=4", "search.seed=3")
    assert more[:2] == first
    assert len(more) == 4
    # Fewer trials than before change nothing, and start no job.
    assert search(searching, *words, "search.trials=1", "search.seed=3") == more
    assert len(list(searching.workspace.glob("runs/*-search-study.1/attempts/*"))) == 2
    # Another study with the same seed draws the same, and reuses the trainings that have finished.
    other = search(searching, *words, "search.trials=4", "search.seed=3", "search.name=other")
    assert [each["values"] for each in other] == [each["values"] for each in more]
    finished = [each["state"] == "finished" for each in more]
    assert [each["reused"] for each in other] == finished
    assert [each["hours"] == 0 for each in other] == finished
    other = search(searching, *words, "search.trials=1", "search.seed=4", "search.name=seed")
    assert other[0]["values"] != more[0]["values"]


def test_trial_is_the_ordinary_run_with_the_same_settings(searching: Cli) -> None:
    found = search(searching, *SPACE, "search.trials=3", "search.parallel=1", algorithm="tpe")
    assert [each["state"] for each in found] == ["finished"] * 3
    last = found[-1]  # the third training of one process
    run = RunStore(searching.workspace).run(last["run"])
    settings = [f"{name}={text}" for name, text in last["values"].items()]
    ordinary = [*SETTINGS, *settings, "cluster=foreground", f"workspace={searching.workspace}"]
    (job,) = make_plan(compose(ordinary), version_finder())
    assert job.run_id == run.id
    frozen = {**job.frozen(), "sweep": "study"}
    assert json.loads(json.dumps(frozen)) == run.frozen()
    assert "already finished" in searching(*ordinary).stdout
    # Its weights do not depend on the trainings before it.
    alone = Cli(searching.workspace.parent / "alone")
    write_coloured(alone.workspace / "datastores/tiny/v1", 24, noise=99)
    alone(*ordinary[:-1])
    for name, expected in weights(alone.workspace / "runs" / run.id).items():
        assert torch.equal(weights(run.folder)[name], expected), name
    rows = searching("report", "--csv").stdout.splitlines()
    assert len(rows) == 4
    assert "epoch 2/2" in searching("logs", run.id).stdout
    assert run.info["sweeps"] == ["study"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return state


def test_pruned_trial_is_no_failure_and_can_be_trained_to_its_end(searching: Cli) -> None:
    words = ("recipe.learning_rate=0.01,1e-9,1e-8", "recipe.epochs=6", "search.trials=6", "search.parallel=1")
    model = ("model=resnet18", "model.stem=standard")
    found = search(searching, *words, *model)
    pruned = [each for each in found if each["state"] == "pruned" and not each["reused"]]
    assert pruned
    assert all(each["epochs"] == 2 for each in pruned)
    row = next(row for row in searching.jobs() if row["run"] == pruned[0]["run"])
    assert (row["state"], row["reason"]) == ("pruned", "after epoch 2 of 6, by the search study")
    assert "pruned" in searching("report").stdout
    assert "no run that matches has failed" in searching("retry", "--sweep", "study").stdout
    assert searching("jobs", "--failed").stdout.count("\n") == 1  # the header
    rate = pruned[0]["values"]["recipe.learning_rate"]
    ordinary = with_defaults(SETTINGS, [f"recipe.learning_rate={rate}", "recipe.epochs=6", *model])
    searching(*ordinary, "cluster=local", "wait=true")
    log = searching("logs", pruned[0]["run"]).stdout
    row = next(row for row in searching.jobs() if row["run"] == pruned[0]["run"])
    assert (row["state"], row["result"]["epochs"]) == ("finished", 6)
    assert re.findall(r"epoch (\d)/6", log) == ["3", "4", "5", "6"]


def test_halving_compares_complete_schedules(searching: Cli) -> None:
    rates = "recipe.learning_rate=tag(log, interval(0.001,0.1))"
    words = (rates, "recipe.epochs=6", "search.trials=6", "search.parallel=2")
    found = search(searching, *words, algorithm="halving")
    rungs = [each["rung"] for each in found]
    assert (rungs.count(0), rungs.count(1)) == (6, 2)
    runs = RunStore(searching.workspace)
    for each in found:
        assert runs.run(each["run"]).frozen()["recipe"]["epochs"] == (2, 6)[each["rung"]]
        assert each["state"] == "finished"
    best = {each["trial"] for each in sorted(found, key=lambda each: -each["top1"]) if each["rung"] == 1}
    tops = sorted((each["top1"] for each in found if each["rung"] == 0), reverse=True)
    assert all(each["top1"] >= tops[1] for each in found if each["rung"] == 0 and each["trial"] in best)


def test_failing_trials_leave_the_others(searching: Cli) -> None:
    rates = "recipe.learning_rate=0.01,1e+30"
    found = search(searching, rates, "search.trials=6", "search.parallel=1", algorithm="tpe")
    states = {(each["values"]["recipe.learning_rate"], each["state"]) for each in found}
    assert states == {("0.01", "finished"), ("1e+30", "failed")}
    failed = next(each for each in found if each["state"] == "failed")
    assert "is not finite" in failed["reason"]


def test_search_whose_trials_all_fail_says_so(searching: Cli) -> None:
    words = ("recipe.learning_rate=1e30,1e31", "search.trials=2", "search.parallel=1", "search.name=bad")
    done = searching("+search=tpe", *SETTINGS, *words, "cluster=foreground", code=1)
    assert done.stdout
    row = next(row for row in searching.jobs() if row["stage"] == "search")
    assert row["state"] == "failed"
    assert row["reason"].startswith(
        "all 2 trials of the search bad failed; the last one: recipe.learning_rate=1e+3"
    )


def test_budget_ends_the_search(searching: Cli) -> None:
    words = (*SPACE, "search.parallel=1", "search.trials=9", "search.budget=1e-9")
    assert len(search(searching, *words)) == 1
    assert len(search(searching, *words)) == 1  # which starts no job
    assert len(list(searching.workspace.glob("runs/*-search-study.1/attempts/*"))) == 1
    (row,) = (row for row in searching.jobs() if row["stage"] == "search")
    assert row["result"]["budget"] == 1e-9
    # Without search.budget that of the study holds, and a larger one continues it.
    fixed = ("+search=asha", "search.name=study", "cluster=foreground", *with_defaults(SETTINGS, words[:-2]))
    for more in (["search.trials=10"], ["search.trials=10", "search.budget=1e-8"], ["search.budget=1e-8"]):
        assert "of the study study is spent (" in searching.refused(*fixed, *more)
    assert len(search(searching, *words[:-2], "search.trials=2", "search.budget=9")) == 9


def test_choices_of_files_and_median(searching: Cli) -> None:
    models = "model=choice(squeezenet1_1,shufflenet_v2_x0_5)"
    found = search(searching, models, "search.trials=5", "search.parallel=1", algorithm="median")
    assert {each["values"]["model"] for each in found} == {"squeezenet1_1", "shufflenet_v2_x0_5"}
    assert sum(not each["reused"] for each in found) == 2  # there are only two runs
    assert {each["run"].partition("-")[2] for each in found} == {"squeezenet1_1", "shufflenet_v2_x0_5"}
