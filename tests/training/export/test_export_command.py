"""The commands export and predict, and the same from Python, on a checkpoint file and a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from command_line import Cli
from PIL import Image
from tiny_training import write_store
from trained_samples import NAMES, config_of, write_trained

import hpc_imagenet
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.checkpoints import fingerprint
from hpc_imagenet.runs.store import RunStore

pytestmark = pytest.mark.slow


@pytest.fixture
def run(cli: Cli) -> str:
    """A finished training in the workspace, with two checkpoints; its id."""
    config = config_of("squeezenet1_1")
    info = {"stage": "train", "model": "squeezenet1_1", "label": "squeezenet1_1", "needs": []}
    run = RunStore(cli.workspace).create("c0ffee00-squeezenet1_1", asdict(config), info)
    for name in ("best", "last"):
        write_trained(run.folder / f"checkpoints/{name}.ckpt", config)
    run.new_attempt().end(FINISHED, result={"top1": 0.8125})
    return run.id


@pytest.fixture
def images(cli: Cli) -> Path:
    folder = cli.cwd / "my images"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"é{i}.png")
    return folder


def test_a_run_is_exported(cli: Cli, run: str) -> None:
    checkpoint = cli.workspace / "runs" / run / "checkpoints"
    output = cli("export", "squeezenet", "mine").stdout
    assert output.startswith(f"exported {checkpoint}/best.ckpt to {cli.cwd}/mine; ")
    assert sorted(path.name for path in (cli.cwd / "mine").iterdir()) == [
        *("README.md", "config.json", "load.py", "model.pt"),
    ]
    assert "last.ckpt to" in cli("export", run, "other", "checkpoint=last", "--format", "safetensors").stdout
    assert (cli.cwd / "other/model.safetensors").exists()


def test_the_card_lists_evaluations_of_this_checkpoint(cli: Cli, run: str) -> None:
    best = cli.workspace / "runs" / run / "checkpoints/best.ckpt"
    for name, of in (("this", fingerprint(best)), ("another", "c0ffee")):
        values = {
            "evaluate": {"fingerprint": of, "split": "test"},
            "recipe": {"val_size": 48, "val_resize": 48},
        }
        made = RunStore(cli.workspace).create(f"00000000-evaluate-{name}", values, {"stage": "evaluate"})
        result = {"top1": 0.25, "top5": 0.5, "images": 8, "datastore": f"{name}@v1"}
        made.new_attempt().end(FINISHED, result=result)
    cli("export", run, "mine")
    card = (cli.cwd / "mine/README.md").read_text()
    assert "| test of this@v1, 48 of 48 px | 25.00% | 50.00% |" in card
    assert "another@v1" not in card


def test_images_are_classified(cli: Cli, run: str, images: Path) -> None:
    lines = cli("predict", run, str(images), "--top", "2").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [str(images / f"é{i}.png") for i in range(3)]
    assert all(line.count("%") == 2 for line in lines)
    rows = json.loads(cli("predict", run, str(images / "é0.png"), str(images), "--json").stdout)
    assert [len(row["classes"]) for row in rows] == [5] * 4
    assert rows[0] == rows[1]
    strange = os.fsdecode(b"not utf-8 \xff.png")
    (images / "é0.png").rename(images / strange)
    assert "not utf-8 %FF.png  " in cli("predict", run, str(images)).stdout
    assert json.loads(cli("predict", run, str(images), "--json").stdout)[0]["image"].endswith(strange)
    (images / strange).rename(images / "é0.png")
    everything = cli("predict", run, str(images / "é0.png"), "--top", "99").stdout
    assert "tab%09here" in everything  # a control character does not reach the terminal
    assert all(name in everything for name in NAMES if name.isprintable())


def test_an_unreadable_image_does_not_hide_the_others(cli: Cli, run: str, images: Path) -> None:
    (images / "broken.png").write_text("no image")
    done = cli("predict", run, str(images), code=1)
    assert done.stdout.count("%") == 15
    assert "broken.png  unreadable: cannot identify image file" in done.stdout
    problems = [
        row["problem"] for row in json.loads(cli("predict", run, str(images), "--json", code=1).stdout)
    ]
    assert [bool(problem) for problem in problems] == [True, False, False, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "nothing", "out"], "no run nothing in "),
        (["export", "RUN", "out", "--format", "onxx"], "--format onxx is unknown; did you mean: onnx"),
        (["export", "RUN", "images"], "images exists: type a new folder"),
        (["export", "RUN", "a/b/c"], "a/b: no such folder: create it first"),
        (["export", "RUN", "out", "checkpoint=epoch-9"], "has no checkpoint epoch-9; it has best, last"),
        (["export", "text.ckpt", "out"], "text.ckpt is not a checkpoint of a training, or damaged"),
        (["export", "RUN"], "export: the following arguments are required: OUT"),
        (["predict", "RUN"], "predict: the following arguments are required: IMAGE"),
        (["predict", "RUN", "nowhere.jpg"], "nowhere.jpg: no such image or folder"),
        (["predict", "RUN", "images", "--top", "0"], "--top 0: type 1 or more"),
    ],
)
def test_wrong_input_is_one_line(cli: Cli, run: str, words: list[str], message: str) -> None:
    (cli.cwd / "images").mkdir()
    (cli.cwd / "images/a.txt").touch()
    (cli.cwd / "text.ckpt").write_text("text")
    before = sorted(cli.cwd.iterdir())
    assert message in cli.refused(*(run if word == "RUN" else word for word in words))
    assert sorted(cli.cwd.iterdir()) == before


def test_a_checkpoint_file_needs_no_workspace(cli: Cli, images: Path) -> None:
    path = write_trained(cli.cwd / "from elsewhere.ckpt", config_of("squeezenet1_1"))
    assert cli("predict", path.name, str(images / "é1.png")).stdout.count("%") == 5
    cli("export", path.name, "mine")
    assert not cli.workspace.exists()


def test_the_command_line_checks_before_it_imports_torch() -> None:
    code = (
        "import sys; from hpc_imagenet.cli.main import run\n"
        "try: run(['export', 'nothing', 'out'])\n"
        "except Exception as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_python_does_the_same(cli: Cli, run: str, images: Path) -> None:
    with mock.patch.dict(os.environ, cli.env, clear=True):
        (handle,) = hpc_imagenet.jobs(run)
        rows = json.loads(cli("predict", run, str(images), "--json").stdout)
        assert hpc_imagenet.predict(handle, images) == rows
        arrays = [np.array(Image.open(images / f"é{i}.png")) for i in range(3)]
        for source in (run, handle.folder / "checkpoints/best.ckpt"):
            assert [row["classes"] for row in hpc_imagenet.predict(source, arrays)] == [
                row["classes"] for row in rows
            ]
        (single,) = hpc_imagenet.predict(run, arrays[1], top=1)
        assert single["classes"][0]["label"] == rows[1]["classes"][0]["label"]
        out = hpc_imagenet.export(handle, cli.cwd / "mine", checkpoint="last")
        assert out == cli.cwd / "mine"
        assert (out / "model.pt").exists()
        with pytest.raises(hpc_imagenet.UserError, match="mine exists"):
            hpc_imagenet.export(handle, out)
        with pytest.raises(hpc_imagenet.UserError, match="no run nothing"):
            hpc_imagenet.predict("nothing", images)
        pillow = Image.fromarray(arrays[1])
        for wrong in (arrays[1] / 255, arrays[1][:, :, 0], pillow, [pillow], [arrays[1][None]], [3]):
            with pytest.raises(hpc_imagenet.UserError, match=r"^image 0 is .* uint8 \[height, width, 3\]"):
                hpc_imagenet.predict(run, wrong)


def test_python_evaluates_and_the_card_lists_the_result(cli: Cli) -> None:
    write_store(cli.workspace / "datastores/digits/v1", {"train": 16, "val": 13})
    with mock.patch.dict(os.environ, cli.env, clear=True):
        store = hpc_imagenet.open_datastore("digits")
        assert (store.splits, store["val"].labels.tolist()[:2]) == ({"train": 16, "val": 13}, [7, 6])
        config = config_of("squeezenet1_1")
        path = write_trained(cli.cwd / "mine.ckpt", config, store.classes, store.ids)
        handle = hpc_imagenet.evaluate(
            path, f"split=val cluster=foreground {store.settings[0]} {store.settings[1]}"
        )
        top1 = handle.result()["top1"]
        rows = hpc_imagenet.predict(path, [pixels for pixels, _ in store["val"]])
        found = [row["classes"][0]["label"] for row in rows]
        assert top1 == pytest.approx(np.mean(found == store["val"].labels))
        card = (hpc_imagenet.export(path, cli.cwd / "out") / "README.md").read_text()
        assert f"| val of digits@v1 | {top1:.2%} |" in card
        with pytest.raises(hpc_imagenet.UserError, match="digits@v1 has no split test"):
            store["test"]
        with pytest.raises(hpc_imagenet.UserError, match="no datastore: type its name"):
            hpc_imagenet.open_datastore()
        with pytest.raises(hpc_imagenet.UserError, match="nothing"):
            hpc_imagenet.open_datastore("nothing")
