from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_imagenet.datastore.index import ENTRY, open_index, write_index
from hpc_imagenet.errors import UserError

entries = st.tuples(
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)
)


@pytest.mark.slow
@given(rows=st.lists(entries, min_size=1, max_size=50))
def test_write_and_open_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]]
) -> None:
    path = tmp_path_factory.mktemp("index") / "train.npy"
    write_index(path, np.array(rows, ENTRY))
    assert open_index(path).tolist() == rows


def test_index_has_16_bytes_per_image_and_numpy_loads_it(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    write_index(path, np.zeros(1000, ENTRY))
    assert path.stat().st_size - 16 * 1000 in range(64, 257)  # the .npy header
    assert np.load(path).dtype == ENTRY


def test_index_is_memory_mapped_and_read_only(tmp_path: Path) -> None:
    write_index(tmp_path / "train.npy", np.zeros(3, ENTRY))
    index = open_index(tmp_path / "train.npy")
    assert isinstance(index, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        index["label"] = 1


def test_truncated_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    write_index(path, np.zeros(3, ENTRY))
    complete = path.read_bytes()
    for kept in range(len(complete)):
        path.write_bytes(complete[:kept])
        with pytest.raises(UserError, match=r"train\.npy: not an index .*\+stage=process"):
            open_index(path)


def test_files_that_are_not_an_index_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(UserError, match="not an index"):
        open_index(tmp_path / "other.npy")
    (tmp_path / "page.npy").write_text("<html>")
    with pytest.raises(UserError, match="not an index"):
        open_index(tmp_path / "page.npy")
    with pytest.raises(UserError, match=r"no such index; create it with \+stage=process"):
        open_index(tmp_path / "none.npy")


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros((2, 2), ENTRY)])
def test_write_refuses_arrays_that_are_not_an_index(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(TypeError, match="one dimension"):
        write_index(tmp_path / "train.npy", wrong)
    assert list(tmp_path.iterdir()) == []
