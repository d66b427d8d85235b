"""Training for more epochs than before: why a run cannot be continued, and which runs that concerns.

Both schedules, cosine and linear, fall to zero at the last epoch. With more epochs the rate of every step
after the warm-up is another one, so a longer training is another training, with another signature.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import Job, signature
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.stages.train_stage import TRAIN


def shorter_runs(jobs: Iterable[Job], store: RunStore) -> list[str]:
    """Return a line for each new training that the workspace has with fewer epochs; reads no run."""
    existing = {path.name for path in store.folder.glob("*")}
    labels = {name.partition("-")[2] for name in existing}
    lines = []
    for job in jobs:
        # Each number of epochs costs a signature, so only if the workspace has a run of this model.
        if job.stage != TRAIN.name or job.run_id in existing or job.label not in labels:
            continue
        (content, identity), recipe = TRAIN.identity(job.config), job.config.recipe
        for epochs in reversed(range(1, recipe.epochs)):
            shorter = {**identity, "recipe": {**identity["recipe"], "epochs": epochs}}
            run_id = f"{signature(TRAIN.name, content, shorter)}-{job.label}"
            if run_id in existing:
                why = _reason(recipe.schedule, epochs, recipe.epochs)
                lines.append(f"{job.run_id} begins at the start and does not continue {run_id}: {why}")
                break
    return lines


def refuse_longer(run: Run, line: str) -> NoReturn:
    """Raise for a number of epochs, `recipe.epochs=N`, given to a run that would be continued.

    Raises:
        UserError: always; with the reason and what to submit instead.
    """
    value, recipe = line.partition("=")[2], run.frozen()["recipe"]
    if not value.isdigit():
        raise UserError(f"{line}: not a number of epochs")
    why = _reason(recipe["schedule"], recipe["epochs"], int(value))
    raise UserError(
        f"{line} cannot continue {run.id}: {why}; submit it as a new training, or begin one with its "
        f"weights: model.weights={run.id}"
    )


def _reason(schedule: str, before: int, after: int) -> str:
    return (
        f"its {schedule} schedule reaches a learning rate of zero at epoch {before}; with {after} epochs "
        "every rate after the warm-up would have been different"
    )
