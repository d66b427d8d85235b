"""The space of a search, in Hydra's sweep grammar: choices, ranges and intervals; and the config of a trial.

Files of conf/ that are drawn (`model=resnet18,resnet50`) are composed at submission, once for each
combination, and travel in the workers' configs: a file that is edited later changes no trial.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from hpc_imagenet.config.recipe import Model, Recipe
from hpc_imagenet.config.schema import Config
from hpc_imagenet.config.search import ALGORITHMS, ASIDE, Search
from hpc_imagenet.errors import UserError

if TYPE_CHECKING:  # Hydra takes 0.2 s to import, and commands that list runs do not need it
    from hydra.core.override_parser.types import Override

EXAMPLE = "recipe.learning_rate='tag(log, interval(0.05,1))'"
_GROUPS = ("model", "recipe")  # whose files can be drawn
_SETTINGS = ("model.", "recipe.", "seed")
_NOT_IN_NAME = (
    "search.trials",
    "search.parallel",
    "search.budget",
    "search.name",
    "sweep",
    "notify",
    "tracker",
)
_DIGITS = 5  # significant ones of a number that is drawn


def algorithm_of(parsed: Sequence[Override]) -> str | None:
    """Return the file of conf/search that a command selects; None for an ordinary submission.

    Raises:
        UserError: settings of a search without one, or an interval.
    """
    selected = [each for each in parsed if each.key_or_group == "search"]
    if selected:
        return str(selected[0].value())
    for override in parsed:
        line = str(override.input_line)
        if override.key_or_group.startswith("search."):
            raise UserError(f"{line} belongs to a search: add +search=NAME, one of {', '.join(ALGORITHMS)}")
        if _is_interval(override):
            raise UserError(
                f"{line} is an interval, from which a search draws: add +search=asha, "
                f"or write values: -m {override.key_or_group}=A,B"
            )
    return None


def search_configs(
    algorithm: str, parsed: Sequence[Override], combine: Callable[[list[Override]], Config]
) -> list[Config]:
    """Return the config of each worker of a search; its model and recipe are those of one possible trial.

    Args:
        algorithm: file of conf/search.
        parsed: the overrides.
        combine: composes overrides without a sweep.

    Raises:
        UserError: what cannot be drawn, or a possible trial that is invalid.
    """
    fixed = [each for each in parsed if not each.is_sweep_override()]
    drawn = [each for each in parsed if each.is_sweep_override()]
    space = {each.key_or_group: _dimension(each) for each in drawn}
    if not space:
        raise UserError(f"+search={algorithm} has nothing to draw: add values or an interval: {EXAMPLE}")
    names = [_name(each) for each in drawn]
    ends = {name: ends_of(space[each.key_or_group]) for name, each in zip(names, drawn, strict=True)}
    groups = [name for name, each in zip(names, drawn, strict=True) if each.key_or_group in _GROUPS]
    plain = {name: values[0] for name, values in ends.items() if name not in groups}

    def one(values: Mapping[str, str]) -> Config:
        return combine([*fixed, *(_override(name, text) for name, text in values.items())])

    first, choices = None, {}
    for combination in itertools.product(*(ends[name] for name in groups)):
        config = one({**plain, **dict(zip(groups, combination, strict=True))})
        first = first or config
        if groups:
            choices[_key(combination)] = _encode(config)
    assert first is not None
    for name, values in ends.items():  # a value that no training takes is refused now, not in a job
        for text in values[1:] if name not in groups else ():
            one({**plain, **{group: ends[group][0] for group in groups}, name: text})
    if first.stage.name not in ("train", "pipeline"):
        raise UserError(
            f"+stage={first.stage.name} cannot be combined with +search: remove +stage, or write "
            "+stage=pipeline to prepare the data first"
        )
    _check_epochs(first.search, drawn, choices)
    name = first.search.name or _study_name(first.search, parsed)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"search.name={name} is not a folder name: use letters, digits, . _ and -")
    stage = {"search": {**first.cluster.stage.get("train", {}), **first.cluster.stage.get("search", {})}}
    stages = {**first.cluster.stage, **(stage if stage["search"] else {})}
    config = replace(first, cluster=replace(first.cluster, stage=stages), sweep=first.sweep or name)
    return [
        replace(
            config,
            stage=replace(config.stage, name="search" if first.stage.name == "train" else "pipeline"),
            search=replace(first.search, name=name, worker=number + 1, space=space, choices=choices),
        )
        for number in range(first.search.parallel)
    ]


def trial_config(config: Config, values: Mapping[str, str]) -> Config:
    """Return the config of a trial, which is that of an ordinary training with the same settings.

    It has the resources of its worker.

    Args:
        config: config of a worker.
        values: the drawn value of each dimension, as text in Hydra's grammar.
    """
    from hpc_imagenet.config.compose import with_overrides

    groups = [name for name in config.search.space if name in _GROUPS]
    cluster, stages = config.cluster, config.cluster.stage
    if "search" in stages:
        cluster = replace(cluster, stage={**stages, "train": stages["search"]})
    stage = replace(config.stage, name="train")
    trained = replace(config, cluster=cluster, stage=stage, search=Search())
    if groups:
        sections = json.loads(config.search.choices[_key([values[name] for name in groups])])
        trained = replace(trained, model=Model(**sections["model"]), recipe=Recipe(**sections["recipe"]))
    return with_overrides(trained, [f"{name}={text}" for name, text in values.items() if name not in groups])


def change_models(config: Config, change: Callable[[Model, Recipe], Model]) -> Config:
    """Return the config with another model, also in every combination of files that a search may draw."""
    choices = {}
    for key, text in config.search.choices.items():
        sections = json.loads(text)
        recipe = Recipe(**sections["recipe"])
        choices[key] = _as_text(change(Model(**sections["model"]), recipe), recipe)
    search = replace(config.search, choices=choices)
    return replace(config, model=change(config.model, config.recipe), search=search)


def sample_values(space: Mapping[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return possible trials: each end or choice of each dimension, with the first of the others."""
    first = {name: ends_of(dimension)[0] for name, dimension in space.items()}
    more = [{**first, name: text} for name, each in space.items() for text in ends_of(each)[1:]]
    return [first, *more]


def text_of(value: Any, dimension: Mapping[str, Any]) -> str:
    """Return a drawn value as text for an override: numbers with five significant digits."""
    if "choices" in dimension:
        return str(value)
    if dimension["whole"]:
        return str(round(value))
    number = float(f"{value:.{_DIGITS}g}")
    return repr(min(max(number, dimension["low"]), dimension["high"]))


def describe(dimension: Mapping[str, Any]) -> str:
    """Return a dimension as it is typed."""
    if "choices" in dimension:
        return ",".join(dimension["choices"])
    interval = f"interval({dimension['low']:g},{dimension['high']:g})"
    return f"tag(log, {interval})" if dimension["log"] else interval


def _dimension(override: Override) -> dict[str, Any]:
    key, line = override.key_or_group, str(override.input_line)
    value: Any = override.value()
    if key not in _GROUPS and not key.startswith(_SETTINGS):
        raise UserError(
            f"{line} cannot be drawn by a search, whose trials differ in model, recipe and seed alone: "
            "set one value"
        )
    if not _is_interval(override):
        choices = list(dict.fromkeys(override.sweep_string_iterator()))
        if "${" in line:
            raise UserError(f"{line}: a search draws no ${{…}}: write the values")
        return {"choices": choices}
    if key in _GROUPS:
        raise UserError(f"{line} is an interval of files of conf/{key}: write {key}=NAME,NAME")
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or not low < high or not all(map(math.isfinite, (low, high))):
        raise UserError(f"{line}: an interval begins below its end, such as interval(0.05,1)")
    if log and low <= 0:
        raise UserError(f"{line}: a logarithmic interval begins above 0")
    whole = "int" in value.tags or _type_of(key) is int
    if whole:
        low, high = math.ceil(low), math.floor(high)
        if low > high:
            raise UserError(f"{line}: no whole number is in this interval")
    return {"low": low, "high": high, "log": log, "whole": whole}


def _is_interval(override: Override) -> bool:
    return override.is_sweep_override() and hasattr(override.value(), "end")  # of Hydra's IntervalSweep


def _type_of(key: str) -> Any:
    group, _, name = key.partition(".")
    if not name:
        return int if key == "seed" else None
    hints = typing.get_type_hints(Model if group == "model" else Recipe)
    found = hints.get(name)
    inner = [each for each in typing.get_args(found) if each is not type(None)]
    return inner[0] if len(inner) == 1 else found


def ends_of(dimension: Mapping[str, Any]) -> list[str]:
    """Return all choices of a dimension, or both ends of its interval, as text in Hydra's grammar."""
    if "choices" in dimension:
        return list(dimension["choices"])
    return [text_of(dimension[end], dimension) for end in ("low", "high")]


def _override(name: str, text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"{name}={text}")
    override.input_line = f"{name}={text}"
    return override


def _name(override: Override) -> str:
    return str(override.input_line).partition("=")[0]


def _key(combination: Sequence[str]) -> str:
    return " ".join(combination)


def _encode(config: Config) -> str:
    if config.model.source:
        raise UserError(
            f"model={config.model.name} is a network of your own, which a search cannot draw among others: "
            "set one model"
        )
    return _as_text(config.model, config.recipe)


def _as_text(model: Model, recipe: Recipe) -> str:
    text = json.dumps({"model": asdict(model), "recipe": asdict(recipe)})
    return text.replace("$", "\\u0024")  # OmegaConf would resolve a `${…}`


def _check_epochs(search: Search, drawn: Sequence[Override], choices: Mapping[str, str]) -> None:
    """Raise if trials of different lengths would be compared at a rung."""
    lengths = {json.loads(each)["recipe"]["epochs"] for each in choices.values()}
    keys = {each.key_or_group for each in drawn}
    if search.algorithm == "tpe" or ("recipe.epochs" not in keys and len(lengths) < 2):
        return
    raise UserError(
        f"+search={search.algorithm} compares trials after the same epochs of schedules of one length: set "
        "one recipe.epochs, or +search=tpe"
    )


def _study_name(search: Search, parsed: Sequence[Override]) -> str:
    """Return the algorithm and a hash of all settings that decide what is drawn and trained."""
    lines = [
        str(each.input_line).lstrip("+")
        for each in parsed
        if each.key_or_group.partition(".")[0] not in ASIDE and each.key_or_group not in _NOT_IN_NAME
    ]
    digest = hashlib.sha256(repr(sorted(lines)).encode()).hexdigest()
    return f"{search.algorithm}-{digest[:6]}"
