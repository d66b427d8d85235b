"""Imports of optional packages and the configuration of mypy, which `make lint` runs without the extras."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def imported(folder: Path) -> set[str]:
    """Names of all packages that the Python files of a folder import."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    return names


def required(distribution: str) -> Iterator[str]:
    """Names of the distributions that one requires without its extras."""
    for line in requires(distribution) or ():
        requirement = Requirement(line)
        if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


@pytest.mark.slow
def test_mypy_needs_no_optional_package() -> None:
    installed, names = set(required("hpc-imagenet")), packages_distributions()
    optional = {
        name
        for name in imported(ROOT / "hpc_imagenet") - set(sys.stdlib_module_names) - {"hpc_imagenet"}
        if not installed & {canonicalize_name(distribution) for distribution in names.get(name, ())}
    }
    assert "optuna" in optional
    skipped = re.findall(r'"(\w+)\.\*"', (ROOT / "pyproject.toml").read_text())
    assert sorted(optional - set(skipped)) == []
