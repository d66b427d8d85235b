"""Results of the evaluations of one checkpoint."""

from __future__ import annotations

from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore


def evaluations(store: RunStore, fingerprint: str) -> list[dict[str, Any]]:
    """Return the results of the finished evaluations of the checkpoint with this fingerprint, oldest first.

    Returns:
        split, datastore, images, top1 and top5 (0 to 1) and more of each.
    """
    rows = []
    for run in store.readable():
        if run.info.get("stage") != "evaluate":
            continue
        outcome = run.attempt and run.attempt.outcome
        try:
            settings = run.frozen().get("evaluate") or {}
        except UserError:
            continue
        if outcome and outcome.state == FINISHED and settings.get("fingerprint") == fingerprint:
            rows.append({"split": settings["split"], **(outcome.result or {})})
    return rows
