"""The settings of a frozen config by their full names, as text that can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any


def config_leaves(frozen: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield full name and value of each setting; of the source of a user's network lines and hash alone."""
    for key, value in frozen.items():
        if key == "source" and isinstance(value, dict):
            for name, text in value.items():
                yield (
                    f"{prefix}source {name}",
                    f"{len(str(text).splitlines())} lines, {short_hash(str(text))}",
                )
        elif isinstance(value, dict) and value:
            yield from config_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def short_hash(text: str) -> str:
    """Return the first 12 digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
