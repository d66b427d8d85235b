"""What `show` prints of a run: its settings and its files, also while a training replaces them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded_runs import record_run

from hpc_imagenet.report.show import details
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore


def test_files_that_vanish_meanwhile_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record_run(RunStore(tmp_path), 1)
    folder = run.folder / "checkpoints"
    folder.mkdir()
    for name in ("last", "epoch-0001", "epoch-0002"):
        (folder / f"{name}.ckpt").write_text("x" * 10)
    real = details.list_checkpoints

    def listed(run_folder: Path) -> list[Path]:
        found = real(run_folder)
        (folder / "epoch-0001.ckpt").unlink()  # train.keep_checkpoints
        return found

    monkeypatch.setattr(details, "list_checkpoints", listed)
    (run.folder / "gone").symlink_to("nowhere")
    found = details.run_details(run)
    assert {Path(each["path"]).stem for each in found["checkpoints"]} >= {"last", "epoch-0002"}
    assert {Path(each["path"]).name for each in found["files"]} == {"run.json", "config.yaml"}


def test_checkpoints_that_are_names_of_one_file_count_once(tmp_path: Path) -> None:
    run = record_run(RunStore(tmp_path), 1)
    before = details.run_details(run)["bytes"]
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints/last.ckpt").write_bytes(bytes(5000))
    (run.folder / "checkpoints/best.ckpt").hardlink_to(run.folder / "checkpoints/last.ckpt")
    found = details.run_details(run)
    assert found["bytes"] - before == 5000
    assert [each["bytes"] for each in found["checkpoints"]] == [5000, 5000]


def test_validations_of_a_file_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    run = record_run(RunStore(tmp_path), 1, FINISHED)
    lines = b"step,epoch,val_top1,val_top5,val_loss\n1,0,0.5,0.9,1.5\n2,1,\xff\xfe"
    (run.folder / "metrics.csv").write_bytes(lines)
    assert details.run_details(run)["validations"]["last"]["top1"] == 0.5


@pytest.mark.parametrize(
    ("stage", "name"), [("search", "search.algorithm=asha"), ("price", "recipe.epochs=3")]
)
def test_settings_of_a_stage(tmp_path: Path, stage: str, name: str) -> None:
    run = record_run(RunStore(tmp_path), 1, stage=stage)
    config = {"stage": {"name": stage}, "search": {"algorithm": "asha"}, "recipe": {"epochs": 3}}
    (run.folder / "config.yaml").write_text(json.dumps(config))
    section, _, rest = name.partition(".")
    key, _, value = rest.partition("=")
    assert str(details.run_details(run)["settings"][section][key]) == value
