"""Searches on the report page: trials, rungs and importance of the settings, from files alone."""

from __future__ import annotations

import contextlib
from typing import Any

from hpc_imagenet.runs.attempt import is_number
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.search.study_files import StudyFiles, TrialRecord, studies

_MOST_TRIALS = 2000  # of one study, the best ones


def search_results(store: RunStore) -> list[dict[str, Any]]:
    """Return for each study its name, settings, trials, rungs and the importance of its settings.

    A setting has choices as text, or low, high and log. A trial has its values in the order of the settings.
    """
    found = []
    for files in studies(store):
        with contextlib.suppress(OSError):  # such as no permission: another user's study
            found.append(_study(files))
    return found


def _study(files: StudyFiles) -> dict[str, Any]:
    about, records = files.definition, files.records()
    space = about.get("space")
    # Of a damaged study what the page can draw.
    space = (
        {name: each for name, each in space.items() if _is_dimension(each)} if isinstance(space, dict) else {}
    )
    rungs = about.get("rungs") if isinstance(about.get("rungs"), list) else []
    assert isinstance(rungs, list)
    shown = sorted(records, key=lambda each: (each.rung, each.top1 or -1.0), reverse=True)[:_MOST_TRIALS]
    return {
        "name": files.name,
        "algorithm": about.get("algorithm"),
        "target": files.target,
        "hours": round(sum(each.hours for each in records), 4),
        "settings": [{"name": name, **dimension} for name, dimension in space.items()],
        "importance": files.importance,
        "rungs": [
            _rung(epochs, records, about.get("algorithm") == "halving", at) for at, epochs in enumerate(rungs)
        ],
        "trials": [
            {
                "trial": each.trial,
                "run": each.run,
                "state": each.state,
                "top1": each.top1,
                "epochs": each.epochs,
                "values": [each.values.get(name) for name in space],
            }
            for each in shown
        ],
    }


def _is_dimension(value: Any) -> bool:
    """Whether a value of a study's space has choices, or a lowest and a highest number."""
    if not isinstance(value, dict):
        return False
    choices, ends = value.get("choices"), (value.get("low"), value.get("high"))
    return isinstance(choices, list) if choices else all(map(is_number, ends))


def _rung(epochs: int, records: list[TrialRecord], halving: bool, at: int) -> dict[str, Any]:
    """Return epochs, number of trials that reached them, and lowest, median and highest accuracy."""
    if halving:
        found = [each.top1 for each in records if each.rung == at and each.top1 is not None]
    else:
        found = [each.accuracies[str(epochs)] for each in records if str(epochs) in each.accuracies]
    values = sorted(found)
    row: dict[str, Any] = {"epochs": epochs, "trials": len(values)}
    if values:
        row |= {"low": values[0], "median": values[len(values) // 2], "high": values[-1]}
    return row
