"""labels.json: ids and names of classes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.data.ilsvrc.devkit import read_devkit
from hpc_imagenet.data.ilsvrc.labels_file import LabelsFile, class_id, parse_labels
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import escape_name


@pytest.mark.parametrize(
    ("name", "id_", "shown"),
    [
        ("café, au lait", "café, au lait", "café, au lait"),
        ("a/b", "a%2Fb", "a/b"),
        ("50%", "50%", "50%"),
        ("%41", "%2541", "%41"),
        ("..", "%2E%2E", ".."),
        (".", "%2E", "."),
        ("a\nb\x1b[2J", "a%0Ab%1B[2J", "a%0Ab%1B[2J"),
        ("\u202egpj", "%E2%80%AEgpj", "%E2%80%AEgpj"),
        ("caf\udce9", "caf%E9", "caf%E9"),
        ("\ud800", "%ED%A0%80", "%ED%A0%80"),
        ("می‌خواهم", "می‌خواهم", "می‌خواهم"),
    ],
)
def test_ids_name_folders_and_names_stay_readable(name: str, id_: str, shown: str) -> None:
    assert class_id(name) == id_
    assert escape_name(name) == shown


@pytest.mark.slow
@given(one=st.text(max_size=5), other=st.text(max_size=5))
def test_different_names_have_different_ids(one: str, other: str) -> None:
    assert (class_id(one) == class_id(other)) == (one == other)
    assert "/" not in class_id(one)
    assert class_id(one) not in (".", "..")


def test_the_file_is_read_as_a_kit(tmp_path: Path) -> None:
    labels = LabelsFile(("b/c", "a\udce9"), val=(1, 0, 0), test=(1,), layout="x", skipped={"y": 2})
    path = tmp_path / "labels.json"
    path.write_bytes(labels.encode())
    kit = read_devkit(path)
    assert kit.names == {"b%2Fc": ("b/c",), "a%E9": ("a%E9",)}
    assert kit.val_wnids == ["a%E9", "b%2Fc", "b%2Fc"]
    assert kit.test_wnids == ["a%E9"]
    assert kit.labels == labels


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2}, "unknown format"),
        ({"classes": [], "val": []}, "it has no class"),
        ({"classes": ["a", "a"]}, "a class occurs twice"),
        ({"val": [2]}, "a label without a class"),
        ({"val": None}, "TypeError"),
        ({"more": 1}, "TypeError"),
    ],
)
def test_invalid_files_are_refused_in_one_line(
    change: dict[str, object], problem: str, tmp_path: Path
) -> None:
    raw = json.loads(LabelsFile(("a", "b"), val=(0, 1)).encode()) | change
    with pytest.raises(UserError, match=problem) as caught:
        parse_labels(json.dumps(raw).encode(), tmp_path / "labels.json")
    assert "\n" not in str(caught.value)
