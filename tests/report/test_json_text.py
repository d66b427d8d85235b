"""Reports as JSON: every number is one that JSON knows, and a list has one line per item."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpc_imagenet.report.json_text import json_text

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ([], []),
        ([{"top1": 0.5, "label": "größer\n"}], [{"top1": 0.5, "label": "größer\n"}]),
        ([{"loss": NAN, "rows": [1, INFINITE]}, {}], [{"loss": None, "rows": [1, None]}, {}]),
        ({"loss": -INFINITE, "trials": ({"top1": 1},)}, {"loss": None, "trials": [{"top1": 1}]}),
    ],
)
def test_numbers_that_are_not_finite_become_null(value: Any, read: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(json_text(value), parse_constant=refuse) == read


def test_list_has_one_line_per_item() -> None:
    lines = json_text([{"run": "a", "sweeps": ["x", "y"]}, {"run": "b", "sweeps": []}]).splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == [
        {"run": "a", "sweeps": ["x", "y"]},
        {"run": "b", "sweeps": []},
    ]
    assert (lines[0], lines[-1]) == ("[", "]")
