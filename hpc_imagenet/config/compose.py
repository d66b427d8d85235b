"""conf/ and the command line's overrides → one resolved config a combination.

Hydra reads the files, the overrides and the sweep syntax; what is done here is to compose each choice of
groups once. A sweep over plain values (`seed=range(100)`) is applied to a copy, as Hydra applies it, and
costs 2 ms a combination instead of the 60 ms of a composition.
"""

from __future__ import annotations

import copy
import functools
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from hpc_imagenet.config.backbones import BACKBONES
from hpc_imagenet.config.bounds import check_values
from hpc_imagenet.config.recipe import is_weights_name
from hpc_imagenet.config.schema import OPEN_MAPPINGS, Config, explain_omegaconf_error
from hpc_imagenet.errors import UserError, did_you_mean

VERSION_BASE = "1.3"  # of Hydra's behaviour
_HERE = Path(__file__).resolve().parents[1]  # the package
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # a wheel's, a checkout's


@functools.cache  # whoever composes often, as from Python, tells it once
def register() -> None:
    """Tell Hydra the schema, and every torchvision backbone that has no file of its own in conf/model."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config, provider="hpc_imagenet")
    written = {path.stem for path in (CONF / "model").glob("*.yaml")}
    for name in BACKBONES:
        if name not in written:
            node = {"name": name, "stem": "auto"}
            store.store(group="model", name=name, node=node, provider="hpc_imagenet")


def resolve_cluster(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with a cluster: where none is named, or auto, the one that this machine has."""
    if any(word.startswith("cluster=") and word != "cluster=auto" for word in overrides):
        return list(overrides)
    rest = [word for word in overrides if word != "cluster=auto"]
    # Among the other overrides: with options of Hydra's between them they would not be understood.
    place = next((i for i, word in enumerate(rest) if "=" in word and word[0] != "-"), len(rest))
    rest.insert(place, f"cluster={'slurm' if shutil.which('sbatch') else 'local'}")
    return rest


def compose(overrides: Sequence[str], multirun: bool = False, config_dir: str | None = None) -> list[Config]:
    """Return one checked config for each combination that the overrides ask for.

    Args:
        overrides: Hydra's grammar, such as `model=resnet18,resnet50` or `seed=range(3)`.
        multirun: whether sweeps are allowed (`-m`).
        config_dir: a further folder of groups, whose files have names of their own.

    Raises:
        UserError: anything wrong with a key, a value or a choice, in one line that names it.
    """
    register()
    overrides = resolve_cluster(overrides)
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir}: no such folder")
        for path in sorted(folder.rglob("*.yaml")):
            if (CONF / path.relative_to(folder)).exists():  # Hydra would take ours and not say so
                raise UserError(f"{path} has the name of one of ours, which would win: give it another")
        place = QuotedString(f"file://{folder}", Quote.single).with_quotes()
        overrides = [f"hydra.searchpath=[{place}]", *overrides]
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        try:
            composed = list(_combinations(_parse(overrides, loader), multirun, loader))
        except HydraException as error:
            raise UserError(_explain(error)) from None
        except OmegaConfBaseException as error:
            raise UserError(_explain_value(error)) from None
    for config in composed:
        check_values(config)
    return composed


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a frozen config with single values changed, such as `session.gpus=4`; it is checked.

    Raises:
        UserError: a key, a value, or a choice of a group, which was made when the run was first asked for.
    """
    node = OmegaConf.structured(config)
    for line in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([line])
            key = override.key_or_group
            if override.is_sweep_override() or override.is_delete() or key not in _settings(node):
                raise UserError(
                    f"{line}: give single values, such as session.gpus=4 or cluster.partition=gpu"
                )
            if isinstance(OmegaConf.select(node, key), DictConfig):
                raise UserError(f"{line} chooses a file of conf/: that is done when a run is first asked for")
            OmegaConf.update(node, key, override.value(), merge=True)
        except OverrideParseException as error:
            raise UserError(_explain(error)) from None
        except OmegaConfBaseException as error:
            raise UserError(_explain_value(error)) from None
    typed = _typed(node)
    check_values(typed)
    return typed


def _parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    for override in parsed:
        # No stage stands in the defaults, so Hydra wants `+stage=`; there is nothing else it could mean.
        if override.key_or_group == "stage" and override.type is OverrideType.CHANGE:
            override.type = OverrideType.ADD
            override.input_line = f"+{override.input_line}"
    return parsed


def _combinations(parsed: list[Override], multirun: bool, loader: ConfigLoader) -> Iterator[Config]:
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and not multirun:
        raise UserError(f"{swept[0].input_line} is a sweep: add -m (python -m hpc_imagenet -m …)")
    groups = set(loader.list_groups("")) if swept else set()
    late = {
        override.key_or_group
        for override in swept
        if override.type is OverrideType.CHANGE and override.key_or_group not in groups
    }
    (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    base: dict[tuple[str, ...], DictConfig] = {}
    values: dict[str, Any] = {}
    for combination in combinations:
        first = tuple(line for line in combination if line.partition("=")[0] not in late)
        if first not in base:
            base[first] = hydra_compose("config", overrides=list(first))
            OmegaConf.update(base[first], "workspace", _absolute("workspace", base[first].workspace))
        config = copy.deepcopy(base[first]) if late else base[first]
        for line in combination:
            key = line.partition("=")[0]
            if key in late:
                if line not in values:
                    values[line] = OverridesParser.create().parse_override(line).value()
                OmegaConf.update(config, key, values[line], merge=True)
        yield _typed(config)


def _typed(composed: DictConfig) -> Config:
    config = cast(Config, OmegaConf.to_object(composed))
    _refuse_strangers(config)
    # A job stands elsewhere: what is relative is relative to where the command was given.
    config.workspace = _absolute("workspace", config.workspace)
    config.dataset.source = _absolute("dataset.source", config.dataset.source)
    if not re.match(r"[^/]+:", config.datastore.url):  # s3://…, file:…, user@host:…, a host of ~/.ssh/config
        config.datastore.url = _absolute("datastore.url", config.datastore.url)
    if config.download.login is not None:
        config.download.login = _absolute("download.login", config.download.login)
    if config.model.weights is not None and not is_weights_name(config.model.weights):
        config.model.weights = _absolute("model.weights", config.model.weights)
    return config


def _refuse_strangers(node: Any, prefix: str = "") -> None:
    # Hydra lets `+name=` add to a schema and `~name` take from it; neither means anything here.
    known = {entry.name for entry in fields(node)}
    for name, value in vars(node).items():
        if name not in known:
            raise UserError(_unknown(f"{prefix}{name}"))
        if is_dataclass(value):
            _refuse_strangers(value, f"{prefix}{name}.")
    for name in known:
        if getattr(node, name) == MISSING:
            raise UserError(f"{prefix}{name} is not set: add {prefix}{name}=VALUE")


def _absolute(setting: str, place: str) -> str:
    if not place:
        raise UserError(f"{setting} is empty: give a folder; . is the one you are in")
    remote = "://" in place or place.startswith("file:")
    return place if remote else str(Path(place).expanduser().absolute())


def _explain(error: HydraException) -> str:
    """Say a Hydra error in one line."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} is unknown{did_you_mean(choice, list(error.options or []))}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override}: {str(error).splitlines()[0]}"
    if unknown := re.match(r"Could not override '([^'@]+)'", str(error)):
        return _unknown(unknown.group(1))
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return _explain_value(cause)
    return " ".join(str(error).split())


def _explain_value(error: OmegaConfBaseException) -> str:
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and "not in" in str(error):
        return _unknown(str(error.full_key))
    return explain_omegaconf_error(error)


def _unknown(key: str) -> str:
    for free in OPEN_MAPPINGS:
        if key == free:
            return f"{key} takes new keys with a plus: +{key}={{…}}"
        if key.startswith(f"{free}."):
            return f"{key} is new in {free}: write +{key}=VALUE"
    settings = list(_settings(OmegaConf.structured(Config)))
    return f"{key} is an unknown setting{did_you_mean(key, settings)}"


def _settings(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        name = f"{prefix}{key}"
        yield name
        if not OmegaConf.is_missing(node, key) and isinstance(child := node[key], DictConfig):
            yield from _settings(child, f"{name}.")
