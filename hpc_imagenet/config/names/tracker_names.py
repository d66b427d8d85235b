"""Trackers of trainings by name, and the package that each needs."""

from __future__ import annotations

import importlib.util
from typing import Any

from hpc_imagenet.errors import UserError, did_you_mean

# The module that a tracker imports; the extra of pyproject.toml has the tracker's name.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def parse_trackers(value: Any) -> list[str]:
    """Return the names in `tracker`: one, or a list of several; an empty list for null.

    Raises:
        ValueError: an unknown name, or another type.
    """
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"is not a name or a list of names: {', '.join(TRACKERS)}")
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"is unknown{did_you_mean(name, TRACKERS)}")
    return list(dict.fromkeys(names))


def check_installed(tracker: Any) -> None:
    """Check that the packages of trackers are installed here.

    Raises:
        UserError: names the extra to install.
    """
    for name in parse_trackers(tracker):
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise UserError(
                f"tracker={name} needs the package {TRACKERS[name]}: "
                f"pip install -c constraints.txt -e '.[{name}]'"
            )
