"""Values that settings have if nothing is typed: the schema, conf/config.yaml and the groups it chooses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml
from omegaconf import MISSING

from hpc_imagenet.config.compose import CONF
from hpc_imagenet.config.schema import Config


def default_values() -> dict[str, Any]:
    """Return the default of each setting, nested as a frozen config is.

    Settings that nothing sets are left out, such as `cluster.executor`, which depends on the machine. Values
    that are made of other settings are as written: `${dataset.name}`.
    """
    values = asdict(Config())
    own = yaml.safe_load((CONF / "config.yaml").read_text())
    for choice in own.pop("defaults"):
        for group, name in choice.items() if isinstance(choice, dict) else ():
            path = CONF / group / f"{name}.yaml"
            if path.is_file():
                file = yaml.safe_load(path.read_text())
                # The file of a dataset has several groups.
                _merge(values, file if group in file else {group: file})
    _merge(values, {name: value for name, value in own.items() if name != "hydra"})
    return _without_missing(values)


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _without_missing(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_missing(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != MISSING
    }
