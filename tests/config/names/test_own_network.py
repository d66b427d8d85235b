"""A user's own network: found without running it, checked, and frozen with what it imports."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from hpc_imagenet.config.compose import compose, with_overrides
from hpc_imagenet.config.names import own_network
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.stages.train_stage import TRAIN

FACTORY = """
from torch import nn

def build(num_classes, width=8, *, bias=True):
    return nn.Linear(width, num_classes)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def composed(*overrides: str) -> Config:
    return compose(["dataset=digits", "recipe=demo", "cluster=local", *overrides])[0]


@pytest.mark.slow
def test_the_file_is_frozen_and_its_hash_is_in_the_signature(folder: Path) -> None:
    write(folder, {"mine.py": FACTORY, "other.py": "raise SystemExit"})
    first = composed("model=mine:build")
    assert first.model.source == {"mine.py": FACTORY}
    assert TRAIN.run_id(first).endswith("-mine-build")
    same = composed("model=mine:build", "cluster.time=5")
    assert TRAIN.signature(same) == TRAIN.signature(first)
    write(folder, {"mine.py": FACTORY + "# changed\n"})
    assert TRAIN.signature(composed("model=mine:build")) != TRAIN.signature(first)
    assert with_overrides(first, ["cluster.time=5"]).model == first.model  # frozen stays frozen


@pytest.mark.slow
def test_any_text_survives_the_frozen_config(folder: Path) -> None:
    text = FACTORY + "TEXT = '${nothing} ${oc.env:HOME} \\${a} \u2028 é 模型\t'  # :\r\n# {}\n"
    Path("mine.py").write_bytes(text.encode())
    config = composed("model=mine:build")
    run = RunStore(folder).create("abc-train", asdict(config), {})
    assert run.config().model.source == {"mine.py": text.replace("\r\n", "\n")}
    assert with_overrides(run.config(), ["cluster.time=5"]).model == config.model


@pytest.mark.slow
def test_a_byte_order_mark_is_no_text(folder: Path) -> None:
    Path("mine.py").write_text(FACTORY, encoding="utf-8-sig")  # as editors of Windows save it
    assert composed("model=mine:build").model.source == {"mine.py": FACTORY}


@pytest.mark.slow
def test_files_that_it_imports_are_frozen_too(folder: Path) -> None:
    write(
        folder,
        {
            "pkg/__init__.py": "VERSION = 1\n",
            "pkg/nets.py": "from . import blocks\nfrom .sub.deep import Deep\nimport torch\n" + FACTORY,
            "pkg/blocks.py": "import shared\n",
            "pkg/sub/deep.py": "class Deep: pass\n",  # a namespace package
            "pkg/unused.py": "",
            "shared.py": "def lazily():\n    import late\n",
            "late.py": "",
            "apart.py": "",
        },
    )
    frozen = composed("model=pkg.nets:build").model.source
    assert set(frozen) == {
        *("pkg/__init__.py", "pkg/nets.py", "pkg/blocks.py", "pkg/sub/deep.py", "shared.py", "late.py")
    }


@pytest.mark.slow
def test_an_installed_package_is_identified_by_its_hash(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = folder / "elsewhere" / "site-packages"
    write(site, {"installed_nets.py": FACTORY})
    monkeypatch.syspath_prepend(site)
    model = composed("model=installed_nets:build").model
    assert model.source == {}
    assert model.source_hash == own_network.file_hash(site / "installed_nets.py")


@pytest.mark.slow
def test_a_package_of_a_folder_on_the_path_is_frozen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        folder / "project", {"editable_nets.py": "import editable_part\n" + FACTORY, "editable_part.py": ""}
    )
    monkeypatch.syspath_prepend(folder / "project")
    assert set(composed("model=editable_nets:build").model.source) == {"editable_nets.py", "editable_part.py"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (FACTORY, ["model=mine:biuld"], "mine.py has no biuld; did you mean: build"),
        (FACTORY, ["model=yours:build"], "no module yours in the current folder .*submit from the folder"),
        (FACTORY, ["+model.options.wdith=1"], "takes no wdith; its options: bias, width"),
        ("def build(classes): pass", [], r"line 1: .*build\(num_classes=…, .* and takes no num_classes$"),
        ("def build(num_classes, depth): pass", [], r"needs depth: add \+model.options.depth=VALUE"),
        ("class build:\n  def __init__(self, n): pass", [], "mine.py line 2: .*takes no num_classes"),
        ("def build(num_classes)\n  pass", [], "mine.py line 1 is not Python: "),
        ("import no_such_module\n" + FACTORY, [], "mine.py line 1 imports no_such_module, which is neither"),
        ("from mine.part import a\n" + FACTORY, [], "mine.py line 1 imports mine.part"),
        ("from .part import a\n" + FACTORY, [], "mine.py line 1 imports .part, which is neither"),
        (
            FACTORY,
            ["model=./nets/mine.py:build"],
            "not of the form my.package:factory: write nets.mine:build",
        ),
        (FACTORY, ["model=hf-hub:timm/resnet18"], "not of the form my.package:factory: write timm/resnet18"),
        (FACTORY, ["model=my-nets:build"], "my-nets:build is not of the form my.package:factory"),
        ("x" * 2_000_000, ["model=mine:x"], "mine.py has no x"),
        (f"TEXT = {'x' * 2_000_000!r}\n" + FACTORY, [], "imports more than 1 MiB of source"),
    ],
)
def test_errors_are_one_line_before_anything_is_submitted(
    folder: Path, text: str, overrides: list[str], message: str
) -> None:
    write(folder, {"mine.py": text})
    chosen = [] if any(line.startswith("model=") for line in overrides) else ["model=mine:build"]
    with pytest.raises(UserError, match=f"^model.name=.*{message}"):
        composed(*chosen, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "from torchvision.models import resnet18 as build",
        "from functools import partial\nbuild = partial(print)",
        "try:\n  import no_such_module\nexcept ImportError:\n  pass\n" + FACTORY,
        "from torchvision.models import *",
        "def __getattr__(name): pass",
        "def build(**options): pass",
        "class build(dict): pass",
        "if True:\n  def build(num_classes): pass",
        "import functools\n@functools.cache\ndef build(n): pass",
    ],
)
def test_what_only_running_shows_is_left_to_the_job(folder: Path, text: str) -> None:
    write(folder, {"mine.py": text})
    assert composed("model=mine:build").model.source


def test_names_of_another_form_are_refused() -> None:
    for name in ("a-b:c", "a:", ":c", "a:b:c"):
        with pytest.raises(UserError, match=r"is not of the form my.package:factory"):
            own_network.split_name(name)


@pytest.mark.slow
def test_nothing_is_imported(folder: Path) -> None:
    write(folder, {"loud.py": "raise SystemExit('imported')\n" + FACTORY})
    assert composed("model=loud:build").model.source_hash
    assert "loud" not in sys.modules
