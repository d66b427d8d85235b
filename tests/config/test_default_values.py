"""Defaults of all settings, with which `show` compares."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.default_values import default_values


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


@pytest.mark.slow
def test_they_are_those_of_a_command_without_settings() -> None:
    (config,) = compose(["cluster=local", "workspace=/w", "session.name=me"])
    composed, found = leaves(asdict(config)), leaves(default_values())
    different = {name for name, value in found.items() if value != composed[name]}
    made_of_others = {"workspace", "session.name", "datastore.name", "datastore.url"}
    assert different <= {*made_of_others, "tracker", "dataset.hint"}
    assert composed.keys() - found.keys() == {"cluster.executor", "dataset.archives.devkit.bytes"}
