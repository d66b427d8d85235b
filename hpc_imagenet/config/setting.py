"""Declare a setting: its default, meaning, unit, choices and bounds at the dataclass field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from hpc_imagenet.errors import UserError, did_you_mean

MISSING: Any = "???"  # omegaconf.MISSING, without its import, which `jobs` does not need otherwise


def setting(
    default: Any = MISSING,
    meaning: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a dataclass field that documents and bounds a setting.

    Args:
        default: value if neither conf/ nor the command line sets one; MISSING: one of them must.
        meaning: one line with the unit, shown in docs/settings.md.
        factory: makes the default of a mapping or list.
        choices: valid values.
        minimum: lowest valid value.
        maximum: highest valid value.
        above: exclusive lower bound.
        parse: converts another notation of the value, such as Slurm's; raises ValueError with what is wrong.
            The field is of type Any, and composition converts it (`normalise.py`).
    """
    metadata = {
        "meaning": meaning,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "parse": parse,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def is_variable(name: str) -> bool:
    """Whether a value names an environment variable, rather than a path: NOTIFY_URL."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]*", name) is not None


def settings_of(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield (full name, field, value) of every setting of a config, nested ones as `group.name`."""
    for entry in fields(node):
        name, value = f"{prefix}{entry.name}", getattr(node, entry.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{name}.")
        else:
            yield name, entry, value


def parse_value(name: str, entry: Field[Any], value: Any) -> Any:
    """Return a value converted by the `parse` of its field; None stays None.

    Raises:
        UserError: names the setting and the notations that are valid.
    """
    parse = entry.metadata.get("parse") if value is not None else None
    if parse is None:
        return value
    try:
        return parse(value)
    except ValueError as error:
        raise UserError(f"{name}={value} {error}") from None


def check_bounds(name: str, entry: Field[Any], value: Any) -> None:
    """Check one value against the choices and bounds of its field; None is always valid.

    Raises:
        UserError: names the setting and its valid values.
    """
    if isinstance(value, float) and not math.isfinite(value):  # it would pass every comparison below
        raise UserError(f"{name}={value} is not a finite number")
    limits = entry.metadata
    if value is None or not limits:
        return
    choices, minimum, maximum, above = (limits[key] for key in ("choices", "minimum", "maximum", "above"))
    if choices and value not in choices:
        raise UserError(f"{name}={value} is unknown{did_you_mean(value, choices)}")
    if maximum is not None and not minimum <= value <= maximum:
        raise UserError(f"{name}={value} is not between {minimum} and {maximum}")
    if minimum is not None and value < minimum:
        raise UserError(f"{name}={value} is too small: at least {minimum}")
    if above is not None and value <= above:
        raise UserError(f"{name}={value} must be more than {above}")
