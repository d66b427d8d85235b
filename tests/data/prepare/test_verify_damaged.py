"""Datasets that claim nothing: found by fuzzing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_dataset import make_dataset

from hpc_imagenet.data.prepare.verify import verify_dataset


@pytest.mark.parametrize("damage", ["shards", "entries"])
def test_index_without_entries_or_shards_is_a_problem(tmp_path: Path, damage: str) -> None:
    make_dataset(tmp_path, images=2, image_bytes=9)
    folder = tmp_path / "datasets" / "digits"
    if damage == "shards":
        raw = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps({**raw, "shards": []}))
    else:
        data = (folder / "train.npy").read_bytes()
        (folder / "train.npy").write_bytes(data[:128].replace(b"(4,), }", b"(0,), }"))
    problems = verify_dataset(folder, quick=True, workers=1).problems
    assert any("without images, or without shards" in line or "not an index" in line for line in problems)
