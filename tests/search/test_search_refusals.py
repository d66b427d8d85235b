"""What a search refuses before anything is written, and what it submits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from sample_dataset import write_coloured
from sample_search import SETTINGS

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.input.overrides import with_defaults
from hpc_imagenet.config.input.search_space import sample_values, text_of, trial_config
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.search.study_files import StudyFiles
from hpc_imagenet.stages.search_stage import SEARCH, definition
from hpc_imagenet.stages.train_stage import TRAIN

pytestmark = pytest.mark.slow

RATES = "recipe.learning_rate=tag(log, interval(0.05,1))"
GROWING = ("+search=halving", "recipe.epochs=9", "recipe.start_size=16")  # the rungs are [3, 9]


@pytest.fixture
def searching(cli: Cli) -> Cli:
    write_coloured(cli.workspace / "datastores/tiny/v1", 24, noise=99)
    return cli


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((RATES,), f"{RATES} is an interval, from which a search draws: add +search=asha, or write values"),
        (("-m", "recipe.learning_rate=interval(0.1,1)"), "add +search=asha"),
        (("search.trials=9",), "search.trials=9 belongs to a search: add +search=NAME, one of asha, median"),
        (("+search=asha",), "+search=asha has nothing to draw: add values or an interval"),
        (("+search=asha", "dataset=digits,birds"), "cannot be drawn by a search"),
        (("+search=asha", "loader.workers=1,2"), "cannot be drawn by a search"),
        (("+search=asha", "model=interval(1,2)"), "interval of files of conf/model: write model=NAME,NAME"),
        (("+search=asha", "recipe.learning_rate=interval(1,0.1)"), "an interval begins below its end"),
        (("+search=asha", "recipe.learning_rate=tag(log, interval(0,1))"), "begins above 0"),
        (("+search=asha", "recipe.learning_rate=interval(-1,1)"), "recipe.learning_rate=-1.0 is too small"),
        (("+search=asha", "recipe.global_batch=interval(1.2,1.4)"), "no whole number is in this interval"),
        (("+search=asha", "seed=range(0)"), "seed=range(0) is a sweep without a value"),
        (
            ("+search=asha", "recipe.global_batch=8,7000"),
            "recipe.global_batch=7000 is more than the 24 images",
        ),
        (
            ("+search=asha", "recipe.epochs=2,4"),
            "schedules of one length: set one recipe.epochs, or +search=tpe",
        ),
        (("+search=asha,tpe", RATES), "selects several searches"),
        (("+search=asah", RATES), "asha"),
        (
            ("+search=asha", RATES, "+stage=upload"),
            "cannot be combined with +search: remove +stage, or write +stage=pipeline",
        ),
        (("+search=asha", RATES, "train.share_loader=true"), "trains one trial after another: remove it"),
        (
            (*GROWING, RATES, "recipe.grow_to=8"),
            "recipe.start_size=16 grows to recipe.size=32 until recipe.grow_to=8, and the first trainings of "
            "+search=halving have 3 epochs, from 0 to 2: set recipe.start_size=null, or take +search=asha",
        ),
        (
            (*GROWING[:2], "recipe.size=16,32", "recipe.grow_to=0,3", "recipe.start_size=null,16"),
            "recipe.start_size=16 grows to recipe.size=32 until recipe.grow_to=3",
        ),
        (("+search=asha", RATES, "search.name=a/b"), "search.name=a/b is not a folder name"),
        (("+search=asha", RATES, "search.trials=0"), "search.trials=0 is too small"),
        (("+search=asha", RATES, "model=resnet18,resnet5"), "resnet5"),
        (("search",), "did you mean: +search=asha"),
    ],
)
def test_refused(searching: Cli, words: tuple[str, ...], message: str) -> None:
    settings = with_defaults([*SETTINGS, "cluster=local"], words) if words != ("search",) else list(words)
    assert message in searching.refused(*settings)
    assert not list(searching.workspace.glob("runs/.search*"))


@pytest.mark.parametrize("grown", [0, 2])
def test_halving_takes_sizes_that_have_grown_in_its_shortest_schedule(searching: Cli, grown: int) -> None:
    words = with_defaults([*SETTINGS, "cluster=local"], [*GROWING, RATES, f"recipe.grow_to={grown}"])
    assert "search-halving-" in searching(*words, "dry_run=true").stdout


def test_missing_optuna_is_one_line(searching: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    error = searching.refused("+search=asha", *SETTINGS, RATES, "cluster=local")
    assert error == (
        "error: +search=asha needs the package optuna: pip install -c constraints.txt -e '.[search]'"
    )


def test_study_of_another_space_is_refused_with_the_difference(searching: Cli) -> None:
    def refused(*words: str) -> str:
        return searching.refused(
            *with_defaults([*SETTINGS, RATES, "search.name=night", "cluster=local"], words)
        )

    (first, *_) = compose(
        ["+search=asha", *SETTINGS, RATES, "search.name=night", f"workspace={searching.workspace}"]
    )
    first.datastore.content = "0"  # as the plan sets it
    SEARCH.prepare(first, RunStore(searching.workspace))
    error = refused("+search=asha", "recipe.learning_rate=interval(0.1,1)")
    assert error.startswith(
        "error: the study night exists with recipe.learning_rate=tag(log, interval(0.05,1)) instead of "
        "recipe.learning_rate=interval(0.1,1): repeat its command"
    )
    assert "+search=asha instead of +search=tpe" in refused("+search=tpe")
    assert "search.seed=0 instead of search.seed=1" in refused("+search=asha", "search.seed=1")
    assert "recipe.epochs=2 instead of recipe.epochs=3" in refused("+search=asha", "recipe.epochs=3")
    assert "model=not drawn instead of model=resnet18,resnet50" in refused(
        "+search=asha", "model=resnet18,resnet50"
    )
    write = searching.workspace / "datastores/tiny/v2"
    (searching.workspace / "datastores/tiny/v1").rename(write)
    manifest = json.loads((write / "manifest.json").read_text())
    (write / "manifest.json").write_text(json.dumps({**manifest, "content": "1"}))
    assert "the content of the data=0 instead of the content of the data=1" in refused("+search=asha")


@pytest.mark.parametrize(
    "drawn",
    [
        ["recipe.warmup_epochs=interval(0,5)"],
        ["recipe.warmup_epochs=0,5"],
        ["recipe.warmup_epochs=5,0"],
        ["recipe=linear_probe,standard90", "recipe.freeze=false"],  # of 0 and 5 epochs
        ["recipe=standard90,linear_probe", "recipe.freeze=false"],
    ],
)
def test_first_rung_comes_after_the_longest_warm_up_that_is_drawn(drawn: list[str]) -> None:
    words = with_defaults(["recipe=standard90", "datastore.name=tiny", "recipe.epochs=90"], drawn)
    about = definition(compose(["+search=asha", *words])[0])
    assert (about["warmup"], about["rungs"]) == (5, [10, 30, 90])


def test_study_that_has_begun_keeps_its_rungs(searching: Cli) -> None:
    words = ("recipe.warmup_epochs=0,5", "recipe.epochs=90", "search.name=night", "cluster=local")
    (config, *_) = compose(
        ["+search=asha", *with_defaults(SETTINGS, words), f"workspace={searching.workspace}"]
    )
    store = RunStore(searching.workspace)
    SEARCH.prepare(config, store)
    path = StudyFiles(store, "night").folder / "study.json"
    before = {**json.loads(path.read_text()), "warmup": 0, "rungs": [3, 10, 30, 90]}
    path.write_text(json.dumps(before))
    SEARCH.check_settings(config, config.cluster)
    SEARCH.prepare(config, store)
    assert json.loads(path.read_text()) == before


def test_same_settings_are_the_same_study(searching: Cli) -> None:
    def name(*words: str) -> str:
        done = searching("+search=asha", *SETTINGS, *words, "dry_run=true")
        return done.stdout.splitlines()[0].rpartition("sweep: ")[2]

    study = name(RATES, "cluster=local")
    assert (
        name("cluster=foreground", RATES, "search.trials=99", "search.parallel=7", "search.budget=3") == study
    )
    assert name(RATES, "search.seed=1", "cluster=local") != study
    assert name("recipe.learning_rate=interval(0.05,1)", "cluster=local") != study


def space_of(*words: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    config = compose(["+search=tpe", *with_defaults(["recipe=demo", "datastore.name=tiny"], words)])[0]
    return config, config.search.space


def test_space_in_the_grammar_of_sweeps() -> None:
    _, space = space_of(
        "recipe.epochs=int(interval(3,9))",
        "recipe.warmup_epochs=interval(0,2)",
        "recipe.weight_decay=range(0,3)",
        "recipe.norm_decay=true,false",
        "recipe.optimizer=choice(sgd,adamw)",
        "seed=tag(int, log, interval(1,100))",
        "model=timm/resnet18,resnet50",
    )
    assert space["recipe.epochs"] == {"low": 3, "high": 9, "log": False, "whole": True}
    assert space["recipe.weight_decay"] == {"choices": ["0", "1", "2"]}
    assert space["recipe.norm_decay"] == {"choices": ["True", "False"]}
    assert space["recipe.optimizer"] == {"choices": ["sgd", "adamw"]}
    assert space["seed"] == {"low": 1, "high": 100, "log": True, "whole": True}
    assert space["model"] == {"choices": ["timm/resnet18", "resnet50"]}
    assert text_of(0.123456789, {"low": 0.0, "high": 1.0, "log": False, "whole": False}) == "0.12346"
    assert text_of(0.9999999, {"low": 0.0, "high": 0.99999, "log": False, "whole": False}) == "0.99999"
    assert len(sample_values(space)) == 1 + 1 + 1 + 2 + 1 + 1 + 1 + 1


def test_trial_has_the_files_of_its_choice() -> None:
    config, space = space_of(
        "model=resnet18,timm/resnet50", "recipe=standard90,fast16", "recipe.ema=0.9,0.99"
    )
    values = {"model": "timm/resnet50", "recipe": "fast16", "recipe.ema": "0.99"}
    assert set(values) == set(space)
    trial = trial_config(config, values)
    (ordinary,) = compose(["datastore.name=tiny", *(f"{name}={text}" for name, text in values.items())])
    assert trial.training_identity() == ordinary.training_identity()
    assert trial.search == ordinary.search
    with pytest.raises(UserError, match="schedules of one length"):
        compose(["+search=asha", "datastore.name=tiny", "recipe=standard90,fast16"])


def test_pipeline_with_a_search_prepares_the_data_once_before_its_workers() -> None:
    words = ("+search=asha", "dataset=digits", "model=resnet18", RATES, "search.parallel=2", "cluster=local")
    configs = compose(["+stage=pipeline", *words])
    plan = make_plan(configs, lambda _: None)
    assert [job.stage for job in plan] == ["download", "process", "upload", "search", "search"]
    assert [job.needs for job in plan[3:]] == [(plan[2].run_id,)] * 2
    values = sample_values(plan[3].config.search.space)[0]
    (alone,) = [
        job
        for job in make_plan(
            compose(
                ["+stage=pipeline", *words[1:3], f"recipe.learning_rate={values['recipe.learning_rate']}"]
            ),
            lambda _: None,
        )
        if job.stage == "train"
    ]
    assert TRAIN.run_id(trial_config(plan[3].config, values)) == alone.run_id


def test_workers_are_one_array_with_the_resources_of_a_training(searching: Cli) -> None:
    words = ("+cluster.stage={train: {time: 77, cpus_per_task: 3}}", "search.parallel=3", "cluster.time=5")
    (first, *others) = compose(
        ["+search=asha", *SETTINGS, RATES, *words, f"workspace={searching.workspace}", "cluster=slurm"]
    )
    assert len(others) == 2
    assert first.cluster.stage["search"] == {"time": 77, "cpus_per_task": 3}
    assert [config.search.worker for config in (first, *others)] == [1, 2, 3]
    assert Path(first.workspace) == searching.workspace
