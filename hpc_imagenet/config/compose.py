"""Compose conf/ and command-line overrides with Hydra: one resolved config per combination of a sweep.

Hydra parses the files, the overrides and the sweep syntax. Each choice of groups is composed once; swept
plain values (`seed=range(100)`) are applied to a copy of that config, as Hydra would apply them. This takes
2 ms per combination, where a composition takes 60 ms.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, Quote, QuotedString
from hydra.errors import (
    HydraException,
    OverrideParseException,
)
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpc_imagenet.config.bounds import check_ignored, check_values
from hpc_imagenet.config.input.auto_cluster import resolve_cluster
from hpc_imagenet.config.input.explain import explain, explain_value, name_for, setting_names, unknown_setting
from hpc_imagenet.config.input.normalise import normalise
from hpc_imagenet.config.input.overrides import (
    check_given_once,
    instead_of_several,
    quote_paths,
    quoted_form,
    takes_quotes,
)
from hpc_imagenet.config.input.search_space import algorithm_of, search_configs
from hpc_imagenet.config.input.slurm_values import check_quoted_times
from hpc_imagenet.config.input.stored_settings import add_stored_settings, config_files, config_folders
from hpc_imagenet.config.names import own_network
from hpc_imagenet.config.names.backbones import BACKBONES, TIMM, check_name, is_own, is_weights_name
from hpc_imagenet.config.schema import DATA_STAGES, OPEN_MAPPINGS, Config
from hpc_imagenet.config.search import ASIDE
from hpc_imagenet.config.setting import is_variable
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home

VERSION_BASE = "1.3"  # version of Hydra's behaviour
_ADDED = ("stage", "search")  # groups of which the defaults have no file
_WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_SWEEP_NAME_LENGTH = 24  # characters of a sweep's name before its hash
_HERE = Path(__file__).resolve().parents[1]  # the package
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # in a wheel, in a checkout


class _Uncopied(dict[str, Any]):
    """Dictionary whose deep copy is itself.

    Hydra copies all registered configs twice in each composition, 30 % of its time, and once more each config
    that it loads: only the last copy is written to.
    """

    def __deepcopy__(self, _memo: object) -> _Uncopied:
        return self


@functools.cache  # a Python process may compose many times
def register() -> None:
    """Register the schema with Hydra, and every torchvision backbone without a file in conf/model."""
    store = ConfigStore.instance()
    store.repo = _Uncopied(store.repo)
    store.store(name="schema", node=Config, provider="hpc_imagenet")
    with_file = {path.stem for path in (CONF / "model").glob("*.yaml")}
    for name in BACKBONES:
        if name not in with_file:
            node = {"name": name, "stem": "auto"}
            store.store(group="model", name=name, node=node, provider="hpc_imagenet")


def register_networks(overrides: Sequence[str]) -> None:
    """Register the networks of timm, and those of the user, that `model=` selects.

    Raises:
        UserError: timm has no such network, or is not installed.
    """
    for line in overrides:
        key, _, value = line.partition("=")
        if key.lstrip("+") == "model":
            for name in re.split(r"[\s,()\[\]'\"]+", value):  # of a sweep too
                # A path is no name of a network; Hydra never ends listing a group with an empty name.
                if (not name.startswith(TIMM) and not is_own(name)) or "" in name.split("/"):
                    continue
                check_name("model", name)
                group, _, choice = f"model/{name}".rpartition("/")
                node = {"name": name, "stem": "auto"}
                ConfigStore.instance().store(group=group, name=choice, node=node, provider="hpc_imagenet")


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
    check_given_once(overrides)
    overrides, _ = resolve_cluster(add_stored_settings(overrides))
    register_networks(overrides)
    overrides = quote_paths(overrides, multirun)
    folders = [folder for folder in config_folders(config_dir) if folder != CONF]
    for folder in folders:
        for path in config_files(folder):
            if path.parent.name == "cluster":
                check_quoted_times(path.read_text(encoding="utf-8", errors="replace"), path)
            if (CONF / path.relative_to(folder)).exists():  # Hydra would silently use the one in conf/
                raise UserError(
                    f"{path} has the same name as a file of conf/, which takes precedence: rename it"
                )
    overrides = [*search_path(folders), *overrides]
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        try:
            parsed = _parse(overrides, loader)
            if algorithm := algorithm_of(parsed):
                composed = search_configs(algorithm, parsed, lambda lines: _one(lines, loader))
            else:
                composed = list(_combinations(parsed, multirun, loader))
        except HydraException as error:
            raise UserError(explain(error)) from None
        except OmegaConfBaseException as error:
            raise UserError(explain_value(error)) from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:  # such as a file that is not YAML
            raise UserError(f"the settings cannot be read: {' '.join(str(error).split())}") from None
    sweep = _sweep_name(parsed)
    for config in composed:  # those of a search have its name
        config.sweep = sweep if config.sweep is None else config.sweep
        check_values(config)
        check_ignored(config.dataset)
    return composed


def search_path(folders: Sequence[Path]) -> list[str]:
    """Return the override that makes Hydra search further folders of config files; none for no folder."""
    urls = [QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders]
    return [f"hydra.searchpath=[{','.join(urls)}]"] if urls else []


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a validated copy of a frozen config with single values changed, such as `session.gpus=4`.

    Raises:
        UserError: an invalid key or value, or a config group, which can only be chosen at submission.
    """
    # Source code goes past OmegaConf, which would resolve a `${…}` in it.
    node = OmegaConf.structured(replace(config, model=replace(config.model, source={})))
    check_given_once(overrides)
    for line in quote_paths(overrides):
        try:
            (override,) = OverridesParser.create().parse_overrides([line])
            key = override.key_or_group
            known = key in setting_names(node) or key.startswith(tuple(f"{name}." for name in OPEN_MAPPINGS))
            if not known:
                raise UserError(unknown_setting(key))
            if override.is_sweep_override() or override.is_delete():
                raise UserError(
                    f"{line}: only single values can be set, such as session.gpus=4 or cluster.partition=gpu"
                )
            if isinstance(OmegaConf.select(node, key), DictConfig):
                raise UserError(
                    f"{line} selects a file of conf/: possible only when a run is first submitted"
                )
            OmegaConf.update(node, key, override.value(), merge=True, force_add=True)
        except OverrideParseException as error:
            raise UserError(explain(error)) from None
        except OmegaConfBaseException as error:
            raise UserError(explain_value(error)) from None
    typed = _typed(node)
    typed.model.source = config.model.source
    check_values(typed)
    return typed


def _parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    groups = {*_ADDED, *loader.list_groups("")}
    for override in parsed:
        swept = override.is_sweep_override() and not isinstance(override.value(), IntervalSweep)
        if swept and next(iter(override.sweep_string_iterator()), None) is None:
            raise UserError(f"{override.input_line} is a sweep without a value: nothing would be submitted")
        if override.key_or_group in groups:
            _check_choice(override)
        # The defaults have no stage, so Hydra requires `+stage=`; `stage=` is accepted too.
        if override.key_or_group in _ADDED and override.type is OverrideType.CHANGE:
            override.type = OverrideType.ADD
            override.input_line = f"+{override.input_line}"
    return parsed


def _check_choice(override: Override) -> None:
    # Of a list Hydra uses each file in turn, so that the last one wins; of a mapping it uses nothing.
    group, line = override.key_or_group, str(override.input_line)
    plus = "+" if group in _ADDED else ""  # the defaults have one file of every other group
    if line.startswith("+") and (CONF / group).is_dir() and not line.startswith(f"{plus}{group}"):
        raise UserError(f"{line} adds a second {group}: write {plus}{line.lstrip('+')}")
    if isinstance(override.value(), IntervalSweep):
        return  # search_space.py names what to write
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    if group == "search" and len(values) > 1:
        raise UserError(f"{line} selects several searches: write one of them, as +search=asha")
    for value in values:
        if isinstance(value, list):
            choices = [str(choice) for choice in value]
            form = instead_of_several(group, choices)
            raise UserError(f"{line} is a list of files of conf/{group}: {form}")
        if value is None or isinstance(value, dict):
            raise UserError(
                f"{line} is no file of conf/{group}: set {group}=NAME, and single values as "
                f"{group}.SETTING=VALUE"
            )


def _combinations(parsed: list[Override], multirun: bool, loader: ConfigLoader) -> Iterator[Config]:
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and not multirun:
        line = str(swept[0].input_line)
        text = f", or quote the text: {quoted_form(line)}" if takes_quotes(swept[0].key_or_group) else ""
        raise UserError(f"{line} is a sweep: add -m (python -m hpc_imagenet -m …){text}")
    groups = set(loader.list_groups("")) if swept else set()
    # Swept plain values are applied to a copy of the composed config.
    copied = {
        override.key_or_group
        for override in swept
        if override.type is OverrideType.CHANGE and override.key_or_group not in groups
    }
    (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    pickled: dict[tuple[str, ...], bytes] = {}  # a copy of it is made 8 times as fast as by `copy.deepcopy`
    values: dict[str, Any] = {}
    for combination in combinations:
        composed = tuple(line for line in combination if line.partition("=")[0] not in copied)
        if composed not in pickled:
            base = hydra_compose("config", overrides=list(composed))
            OmegaConf.update(base, "workspace", _absolute("workspace", base.workspace))
            pickled[composed] = pickle.dumps(base)
        config: DictConfig = pickle.loads(pickled[composed])
        for line in combination:
            key = line.partition("=")[0]
            if key in copied:
                if line not in values:
                    values[line] = OverridesParser.create().parse_override(line).value()
                OmegaConf.update(config, key, values[line], merge=True)
        _fill_unused_dataset(config)
        yield _typed(config)


def _one(overrides: list[Override], loader: ConfigLoader) -> Config:
    (config,) = _combinations(overrides, False, loader)
    check_values(config)
    return config


def _fill_unused_dataset(composed: DictConfig) -> None:
    """Leave the source empty, and name the dataset as the datastore, where only a datastore is read."""
    dataset, datastore = composed.dataset, composed.datastore
    needed = composed.stage.name in DATA_STAGES
    if OmegaConf.is_missing(dataset, "name"):
        if needed or OmegaConf.is_interpolation(datastore, "name"):  # of dataset.name
            raise UserError(_missing_name(composed))
        dataset.name = str(datastore.name).partition("@")[0]
    if not OmegaConf.is_missing(dataset, "source"):
        _absolute("dataset.source", dataset.source)  # an empty one is an error
    elif not needed:
        dataset.source = ""


def _missing_name(composed: DictConfig) -> str:
    source = "" if OmegaConf.is_missing(composed.dataset, "source") else composed.dataset.source
    other = "" if composed.stage.name in DATA_STAGES else ", or datastore.name=NAME of one to train on"
    return f"dataset.name is not set: add dataset.name={name_for(source)}{other}"


def _sweep_name(parsed: Sequence[Override]) -> str | None:
    """Return the swept settings and a hash of all that do not only say where or how to run; None: no sweep.

    The same sweep given again, perhaps with more memory, has the same name.
    """
    parsed = [each for each in parsed if each.key_or_group.partition(".")[0] not in ASIDE]
    swept = [str(each.key_or_group).rpartition(".")[2] for each in parsed if each.is_sweep_override()]
    if not swept:
        return None
    lines = [str(each.input_line) for each in parsed]
    digest = hashlib.sha256(repr(sorted(lines)).encode()).hexdigest()
    return f"{'-'.join(swept)[:_SWEEP_NAME_LENGTH]}-{digest[:6]}"


def _typed(composed: DictConfig) -> Config:
    config = cast(Config, OmegaConf.to_object(composed))
    _check_fields(config)
    # A job runs in another folder: make paths absolute, relative to the folder of the command.
    config.workspace = _absolute("workspace", config.workspace)
    if config.dataset.source or config.stage.name in DATA_STAGES:
        config.dataset.source = _absolute("dataset.source", config.dataset.source)
    if not re.match(r"[^/]+:", config.datastore.url):  # not s3://…, file:…, user@host:… or HOST:…
        config.datastore.url = _absolute("datastore.url", config.datastore.url)
    if config.download.login is not None:
        config.download.login = _absolute("download.login", config.download.login)
    if config.notify is not None and "://" not in config.notify and not is_variable(config.notify):
        config.notify = _absolute("notify", config.notify)
    config.cluster.container = _image(config.cluster.container)
    for own in filter(None, config.cluster.stage.values()):
        if "container" in own:
            own["container"] = _image(own["container"])
    model = config.model
    if model.weights is not None and not is_weights_name(model.name, model.weights):
        path = Path(_absolute("model.weights", model.weights))
        # Another word may be a run, which is found at submission (launch/warm_start.py).
        if "/" in model.weights or path.suffix in _WEIGHT_FILES or path.is_file():
            model.weights = str(path)
    own_network.freeze(model)
    normalise(config)
    return config


def _check_fields(node: Any, prefix: str = "") -> None:
    # Hydra lets `+name=` add fields to a schema and `~name` remove them; both are errors here.
    known = {entry.name for entry in fields(node)}
    for name, value in vars(node).items():
        if name not in known:
            raise UserError(unknown_setting(f"{prefix}{name}"))
        if is_dataclass(value):
            _check_fields(value, f"{prefix}{name}.")
    for name in known:
        if getattr(node, name) == MISSING:
            raise UserError(f"{prefix}{name} is not set: add {prefix}{name}=VALUE")


def _image(container: Any) -> Any:
    """Return a cluster.container, absolute if it is a path; it may be a name that the runtime knows."""
    is_path = isinstance(container, str) and container.startswith(("~", "."))
    return _absolute("cluster.container", container) if is_path else container


def _absolute(setting: str, path: str) -> str:
    if not path:
        raise UserError(f"{setting} is empty: set a folder, such as . for the current one")
    is_url = "://" in path or path.startswith("file:")
    if is_url:
        return path
    return str(expand_home(path).absolute())
