"""A user's own network: built from the source in the config, whatever is on disk now."""

from __future__ import annotations

import inspect
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import new_run, train

from hpc_imagenet.config.names import own_network
from hpc_imagenet.config.schema import Config, from_dict
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.models.networks import build_network

NETWORK = """
from torch import nn
from own_parts.head import Head

class Own(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(
            nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            Head(width, num_classes),
        )

    def forward(self, images):
        import own_late
        return own_late.double(super().forward(images))
"""
HEAD = "from torch import nn\n\nclass Head(nn.Linear):\n    pass\n"
LATE = "def double(logits):\n    return 2 * logits\n"


@pytest.fixture
def freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any) -> Any:
    """Return a function that writes the files of a network and composes its frozen config."""
    monkeypatch.chdir(tmp_path)

    def frozen(text: str = NETWORK, name: str = "own_net:Own", **model: Any) -> Config:
        Path("own_parts").mkdir(exist_ok=True)
        files = {"own_net.py": text, "own_parts/head.py": HEAD, "own_late.py": LATE}
        for file, content in files.items():
            Path(file).write_text(content)
        settings: Config = config()
        settings.model = replace(settings.model, name=name, **model)
        own_network.freeze(settings.model)
        return from_dict(asdict(settings))  # as the job reads it from config.yaml

    return frozen


@pytest.mark.slow
def test_later_edits_change_nothing(freeze: Any) -> None:
    settings = freeze(options={"width": 6})
    for file in ("own_net.py", "own_late.py", "own_parts/head.py"):
        Path(file).write_text("raise SystemExit('edited')")
    network = build_network(settings, 10, fresh=True)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert network[0].out_channels == 6
    assert inspect.getsource(type(network)).startswith("class Own")
    # A second build takes the same classes; other sources of the same name take their place.
    assert type(build_network(settings, 10, fresh=True)) is type(network)
    other = build_network(freeze(NETWORK.replace("3, 2", "5, 2"), options={}), 10, fresh=True)
    assert other[0].kernel_size == (5, 5)


@pytest.mark.slow
def test_the_frozen_source_replaces_an_imported_module(freeze: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = freeze()
    monkeypatch.syspath_prepend(Path.cwd())
    Path("own_late.py").write_text("def double(logits):\n    raise SystemExit('edited')")
    sys.modules.pop("own_late", None)
    __import__("own_late")
    assert build_network(settings, 10, fresh=True)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_an_installed_network_must_be_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    file = tmp_path / "site-packages" / "own_installed.py"
    file.parent.mkdir()
    file.write_text(NETWORK.replace("from own_parts.head import Head", HEAD).replace("own_late.double", ""))
    file.write_text(file.read_text().replace("        import own_late\n", ""))
    monkeypatch.syspath_prepend(file.parent)
    settings: Config = config()
    settings.model = replace(settings.model, name="own_installed:Own")
    own_network.freeze(settings.model)
    assert build_network(settings, 10, fresh=True)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(UserError, match=r"own_installed.py has changed since this run was submitted: submit"):
        build_network(settings, 10, fresh=True)


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("import no_such_module if False else", {}, None),
        ("def Own(num_classes):\n    return 3", {}, "returns int instead of a torch.nn.Module$"),
        (
            "def Own(num_classes):\n    return 1 / 0",
            {},
            r"cannot be built: ZeroDivisionError: .*own_net.py line 2\)$",
        ),
        ("Own = None", {}, "cannot be built: TypeError"),
        (
            "raise KeyError('x')\ndef Own(num_classes): pass",
            {},
            r"cannot be built: KeyError: 'x' \(own_net.py line 1",
        ),
        (
            NETWORK,
            {"stem": "small"},
            "^model.stem=small is for networks of torchvision and timm, not for own_net",
        ),
        (
            "from torch import nn\ndef Own(num_classes):\n    return nn.Flatten()",
            {},
            r"with recipe.size=16: for 2 images the network returns \[2, 768\] instead of \[2, 10\]",
        ),
        (
            "from torch import nn\ndef Own(num_classes):\n    return nn.Linear(5, num_classes)",
            {},
            "with recipe.size=16: the forward pass fails: RuntimeError: ",
        ),
        (
            "from torch import nn\nclass Own(nn.Module):\n"
            "    def __init__(self, num_classes): super().__init__()\n"
            "    def forward(self, images): return [images]",
            {},
            "in evaluation the network returns list instead of a tensor",
        ),
    ],
)
def test_what_fails_is_one_line(
    text: str, model: dict[str, Any], message: str | None, freeze: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if message is None:
        with pytest.raises(UserError, match=r"^model.name=own_net:Own: own_net.py line 1 is not Python"):
            freeze(text, **model)
        return
    with pytest.raises(UserError, match=message) as caught:
        build_network(freeze(text, **model), 10, fresh=True)
    assert "\n" not in str(caught.value)


def test_the_traceback_of_a_users_error_is_in_the_log(
    freeze: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        build_network(freeze("def Own(num_classes):\n    return 1 / 0  # here"), 10, fresh=True)
    assert "return 1 / 0  # here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_of_an_own_network_resumes_after_edits(freeze: Any, tiny: Any, tmp_path: Path) -> None:
    settings = freeze(options={"width": 6})
    run = new_run(tmp_path / "run")
    result = train(settings, tiny, run)
    assert result["parameters"] == 6 * 27 + 6 + 2 * 6 + 10 * 6 + 10
    Path("own_net.py").write_text("raise SystemExit('edited')")
    assert train(settings, tiny, run)["top1"] == result["top1"]  # from the checkpoint
