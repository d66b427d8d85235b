"""constraints.txt and container/*.txt: all packages are pinned, and those of the images have hashes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
IMAGE_EXTRAS = re.findall(r"^IMAGE_EXTRAS = (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
HASHED = ["container/build-requirements.txt", "container/requirements.txt"]


def pins(file: str) -> Iterator[Requirement]:
    """Yield the requirements of a file, without their hashes."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        requirement = line.partition("#")[0].partition(" --hash")[0].strip()
        if requirement:
            yield Requirement(requirement)


def pinned_here(file: str) -> dict[str, str]:
    """Return name -> version specifier of what a file pins for this Python and platform."""
    here = [pin for pin in pins(file) if pin.marker is None or pin.marker.evaluate()]
    versions: dict[str, str] = {canonicalize_name(pin.name): str(pin.specifier) for pin in here}
    assert len(versions) == len(here), "a package is pinned twice for this Python"
    return versions


def installed(name: str, extras: set[str]) -> set[str]:
    """Return the names of all that a package with extras requires here, directly or not."""
    found: set[tuple[str, str]] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    while waiting:
        package, extra = waiting.pop()
        for line in distribution(package).requires or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                continue
            new = {(canonicalize_name(needed.name), more) for more in ("", *needed.extras)} - found
            found |= new
            waiting += new
    return {package for package, _ in found} - {canonicalize_name(name)}


@pytest.mark.parametrize("extra", ["test", "lint"])
def test_everything_that_is_installed_is_pinned(extra: str) -> None:
    try:
        names = installed("hpc-imagenet", {extra})
    except PackageNotFoundError as missing:
        if extra == "test":
            raise
        pytest.skip(f"{missing.name} is not installed: make lint")
    assert names <= pinned_here("constraints.txt").keys()


def test_hashes_cover_what_the_images_install() -> None:
    assert installed("hpc-imagenet", set(IMAGE_EXTRAS)) <= pinned_here("container/requirements.txt").keys()
    assert installed("hatchling", set()) | {"hatchling", "setuptools"} <= pinned_here(HASHED[0]).keys()


@pytest.mark.parametrize("file", HASHED)
def test_hashed_versions_are_those_of_the_constraints(file: str) -> None:
    hashed, constraints = pinned_here(file), pinned_here("constraints.txt")
    assert hashed == {name: constraints[name] for name in hashed}, "run `make hashes`"
    all_constraints = {(canonicalize_name(pin.name), str(pin.specifier)) for pin in pins("constraints.txt")}
    assert {(canonicalize_name(pin.name), str(pin.specifier)) for pin in pins(file)} <= all_constraints


@pytest.mark.parametrize("file", HASHED)
def test_each_package_has_hashes(file: str) -> None:
    text = (ROOT / file).read_text()
    for entry in re.findall(r"^[^#\s].*(?:\n\s.+)*", text, re.MULTILINE):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry
    assert len(re.findall(r"^[^#\s]", text, re.MULTILINE)) == len(list(pins(file)))
