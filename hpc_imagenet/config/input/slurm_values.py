"""Values in Slurm's own notation: times, memory and typed GPUs, as sbatch takes them.

Source: the manual of sbatch, options --time, --mem and --gpus-per-node.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from hpc_imagenet.errors import UserError

_TIME_FORMS = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"
# days-hours[:minutes[:seconds]], hours:minutes:seconds or minutes[:seconds]
_TIME = re.compile(
    r"(?P<days>\d+)-(?P<dhours>\d+)(?::(?P<dminutes>\d+))?(?::(?P<dseconds>\d+))?"
    r"|(?:(?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+)(?::(?P<seconds>\d+))?"
)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?", re.IGNORECASE)
_GIB = {"K": 1 / 1024**2, "M": 1 / 1024, "G": 1.0, "T": 1024.0}
_GPUS = re.compile(r"(?:(?P<type>[A-Za-z][A-Za-z0-9_.-]*):)?(?P<count>\d+)")


def parse_minutes(value: Any) -> int:
    """Return a time limit in minutes, rounded up as Slurm does.

    Raises:
        ValueError: not one of Slurm's notations; the message names them.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0:  # not of inf, nan
        return int(value)
    found = _TIME.fullmatch(str(value).strip())
    if found is None:
        raise ValueError(f"is not a time: {_TIME_FORMS}")
    part = {name: int(text or 0) for name, text in found.groupdict().items()}
    hours = 24 * part["days"] + part["dhours"] + part["hours"]
    minutes = 60 * hours + part["dminutes"] + part["minutes"]
    return minutes + math.ceil((part["dseconds"] + part["seconds"]) / 60)


def check_quoted_times(text: str, path: Path) -> None:
    """Check that a file of settings quotes times such as 24:00:00, which YAML 1.1 reads as 86400.

    Args:
        text: content of the file.
        path: its path, for the error.

    Raises:
        UserError: names the line to change.
    """
    for number, line in enumerate(text.splitlines(), 1):
        found = re.search(r"\btime:\s*([1-9]\d*(?::[0-5]?\d)+)\s*(?:[,}#]|$)", line.partition(" #")[0])
        if found and isinstance(value := yaml.safe_load(found[1]), int):
            raise UserError(
                f"{path}, line {number}: YAML reads time: {found[1]} as {value}: put it in quotes, "
                f'"{found[1]}"'
            )


def parse_gib(value: Any) -> float:
    """Return an amount of memory in GiB; a plain number is GiB, and K, M, G, T are Slurm's powers of 1024.

    Raises:
        ValueError: neither a number nor a number with such a unit.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    text = str(value).strip()
    if found := _MEMORY.fullmatch(text):
        return float(found[1]) * _GIB[found[2].upper()]
    try:
        return float(text)
    except ValueError:
        raise ValueError("is not an amount of memory: GiB, or with a unit, such as 64G or 512M") from None


def parse_gpus(value: Any) -> int:
    """Return the number of GPUs in `COUNT` or `TYPE:COUNT`.

    Raises:
        ValueError: neither of the two.
    """
    found = None if isinstance(value, bool) else _GPUS.fullmatch(str(value).strip())
    if found is None:
        raise ValueError("is not a number of GPUs: COUNT or TYPE:COUNT, such as 4 or a100:4")
    return int(found["count"])


def gpu_type(value: Any) -> str | None:
    """Return the type in `TYPE:COUNT`; None for anything else."""
    found = _GPUS.fullmatch(str(value).strip())
    return found["type"] if found else None
