"""Declaration of the search stage: one run is one worker of a search; work/search.py does its work."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.input.search_space import describe, sample_values, trial_config
from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.config.schema import Cluster, Config, Datastore
from hpc_imagenet.config.search import Search
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import FindVersion
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.search.rungs import promotable, rung_epochs
from hpc_imagenet.search.study_files import StudyFiles
from hpc_imagenet.stages.stage import Stage
from hpc_imagenet.stages.train_stage import TRAIN


class SearchStage(Stage):
    """A worker of a search: it trains one trial after another, each a run of its own."""

    name = "search"
    in_pipeline = False
    distributed = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the user, whose study it is, its name and the worker's number."""
        return (os.geteuid(), config.search.name, config.search.worker)

    def label(self, config: Config) -> str:
        """Return stage, study and the worker's number."""
        return f"{self.name}-{config.search.name}.{config.search.worker}"

    def needs(self, config: Config) -> tuple[str, ...]:
        """Return the needs of the trials."""
        return TRAIN.needs(config)

    def datastore(self, config: Config, find_version: FindVersion) -> Datastore:
        """Return the datastore with the version that all trials read."""
        return TRAIN.datastore(config, find_version)

    def check_settings(self, config: Config, cluster: Cluster) -> None:
        """Raise for trials that cannot be trained or compared, another study of this name, no Optuna."""
        if not cluster.container and importlib.util.find_spec("optuna") is None:
            raise UserError(
                f"+search={config.search.algorithm} needs the package optuna: "
                "pip install -c constraints.txt -e '.[search]'"
            )
        if config.train.share_loader:
            raise UserError(
                "train.share_loader=true is for trainings that run at once, and a worker of a search trains "
                "one trial after another: remove it"
            )
        if config.search.worker > 1:
            return  # the workers differ in their numbers alone
        trials = [trial_config(config, values) for values in sample_values(config.search.space)]
        for trial in trials:
            TRAIN.check_settings(trial, cluster)
        about = definition(config)
        files = StudyFiles(RunStore(Path(config.workspace)), str(config.search.name))
        if files.definition:
            _check_same_study(files, about)
            _check_budget(files, config.search)
        elif config.search.algorithm == "halving" and len(about["rungs"]) > 1:
            _check_sizes([trial.recipe for trial in trials], about["rungs"][0])

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Raise unless the datastore can be read and has enough images for a batch of any trial."""
        batches = {}
        for values in sample_values(config.search.space):
            trial = trial_config(config, values)
            batches[trial.recipe.global_batch] = trial
        for trial in batches.values():
            TRAIN.check_input(trial, cluster, planned)

    def input_key(self, config: Config, cluster: Cluster) -> object:
        """Return that of a trial."""
        return TRAIN.input_key(config, cluster)

    def prepare(self, config: Config, store: RunStore) -> None:
        """Create the study, or request more trials of it."""
        if config.search.worker == 1:
            assert config.search.name is not None
            files = StudyFiles(store, config.search.name)
            files.create(definition(config), config.search.trials, config.search.budget)

    def check_output(self, config: Config) -> None:
        """Raise if trials of the study are left, for which the worker is started again."""
        search, store = config.search, RunStore(Path(config.workspace))
        assert search.name is not None
        files = StudyFiles(store, search.name)
        if is_complete(files, max(search.trials, files.target), files.budget_after(search.budget)):
            return
        raise UserError(f"trials of the search {search.name} are left")

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Train trials until none is left; see `stages.work.search.run`."""
        from hpc_imagenet.stages.work import search

        return search.run(config, run, dist_env)


def longest_warmup(config: Config) -> float:
    """Return the epochs of the longest warm-up that a trial of a search may have; every rung is later."""
    space = config.search.space
    first = sample_values(space)[0]
    drawn = {name: each for name, each in space.items() if name in ("recipe", "recipe.warmup_epochs")}
    return max(
        trial_config(config, {**first, **values}).recipe.warmup_epochs for values in sample_values(drawn)
    )


def definition(config: Config) -> dict[str, Any]:
    """Return what a study is, which later commands must share; settings by their full names."""
    first = trial_config(config, sample_values(config.search.space)[0])
    epochs, warmup = first.recipe.epochs, longest_warmup(config)
    settings = dict(_leaves(first.training_identity(), ""))
    drawn = tuple(config.search.space)
    return {
        "algorithm": config.search.algorithm,
        "seed": config.search.seed,
        "space": config.search.space,
        "choices": config.search.choices,
        "settings": {name: text for name, text in settings.items() if not _is_part(name, drawn)},
        "data": config.datastore.content,
        "epochs": epochs,
        "warmup": warmup,
        "rungs": rung_epochs(epochs, warmup),
    }


def is_complete(files: StudyFiles, trials: int, budget: float | None) -> bool:
    """Whether a study of so many trials, within a budget in GPU-hours, needs no worker any more."""
    records = files.records()
    ended = {(each.trial, each.rung) for each in records if each.ended}
    if any((claim.trial, claim.rung) not in ended for claim in files.claims()):
        return False
    if budget is not None and files.hours >= budget:
        return bool(records)
    if len({trial for trial, rung in ended if rung == 0}) < trials:
        return False
    about = files.definition
    return about["algorithm"] != "halving" or not any(promotable(records, len(about["rungs"])))


def _check_sizes(recipes: Sequence[Recipe], epochs: int) -> None:
    """Raise if images of progressive sizes have not grown in the last of so many epochs, a short schedule."""
    starts = {recipe.start_size for recipe in recipes if recipe.start_size is not None}
    sizes = {recipe.size for recipe in recipes}
    grown = max(recipe.grow_to for recipe in recipes)
    if starts and len(starts | sizes) > 1 and grown > epochs - 1:
        raise UserError(
            f"recipe.start_size={min(starts)} grows to recipe.size={max(sizes)} until "
            f"recipe.grow_to={grown:g}, and the first trainings of +search=halving have {epochs} epochs, "
            f"from 0 to {epochs - 1}: set recipe.start_size=null, or take +search=asha"
        )


def _check_budget(files: StudyFiles, search: Search) -> None:
    """Raise if more trials or a larger budget are requested, and trials are left that cannot begin."""
    kept, budget = files.budget, files.budget_after(search.budget)
    if budget is None or files.hours < budget:
        return
    goes_on = kept is not None and budget > kept and not is_complete(files, files.target, None)
    if goes_on or search.trials > files.target:
        raise UserError(
            f"search.budget={budget:g} of the study {files.name} is spent ({files.hours:.4g} GPU-hours): set "
            f"a larger one for search.trials={max(search.trials, files.target)}"
        )


def _check_same_study(files: StudyFiles, about: dict[str, Any]) -> None:
    """Raise if the study of this name is another one, with the first difference."""
    old, new = files.definition, json.loads(json.dumps(about))
    if _compared(old) == _compared(new):
        return
    before, after = (dict(_flat(each)) for each in (old, new))
    keys = {"+search": "", **old["space"], **new["space"], **before, **after}
    differing = [key for key in keys if before.get(key) != after.get(key)]
    key = differing[0] if differing else "its definition"
    raise UserError(
        f"the study {files.name} exists with {key}={before.get(key, 'not drawn')} instead of "
        f"{key}={after.get(key, 'not drawn')}: repeat its command, or begin another with search.name=NAME"
    )


def _compared(about: dict[str, Any]) -> dict[str, Any]:
    """Return a definition without what follows from the rest; a study keeps the rungs that it began with."""
    return {key: value for key, value in about.items() if key not in ("warmup", "rungs")}


def _flat(about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "+search", str(about["algorithm"])
    yield "search.seed", str(about["seed"])
    yield from ((name, describe(each)) for name, each in about["space"].items())
    yield from ((name, str(value)) for name, value in about["settings"].items())
    yield "the content of the data", str(about["data"])
    yield from about["choices"].items()


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _is_part(name: str, drawn: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in drawn)


SEARCH = SearchStage()
