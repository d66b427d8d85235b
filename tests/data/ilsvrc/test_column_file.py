"""ColumnFile: an array in a temporary file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.data.ilsvrc import column_file
from hpc_imagenet.data.ilsvrc.column_file import ColumnFile
from hpc_imagenet.errors import UserError

parts_of_names = st.lists(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=6), max_size=6)


@pytest.mark.slow
@given(parts_of_names)
def test_strings_of_any_width_are_those_of_concatenate(parts: list[list[bytes]]) -> None:
    arrays = [np.array(part, "S") for part in parts]
    column = ColumnFile()
    for array in arrays:
        column.append(array)
    expected = np.concatenate(arrays) if arrays else np.empty(0)
    found = column.array()
    assert found.tolist() == expected.tolist()
    assert not arrays or found.dtype == expected.dtype


def test_wider_strings_are_converted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_file, "CHUNK", 3)
    column = ColumnFile()
    column.append(np.array([b"%d" % i for i in range(8)]))
    column.append(np.array([b"100"]))
    assert column.array().tolist() == [*(b"%d" % i for i in range(8)), b"100"]


def test_changes_of_the_array_do_not_reach_the_file() -> None:
    column = ColumnFile()
    column.append(np.arange(4))
    column.array()[0] = 7
    column.append(np.arange(2))
    assert column.array().tolist() == [0, 1, 2, 3, 0, 1]


def test_nothing_remains_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    column = ColumnFile()
    column.append(np.arange(1000))
    assert len(column.array()) == 1000
    assert not list(tmp_path.iterdir())


def test_full_disk_names_the_folder_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    column = ColumnFile()
    full = os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", buffering=0)
    monkeypatch.setattr(column, "_file", full)
    with pytest.raises(UserError, match=f"no space left in {tempfile.gettempdir()} .* TMPDIR"):
        column.append(np.arange(1000))
    full.close()


def test_full_disk_is_reported_by_append_also_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "wb"))  # noqa: PTH123, SIM115
    with pytest.raises(UserError, match="no space left in "):
        ColumnFile().append(np.arange(10))
