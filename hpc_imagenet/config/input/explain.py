"""Explain the errors of Hydra and OmegaConf in one line, with what to type instead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from hpc_imagenet.config.input.overrides import key_of, quoted_form, takes_quotes
from hpc_imagenet.config.input.suggestions import similar_settings
from hpc_imagenet.config.input.typed_values import explain_omegaconf_error
from hpc_imagenet.config.names.backbones import suggest
from hpc_imagenet.config.schema import OPEN_MAPPINGS, Config
from hpc_imagenet.errors import did_you_mean


def explain(error: HydraException) -> str:
    """Return a Hydra error as one line."""
    cause = error.__cause__ or error.__context__  # of a file, Hydra does not name it as the cause
    file = re.match(r"In '([^']+/[^']+)'", str(error))  # of a group
    where = f"{file[1]}.yaml: " if file else ""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).partition("/")
        if group == "dataset" and "/" in choice:
            return _path_as_dataset(choice)
        options = tuple(error.options or ())
        if group == "datastore":
            kinds = ", ".join(options)
            return f"datastore={choice} is unknown; one of: {kinds}; a name is datastore.name={choice}"
        near = suggest(choice, options) if group == "model" else did_you_mean(choice, options)
        return f"{where}{group}={choice} is unknown{near}"
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error)
    if unknown := re.match(r"Could not override '([^'@]+)'", str(error)):
        return unknown_setting(unknown.group(1))
    if known := re.match(r"Could not append to config. An item is already at '([^']+)'", str(error)):
        return f"{known.group(1)} is set already: write {known.group(1)}=VALUE, without +"
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return where + explain_value(cause)
    return " ".join(str(error).split())


def _path_as_dataset(path: str) -> str:
    return (
        f"dataset={path} is no file of conf/dataset: write dataset=images dataset.name={name_for(path)} "
        f"{shlex.quote(f'dataset.source={path}')}"
    )


def name_for(path: str) -> str:
    """Return a name for a dataset from the last part of its path; NAME for a URL, which may hold a secret."""
    if "://" in path:
        return "NAME"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.rstrip("/").rpartition("/")[2]).strip("-._") or "NAME"


def _explain_syntax(error: OverrideParseException) -> str:
    key = key_of(error.override) or error.override
    if key == "dataset" and "/" in error.override:
        return _path_as_dataset(error.override.partition("=")[2])
    if error.override.endswith(","):
        return f"{error.override} ends with a comma: write the values without spaces, or remove it"
    if takes_quotes(key):
        form = quoted_form(error.override)
        return f"cannot parse {error.override}: quote the text for Hydra as well: {form}"
    if key not in _all_settings() and not key.startswith(OPEN_MAPPINGS):
        return unknown_setting(key)
    return f"cannot parse {error.override}: {str(error).splitlines()[0]}"


def explain_value(error: OmegaConfBaseException) -> str:
    """Return an OmegaConf error as one line."""
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and "not in" in str(error):
        return unknown_setting(str(error.full_key))
    return explain_omegaconf_error(error)


def unknown_setting(key: str) -> str:
    """Return the error of an unknown setting, with the settings that may be meant."""
    for mapping in OPEN_MAPPINGS:
        if key == mapping:
            return f"{key} takes new keys with a plus: +{key}={{…}}"
        if key.startswith(f"{mapping}."):
            return f"{key} is a new key of {mapping}: write +{key}=VALUE"
    return f"{key} is an unknown setting{did_you_mean_setting(key)}"


def did_you_mean_setting(key: str) -> str:
    """Return `; did you mean: …` with the settings that an unknown name may mean; may be empty."""
    return similar_settings(key, _all_settings(), OPEN_MAPPINGS)


def _all_settings() -> list[str]:
    return list(setting_names(OmegaConf.structured(Config)))


def setting_names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the full names of all settings and groups of a config."""
    for key in map(str, node):
        name = f"{prefix}{key}"
        yield name
        if not OmegaConf.is_missing(node, key) and isinstance(child := node[key], DictConfig):
            yield from setting_names(child, f"{name}.")
