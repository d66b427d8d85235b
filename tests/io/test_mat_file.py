"""MATLAB files are read in a process of their own, as plain values."""

from __future__ import annotations

import numpy as np
import pytest
from sample_folders import cars, cells, mat

from hpc_imagenet.errors import UserError
from hpc_imagenet.io import mat_file
from hpc_imagenet.io.mat_file import flat, read_mat


@pytest.mark.slow
def test_variables_are_plain_values() -> None:
    found = read_mat(
        mat(one=5, text="abc", numbers=np.array([[1, 2], [3, 4]]), names=cells("a", "bc")), "x.mat"
    )
    assert found == {"one": 5, "text": "abc", "numbers": [[1, 2], [3, 4]], "names": ["a", "bc"]}
    assert flat(found["numbers"]) == [1, 2, 3, 4]
    assert flat(found["one"]) == [5]


@pytest.mark.slow
def test_structures_are_dicts_in_the_order_of_their_fields() -> None:
    rows = read_mat(cars(("a.jpg", 1), ("b.jpg", 2)), "x.mat")["annotations"]
    assert rows == [
        {"bbox_x1": 1, "class": 1, "fname": "a.jpg"},
        {"bbox_x1": 1, "class": 2, "fname": "b.jpg"},
    ]
    assert list(rows[0]) == ["bbox_x1", "class", "fname"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "reading it ended with SIGSEGV"),
        ("raise SystemExit(7)", "exit code 7"),
    ],
)
def test_crash_of_the_reader_is_an_error(monkeypatch: pytest.MonkeyPatch, program: str, reason: str) -> None:
    original = mat_file.subprocess.run
    monkeypatch.setattr(
        mat_file.subprocess, "run", lambda command, **rest: original([command[0], "-c", program], **rest)
    )
    with pytest.raises(UserError, match=reason):
        read_mat(f"{program}".encode(), "x.mat")
