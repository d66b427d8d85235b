"""Data of reports as JSON, which has no NaN: the loss of a training that diverged becomes null."""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any) -> str:
    """Return a value as JSON, with null for numbers that are not finite.

    A list has one line per item, anything else is indented: indenting takes seconds for 10,000 runs.
    """
    try:
        if isinstance(value, list):
            lines = [json.dumps(item, allow_nan=False) for item in value]
            return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"
        return json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        return json_text(finite(value))


def finite(value: Any) -> Any:
    """Return a value of mappings and sequences with None for each number that is not finite."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
