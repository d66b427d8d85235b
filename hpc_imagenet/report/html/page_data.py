"""Collect everything that the report page shows, from the workspace alone, as one JSON value."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_imagenet import __version__
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.retries.diagnosis import NOT_FINITE, diagnose
from hpc_imagenet.report.html.class_results import WORST, ClassResults, read_class_results
from hpc_imagenet.report.html.config_differences import flatten, split_shared
from hpc_imagenet.report.html.data_summary import (
    DatastoreKey,
    bad_images,
    datastore_key,
    datastore_names,
    summarise_datastore,
)
from hpc_imagenet.report.html.learning_curves import read_curves
from hpc_imagenet.report.html.search_results import search_results
from hpc_imagenet.report.jobs_table import job_rows
from hpc_imagenet.report.leaderboard import Training, evaluation_name, trainings
from hpc_imagenet.report.show.attempt_times import intervals, nodes_of
from hpc_imagenet.runs.attempt import FAILED, now, read_record
from hpc_imagenet.runs.bad_batch import read_bad_batch
from hpc_imagenet.runs.store import Run, RunStore

# What keeps a page of 1,000 runs below 10 MB.
_CURVE_POINTS = 40_000  # of each kind of curve, over all runs
_MIN_POINTS, _MAX_POINTS = 40, 400  # of one curve
_CLASS_VALUES = 500_000  # accuracies per class, over all runs; the best runs get theirs first
_DATASTORES = 6  # whose certificate and images are shown
_BAD_BATCHES = 12  # trainings with a non-finite loss whose images are shown
_BAD_IMAGES = 24  # of one step
_DIAGNOSES = 200  # failed trainings whose logs are read
_OTHER_JOBS = 200  # newest runs of other stages in the timeline

_ROW_KEYS = (
    *("run", "model", "state", "reason", "datastore", "seed", "top1", "top5", "loss", "epochs", "parameters"),
    "sweeps",
    *(
        *("gpu_hours", "gpu_hours_per_point", "kwh", "kwh_per_point", "energy_of"),
        "hours",
        "images_per_second",
        "dir",
        "created",
        "learned",
        "advice",
    ),
    *("published_top1", "published_protocol", "published_same_protocol"),
)


def collect(store: RunStore, with_images: bool = True) -> dict[str, Any]:
    """Return the data of the page.

    Args:
        store: all runs of a workspace; damaged ones are shown with what can be read of them.
        with_images: whether thumbnails of val images are part of it.
    """
    runs = store.readable()
    found = trainings(store)
    points = max(_MIN_POINTS, min(_MAX_POINTS, _CURVE_POINTS // max(1, len(found))))
    classes = [read_class_results(entry.run.folder) for entry in found]
    shared, differences = split_shared([flatten(entry.frozen) for entry in found])
    key_of = _datastore_keys(found)
    keys = [key_of[entry.run.id] for entry in found]
    names = _class_names(keys, classes)
    rows, values_left, batches_left, diagnoses_left = [], _CLASS_VALUES, _BAD_BATCHES, _DIAGNOSES
    for entry, key, results, different in zip(found, keys, classes, differences, strict=True):
        row: dict[str, Any] = {name: entry.row.get(name) for name in _ROW_KEYS}
        row["model"] = str(row["model"] or entry.row["label"])  # a damaged run.json has no model
        row["config"] = different
        row["citation"] = entry.published.citation if entry.published else None
        row["attempts"] = _attempts(entry.run, row["state"])
        row["evaluations"] = [_evaluation(each, entry) for each in entry.evaluations]
        if entry.row["state"] == FAILED and diagnoses_left:
            row["diagnosis"] = _diagnosis(entry)
            diagnoses_left -= 1
        if entry.row["failure"] == NOT_FINITE and batches_left:
            row["bad_batch"] = _bad_batch(entry, with_images)
            batches_left -= 1
        row["curves"] = read_curves(entry.run.folder / "metrics.csv", points)
        row["bottleneck"] = _bottleneck(entry.run.folder)
        if results is not None and _same_classes(results, names.get(key)):
            row["classes"] = _describe_classes(results, values_left >= len(results.top1))
            values_left -= len(results.top1)
        rows.append(row)
    datastores = _datastores(found, keys, classes, with_images)
    for key, summary in datastores.items():
        summary["names"] = names.get(key, [])
    # The version of a content is known once its datastore has been read.
    read = {key: summary.get("version") for key, summary in datastores.items() if key.content}
    shown = datastore_names({key: key.version or read.get(key) for key in key_of.values()})
    for row in rows:
        for each in (row, *row["evaluations"]):
            each["datastore"] = shown[key_of[each["run"]]]
    others = [run for run in runs if run.info.get("stage") != "train"][-_OTHER_JOBS:]
    return {
        "version": __version__,
        "workspace": str(store.folder.parent),
        "generated": now(),
        "runs": rows,
        "shared": shared,
        "datastores": {shown[key]: summary for key, summary in datastores.items()},
        "other_jobs": _other_jobs(others),
        "searches": search_results(store),
    }


def _evaluation(entry: Training, training: Training) -> dict[str, Any]:
    """Return what the page shows of an evaluation of a training."""
    keys = ("run", "state", "reason", "split", "checkpoint", "step", "top1", "top5", "loss")
    return {
        **{key: entry.row.get(key) for key in keys},
        "name": evaluation_name(entry.row, training.row),
    }


def _diagnosis(entry: Training) -> dict[str, str]:
    """Return why the newest attempt failed and what to do, one line each; empty if that cannot be read."""
    with contextlib.suppress(OSError):  # such as no permission: another user's run
        # The state of a job that left no outcome was queried with those of all others.
        if found := diagnose(entry.run, status=State(entry.row["state"], entry.row["reason"])):
            return {"text": found.text, "command": found.command}
    return {}


def _bad_batch(entry: Training, with_images: bool) -> dict[str, Any]:
    """Return images of the step whose loss was not finite: [name, data URI] each, their number, a note."""
    images = read_bad_batch(entry.run.folder)
    shown, chosen = images[:_BAD_IMAGES], entry.frozen.get("datastore")
    uris, note = bad_images(chosen, shown) if with_images and isinstance(chosen, dict) else ([], "")
    uris = uris or [""] * len(shown)
    named = [[name, uri] for (name, _), uri in zip(shown, uris, strict=True)]
    return {"images": named, "total": len(images), "note": note}


def _datastore_keys(found: Sequence[Training]) -> dict[str, DatastoreKey]:
    """Return the datastore of each training and evaluation, by its run.

    A run of a pipeline knows the content of its datastore, and the version only if another run knows both.
    """
    keys = {
        each.run.id: datastore_key(each.frozen) for entry in found for each in (entry, *entry.evaluations)
    }
    versions = {key._replace(version=None): key for key in keys.values() if key.version and key.content}
    return {run: versions.get(key, key) for run, key in keys.items()}


def _attempts(run: Run, state: str) -> list[dict[str, Any]]:
    """Return number, state, reason, hosts and parts of each attempt: [kind, begin, end] in s since 1970."""
    attempts, found = run.attempts(), []
    for attempt in attempts:
        is_last = attempt is attempts[-1]
        outcome, submitted = attempt.outcome, attempt.submitted
        code = submitted.get("code")
        code = code if isinstance(code, dict) else {}
        found.append(
            {
                "number": attempt.number,
                "state": outcome.state if outcome else (state if is_last else "failed"),
                "reason": outcome.reason if outcome else "",
                "executor": submitted.get("executor"),
                "job": submitted.get("job_id"),
                "hosts": nodes_of(attempt),
                "code": code.get("commit") or code.get("version"),
                "parts": [
                    [part.kind, round(part.begin), round(part.end)]
                    for part in intervals(attempt, state if is_last else "")
                ],
            }
        )
    return found


def _bottleneck(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError):  # such as no permission: another user's run
        record = read_record(folder / "bottleneck.json")
    return {key: record[key] for key in ("bottleneck", "waiting", "suggestion") if key in record}


def _class_names(
    keys: Sequence[DatastoreKey], classes: Sequence[ClassResults | None]
) -> dict[DatastoreKey, list[tuple[str, str]]]:
    """Return ids and names of the classes of each datastore, once for all its runs."""
    names: dict[DatastoreKey, list[tuple[str, str]]] = {}
    for key, results in zip(keys, classes, strict=True):
        if results is not None:
            names.setdefault(key, list(results.names))
    return names


def _same_classes(results: ClassResults, names: list[tuple[str, str]] | None) -> bool:
    return names is not None and list(results.names) == names


def _describe_classes(results: ClassResults, with_all: bool) -> dict[str, Any]:
    """Return the histogram and, for the worst classes, [label, top-1, images, [[predicted, images], …]]."""
    worst = [
        [label, results.top1[label], results.images[label], results.confused.get(label, [])]
        for label in results.worst()
    ]
    described: dict[str, Any] = {"histogram": results.histogram(), "worst": worst}
    if with_all:  # in tenths of a percent, the shortest form in JSON
        described["top1"] = [None if top1 is None else round(1000 * top1) for top1 in results.top1]
    return described


def _datastores(
    found: Sequence[Training],
    keys: Sequence[DatastoreKey],
    classes: Sequence[ClassResults | None],
    with_images: bool,
) -> dict[DatastoreKey, dict[str, Any]]:
    chosen: dict[DatastoreKey, dict[str, Any]] = {}
    labels: dict[DatastoreKey, dict[int, None]] = {}
    for entry, key, results in zip(found, keys, classes, strict=True):
        if key not in chosen:
            if len(chosen) == _DATASTORES or not isinstance(entry.frozen.get("datastore"), dict):
                continue
            chosen[key] = entry.frozen["datastore"]
        needed = labels.setdefault(key, {})
        if results is not None and len(needed) < 4 * WORST:
            for label in results.worst():
                needed[label] = None
                needed |= dict.fromkeys(other for other, _ in results.confused.get(label, [])[:1])
    return {
        key: summarise_datastore(datastore, list(labels[key]) if with_images else None)
        for key, datastore in chosen.items()
    }


def _other_jobs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [
        {
            "run": run.id,
            "stage": row["stage"],
            "attempts": _attempts(run, row["state"]),
        }
        for run, row in zip(runs, job_rows(runs), strict=True)
    ]
