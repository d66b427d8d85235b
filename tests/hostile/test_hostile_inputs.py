"""Every hostile input is refused in one line, or survived; `python -m tests.hostile` prints the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from all_cases import CASES
from cases import Case, judge


def test_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(CASES) >= 150
    names = [(case.kind, case.name) for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{case.kind}: {case.name}") for case in CASES],
)
def test_hostile_input_is_refused_in_one_line_or_survived(case: Case, tmp_path: Path) -> None:
    judged = judge(case, tmp_path)
    assert not judged.problem, judged
