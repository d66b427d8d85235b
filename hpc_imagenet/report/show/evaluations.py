"""Results of the evaluations of one checkpoint."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.stages.evaluate_stage import fingerprint


def evaluations(store: RunStore, checkpoint: Path) -> list[dict[str, Any]]:
    """Return the results of the finished evaluations of a checkpoint with these contents, oldest first.

    Returns:
        split, datastore, images, top1 and top5 (0 to 1) and more of each.
    """
    with contextlib.suppress(UserError):
        expected = fingerprint(checkpoint)
        found = [run for run in store.readable() if run.info.get("stage") == "evaluate"]
        rows = []
        for run in found:
            outcome = run.attempt and run.attempt.outcome
            try:
                settings = run.frozen().get("evaluate") or {}
            except UserError:
                continue
            if outcome and outcome.state == FINISHED and settings.get("fingerprint") == expected:
                rows.append({"split": settings["split"], **(outcome.result or {})})
        return rows
    return []
