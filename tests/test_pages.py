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
from docs_reader import BLOCK, PAGES, ROOT, commands

from hpc_imagenet.config import dataset, schema, settings_page


@pytest.mark.slow
def test_notebooks_are_those_of_their_scripts() -> None:
    make: typing.Any = runpy.run_path(str(ROOT / "notebooks/make.py"))
    assert make["scripts"]()
    for script in make["scripts"]():
        written = script.with_suffix(".ipynb").read_text()
        assert written == make["notebook"](script.read_text()), "python notebooks/make.py makes it anew"


def test_the_readme_begins_with_the_two_commands() -> None:
    assert commands(ROOT / "README.md")[:2] == ["make demo", "make test"]
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


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
        fields = {field.name for field in dataclasses.fields(dataset.Archive)}
        return split in ("train", "val", "devkit") and (not rest or rest in fields)
    if name.startswith("cluster.stage."):
        stage, _, rest = name.removeprefix("cluster.stage.").partition(".")
        return stage in schema.STAGES and (not rest or f"cluster.{rest}" in SETTINGS)
    return name in SETTINGS or any(name.startswith(f"{free}.") for free in schema.OPEN_MAPPINGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_in_backticks_exists(page: Path) -> None:
    roots = {name for name in SETTINGS if "." not in name}
    for quoted in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())):
        for word in quoted.split():
            name, equals, _ = word.lstrip("+").partition("=")
            dotted = "." in name and name.partition(".")[0] in roots and not name.endswith(FILES)
            if re.fullmatch(r"[a-z_]+(\.\w+)*", name) and (equals or dotted):
                assert exists(name), f"{page.name}: {quoted} is an unknown setting"


PACKAGE = ROOT / "hpc_imagenet"
# Each package may import those before it, and nothing that comes after it.
LAYERS = [
    *(
        "errors",
        "io",
        "config",
        "runs",
        "cluster",
        "datastore",
        "data",
        "training",
        "session",
        "search",
        "stages",
    ),
    *("launch", "report", "doctor", "remote", "cli", "api", "demo"),
]
# Heavy or special packages, and the only places that may import each.
HOMES: dict[str, str | tuple[str, ...]] = {
    "torch": ("training/", "data/images/resize.py"),
    "torchvision": "training/",
    "torchmetrics": "training/",
    "pytorch_lightning": "training/",
    "timm": "training/",
    "huggingface_hub": "training/",
    "safetensors": "training/",
    "simplejpeg": "training/loading/",
    "boto3": "datastore/backends/",
    "sh": "datastore/backends/ssh_connection.py",
    "submitit": "launch/",
    "bokeh": "report/html/page.py",
    "pynvml": "cluster/gpu_meter.py",
    "apprise": "launch/tasks/notification.py",
    "wandb": "training/trackers.py",
    "mlflow": "training/trackers.py",
    "trackio": "training/trackers.py",
    "pyarrow": "data/sources/parquet_source.py",
    "cryptography": "session/connection.py",
    "optuna": "search/study.py",
}


def imports() -> Iterator[tuple[str, str]]:
    """Yield (file within the package, module that it imports), imports within functions as well."""
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "hpc_imagenet":
                yield from ((name, f"hpc_imagenet.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield name, node.module
            elif isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)


@pytest.mark.slow
def test_packages_import_only_the_layers_below_them() -> None:
    for name, module in imports():
        package = name.removesuffix(".py").partition("/")[0]
        root, _, inner = module.partition(".")
        other = inner.partition(".")[0]
        if root == "hpc_imagenet" and other in LAYERS and package in LAYERS and other != package:
            assert LAYERS.index(other) < LAYERS.index(package), f"{name} imports {module}"
        assert package in (*LAYERS, "__init__", "__main__"), f"{name}: give {package} a layer"


@pytest.mark.slow
def test_heavy_packages_are_imported_in_one_place() -> None:
    for name, module in imports():
        home = HOMES.get(module.partition(".")[0])
        assert home is None or name.startswith(home), f"{name} imports {module}"


def test_the_settings_page_is_up_to_date() -> None:
    written = (ROOT / "docs/settings.md").read_text()
    assert written == settings_page.page(), "python -m hpc_imagenet.config.settings_page > docs/settings.md"


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in settings_page.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 90
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.slow
def test_no_public_class_or_module_name_occurs_twice() -> None:
    classes: dict[str, list[str]] = {}
    modules: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in ("__init__", "__main__") and "stages" not in path.parts:  # named as what they do
            modules.setdefault(path.stem, []).append(str(path))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes.setdefault(node.name, []).append(str(path))
    assert {name: paths for name, paths in (classes | modules).items() if len(paths) > 1} == {}
