"""Results of the evaluations of one checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.report.show.validations import validation_difference, validation_settings
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore


def evaluations(store: RunStore, fingerprint: str, training: Config) -> list[dict[str, Any]]:
    """Return the results of the finished evaluations of the checkpoint with this fingerprint, oldest first.

    Args:
        store: runs of the workspace.
        fingerprint: of the checkpoint.
        training: config of the training that wrote it.

    Returns:
        split, datastore, images, top1 and top5 (0 to 1) and more of each; `difference`: how its images were
        evaluated otherwise than in the training.
    """
    rows, validation = [], validation_settings(asdict(training))
    for run in store.readable():
        if run.info.get("stage") != "evaluate":
            continue
        outcome = run.attempt and run.attempt.outcome
        try:
            frozen = run.frozen()
        except UserError:
            continue
        settings = frozen.get("evaluate") or {}
        if outcome and outcome.state == FINISHED and settings.get("fingerprint") == fingerprint:
            difference = validation_difference(validation_settings(frozen), validation)
            rows.append({"split": settings["split"], **(outcome.result or {}), "difference": difference})
    return rows
