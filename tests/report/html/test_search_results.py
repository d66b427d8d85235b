"""Searches on the report page: what it reads from a study's files, also from damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_imagenet.report.html.page import encode_data, render_page
from hpc_imagenet.report.html.page_data import collect
from hpc_imagenet.report.html.search_results import search_results
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.search.study_files import StudyFiles, TrialRecord

SPACE = {"model": {"choices": ["a", "</script>"]}, "seed": {"low": 1, "high": 9, "log": False, "whole": True}}


def test_studies_of_a_workspace(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert search_results(store) == []
    files = StudyFiles(store, "night")
    files.create({"algorithm": "asha", "space": SPACE, "rungs": [1, 3]}, 9, None)
    for trial, (state, tops) in enumerate(
        [("finished", (0.2, 0.4, 0.9)), ("pruned", (0.1,)), ("failed", ())]
    ):
        accuracies = {str(epoch + 1): top for epoch, top in enumerate(tops)}
        values = {"model": "</script>", "seed": "3"}
        top1 = tops[-1] if tops else None
        files.write(
            TrialRecord(trial, values=values, state=state, top1=top1, accuracies=accuracies, hours=0.5)
        )
    files.write_importance({"seed": 0.75, "model": 0.25})
    (files.folder / "trials/9.0.json").write_text('{"trial"')
    (files.folder / "trials/10.0.json").write_text(
        '{"trial": 10, "values": 3, "accuracies": null, "top1": "x"}'
    )
    (found,) = search_results(store)
    assert (found["name"], found["target"], found["hours"]) == ("night", 9, 1.5)
    assert [(each["trial"], each["state"]) for each in found["trials"]][:2] == [
        (0, "finished"),
        (1, "pruned"),
    ]
    assert found["rungs"] == [
        {"epochs": 1, "trials": 2, "low": 0.1, "median": 0.2, "high": 0.2},
        {"epochs": 3, "trials": 1, "low": 0.9, "median": 0.9, "high": 0.9},
    ]
    assert found["trials"][0]["values"] == ["</script>", "3"]
    assert found["importance"] == {"seed": 0.75, "model": 0.25}
    data = collect(store)
    assert data["searches"] == [found]
    assert "</script>" not in encode_data(data)
    page = render_page(data).decode()
    assert page.count("drawSearches") > 1
    (files.folder / "study.json").write_text("[]")
    assert search_results(store)[0]["settings"] == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trials/1.0.json", {"trial": 1, "rung": None, "hours": 1}),
        ("trials/1.0.json", {"trial": 1, "hours": "x", "accuracies": {"1": "x", "3": 0.5}, "top1": {}}),
        ("study.json", {"algorithm": "halving", "space": {"model": 5, "seed": {"low": "x"}}, "rungs": ["x"]}),
    ],
)
def test_damaged_files_of_a_study(tmp_path: Path, file: str, content: dict[str, object]) -> None:
    store = RunStore(tmp_path)
    files = StudyFiles(store, "night")
    files.create({"algorithm": "asha", "space": SPACE, "rungs": [1, 3]}, 9, None)
    files.write(TrialRecord(0, state="finished", top1=0.5, accuracies={"1": 0.5}, hours=0.5))
    (files.folder / file).write_text(json.dumps(content))
    (found,) = search_results(store)
    assert found["hours"] == 0.5
    assert len(found["settings"]) == (0 if file == "study.json" else 2)
