"""Compose conf/ and command-line overrides with Hydra: one resolved config per combination of a sweep.

Hydra parses the files, the overrides and the sweep syntax. Each choice of groups is composed once; swept
plain values (`seed=range(100)`) are applied to a copy of that config, as Hydra would apply them. This takes
2 ms per combination, where a composition takes 60 ms.
"""

from __future__ import annotations

import copy
import functools
import re
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

from hpc_imagenet.config.auto_cluster import resolve_cluster
from hpc_imagenet.config.backbones import BACKBONES
from hpc_imagenet.config.bounds import check_values
from hpc_imagenet.config.recipe import is_weights_name
from hpc_imagenet.config.schema import OPEN_MAPPINGS, Config, explain_omegaconf_error
from hpc_imagenet.config.slurm_values import check_quoted_times
from hpc_imagenet.config.stored_settings import add_stored_settings, config_folders
from hpc_imagenet.errors import UserError, did_you_mean

VERSION_BASE = "1.3"  # version of Hydra's behaviour
_HERE = Path(__file__).resolve().parents[1]  # the package
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # in a wheel, in a checkout


@functools.cache  # a Python process may compose many times
def register() -> None:
    """Register the schema with Hydra, and every torchvision backbone without a file in conf/model."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config, provider="hpc_imagenet")
    with_file = {path.stem for path in (CONF / "model").glob("*.yaml")}
    for name in BACKBONES:
        if name not in with_file:
            node = {"name": name, "stem": "auto"}
            store.store(group="model", name=name, node=node, provider="hpc_imagenet")


def compose(overrides: Sequence[str], multirun: bool = False, config_dir: str | None = None) -> list[Config]:
    """Return one validated config per combination of the overrides.

    Args:
        overrides: settings in Hydra's grammar, such as `model=resnet18,resnet50` or `seed=range(3)`.
        multirun: whether sweeps are allowed (`-m`).
        config_dir: an additional folder of config groups; no file may have the name of one in conf/. Settings
            and folders that are stored (`stored_settings.py`) come after it.

    Raises:
        UserError: names the invalid key, value or choice.
    """
    register()
    overrides, _ = resolve_cluster(add_stored_settings(overrides))
    folders = [folder for folder in config_folders(config_dir) if folder != CONF]
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            if (CONF / path.relative_to(folder)).exists():  # Hydra would silently use the one in conf/
                raise UserError(
                    f"{path} has the same name as a file of conf/, which takes precedence: rename it"
                )
    if folders:
        urls = (QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders)
        overrides = [f"hydra.searchpath=[{','.join(urls)}]", *overrides]
    for folder in (CONF, *folders):
        for name in (item.partition("=")[2] for item in overrides if item.startswith("cluster=")):
            if (path := folder / "cluster" / f"{name}.yaml").is_file():
                check_quoted_times(path)
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
    """Return a validated copy of a frozen config with single values changed, such as `session.gpus=4`.

    Raises:
        UserError: an invalid key or value, or a config group, which can only be chosen at submission.
    """
    node = OmegaConf.structured(config)
    for line in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([line])
            key = override.key_or_group
            if override.is_sweep_override() or override.is_delete() or key not in _settings(node):
                raise UserError(
                    f"{line}: only single values can be set, such as session.gpus=4 or cluster.partition=gpu"
                )
            if isinstance(OmegaConf.select(node, key), DictConfig):
                raise UserError(
                    f"{line} selects a file of conf/: possible only when a run is first submitted"
                )
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
        # The defaults have no stage, so Hydra requires `+stage=`; `stage=` is accepted too.
        if override.key_or_group == "stage" and override.type is OverrideType.CHANGE:
            override.type = OverrideType.ADD
            override.input_line = f"+{override.input_line}"
    return parsed


def _combinations(parsed: list[Override], multirun: bool, loader: ConfigLoader) -> Iterator[Config]:
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and not multirun:
        raise UserError(f"{swept[0].input_line} is a sweep: add -m (python -m hpc_imagenet -m …)")
    groups = set(loader.list_groups("")) if swept else set()
    # Swept plain values are applied to a copy of the composed config.
    copied = {
        override.key_or_group
        for override in swept
        if override.type is OverrideType.CHANGE and override.key_or_group not in groups
    }
    (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    base: dict[tuple[str, ...], DictConfig] = {}
    values: dict[str, Any] = {}
    for combination in combinations:
        composed = tuple(line for line in combination if line.partition("=")[0] not in copied)
        if composed not in base:
            base[composed] = hydra_compose("config", overrides=list(composed))
            OmegaConf.update(base[composed], "workspace", _absolute("workspace", base[composed].workspace))
        config = copy.deepcopy(base[composed]) if copied else base[composed]
        for line in combination:
            key = line.partition("=")[0]
            if key in copied:
                if line not in values:
                    values[line] = OverridesParser.create().parse_override(line).value()
                OmegaConf.update(config, key, values[line], merge=True)
        yield _typed(config)


def _typed(composed: DictConfig) -> Config:
    config = cast(Config, OmegaConf.to_object(composed))
    _check_fields(config)
    # A job runs in another folder: make paths absolute, relative to the folder of the command.
    config.workspace = _absolute("workspace", config.workspace)
    config.dataset.source = _absolute("dataset.source", config.dataset.source)
    if not re.match(r"[^/]+:", config.datastore.url):  # not s3://…, file:…, user@host:… or HOST:…
        config.datastore.url = _absolute("datastore.url", config.datastore.url)
    if config.download.login is not None:
        config.download.login = _absolute("download.login", config.download.login)
    if config.model.weights is not None and not is_weights_name(config.model.weights):
        config.model.weights = _absolute("model.weights", config.model.weights)
    return config


def _check_fields(node: Any, prefix: str = "") -> None:
    # Hydra lets `+name=` add fields to a schema and `~name` remove them; both are errors here.
    known = {entry.name for entry in fields(node)}
    for name, value in vars(node).items():
        if name not in known:
            raise UserError(_unknown(f"{prefix}{name}"))
        if is_dataclass(value):
            _check_fields(value, f"{prefix}{name}.")
    for name in known:
        if getattr(node, name) == MISSING:
            raise UserError(f"{prefix}{name} is not set: add {prefix}{name}=VALUE")


def _absolute(setting: str, path: str) -> str:
    if not path:
        raise UserError(f"{setting} is empty: set a folder, such as . for the current one")
    is_url = "://" in path or path.startswith("file:")
    return path if is_url else str(Path(path).expanduser().absolute())


def _explain(error: HydraException) -> str:
    """Return a Hydra error as one line."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} is unknown{did_you_mean(choice, list(error.options or []))}"
    if isinstance(error, OverrideParseException):
        return f"cannot parse {error.override}: {str(error).splitlines()[0]}"
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
    for mapping in OPEN_MAPPINGS:
        if key == mapping:
            return f"{key} takes new keys with a plus: +{key}={{…}}"
        if key.startswith(f"{mapping}."):
            return f"{key} is a new key of {mapping}: write +{key}=VALUE"
    settings = list(_settings(OmegaConf.structured(Config)))
    return f"{key} is an unknown setting{did_you_mean(key, settings)}"


def _settings(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        name = f"{prefix}{key}"
        yield name
        if not OmegaConf.is_missing(node, key) and isinstance(child := node[key], DictConfig):
            yield from _settings(child, f"{name}.")
