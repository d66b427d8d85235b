"""README.md and docs/: what they name exists, what they draw is so."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_docs import BLOCK, PAGES, ROOT, commands

from hpc_imagenet import config as schema


def test_notebooks_are_those_of_their_scripts() -> None:
    make: typing.Any = runpy.run_path(str(ROOT / "notebooks/make.py"))
    assert make["scripts"]()
    for script in make["scripts"]():
        written = script.with_suffix(".ipynb").read_text()
        assert written == make["notebook"](script.read_text()), "python notebooks/make.py makes it anew"


def test_the_readme_begins_with_the_two_commands() -> None:
    assert commands(ROOT / "README.md")[:2] == ["make demo", "make test"]
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def settings_of(node: type, prefix: str = "") -> Iterator[str]:
    types = typing.get_type_hints(node)
    for field in dataclasses.fields(node):
        name = f"{prefix}{field.name}"
        yield name
        if dataclasses.is_dataclass(types[field.name]):
            yield from settings_of(types[field.name], f"{name}.")


SETTINGS = set(settings_of(schema.Config))
FILES = (".py", ".yaml", ".json", ".npy", ".bin", ".csv", ".ckpt", ".sbatch", ".tar", ".md")


def exists(name: str) -> bool:
    if name.startswith("dataset.archives."):
        split, _, rest = name.removeprefix("dataset.archives.").partition(".")
        fields = {field.name for field in dataclasses.fields(schema.Archive)}
        return split in ("train", "val", "devkit") and (not rest or rest in fields)
    if name.startswith("cluster.stage."):
        stage, _, rest = name.removeprefix("cluster.stage.").partition(".")
        return stage in schema.STAGES and (not rest or f"cluster.{rest}" in SETTINGS)
    return name in SETTINGS or any(name.startswith(f"{free}.") for free in schema.FREE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_in_backticks_exists(page: Path) -> None:
    roots = {name for name in SETTINGS if "." not in name}
    for quoted in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())):
        for word in quoted.split():
            name, equals, _ = word.lstrip("+").partition("=")
            dotted = "." in name and name.partition(".")[0] in roots and not name.endswith(FILES)
            if re.fullmatch(r"[a-z_]+(\.\w+)*", name) and (equals or dotted):
                assert exists(name), f"{page.name}: {quoted} is no setting"


def rooms() -> dict[str, set[str]]:
    """Return who imports whom in the package, imports within functions as well; packages count as one."""
    package = ROOT / "hpc_imagenet"
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        known = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "hpc_imagenet":
                known |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hpc_imagenet."):
                known.add((node.module or "").split(".")[1])
            elif isinstance(node, ast.Import):
                known |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hpc_imagenet.")}
    everybodys = {"errors", "durable", "temporary", "__version__"}
    assert not any(found[room] - everybodys for room in everybodys & found.keys())
    return {room: known - everybodys - {room} for room, known in found.items() if room not in everybodys}


def test_the_rooms_know_whom_the_page_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\|$", page, re.MULTILINE)
    drawn = {room: set(re.findall(r"`(\w+)`", known)) for room, known in rows}
    assert drawn == rooms()
    order = list(drawn)
    for room, known in drawn.items():  # each stands below all that it knows: nothing points back
        assert all(order.index(other) < order.index(room) for other in known), room
