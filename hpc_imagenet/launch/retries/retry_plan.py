"""Submit failed or cancelled runs again, each with the one remedy of its diagnosis, and runs that wait.

A plan is made first, so that it can be shown before anything is written. Only settings outside the signature
change. A failure that would happen again is not submitted a second time without a change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc_imagenet.cluster.slurm import UNKNOWN_CAUSE
from hpc_imagenet.config.schema import Config, cluster_for, from_dict
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.ownership import owner_writes
from hpc_imagenet.launch import validate
from hpc_imagenet.launch.executor import JobsRefused, State, code_version
from hpc_imagenet.launch.executors import EXECUTORS, start_queued
from hpc_imagenet.launch.retries.diagnosis import HOST_MEMORY, Diagnosis, class_of, diagnose
from hpc_imagenet.launch.retries.error_logs import quoted
from hpc_imagenet.launch.retries.remedies import cluster_setting
from hpc_imagenet.launch.states import states
from hpc_imagenet.launch.submission import Submitted, start_attempts
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import last_seen
from hpc_imagenet.stages import STAGES


@dataclass(frozen=True)
class PlannedRetry:
    """A run that is to be submitted again.

    Attributes:
        diagnosis: why it failed or was cancelled; None if that is unknown.
        changes: old and new value of each setting that changes, by name.
        frozen: the frozen config with the new values.
    """

    run: Run
    diagnosis: Diagnosis | None
    changes: dict[str, tuple[Any, Any]]
    frozen: dict[str, Any]

    def __str__(self) -> str:
        kind = class_of(self.diagnosis.kind).words if self.diagnosis else ""
        changes = ", ".join(
            f"{name}: {_shown(old)} → {_shown(new)}" for name, (old, new) in self.changes.items()
        )
        return " · ".join(filter(None, [kind, changes or "unchanged"]))


@dataclass(frozen=True)
class RetryPlan:
    """What a retry would submit; nothing has been written.

    Attributes:
        skipped: the given runs that are active or finished.
        groups: what is submitted, by executor; each run after those it needs.
        refused: why runs are left out.
    """

    skipped: list[Submitted]
    groups: dict[str, list[PlannedRetry]]
    state_of: Mapping[str, State]
    refused: list[UserError] = field(default_factory=list)

    @property
    def planned(self) -> list[PlannedRetry]:
        """All runs that are submitted."""
        return [each for group in self.groups.values() for each in group]


def plan_retry(
    store: RunStore,
    runs: Sequence[Run],
    settings: Sequence[str] = (),
    again: bool = False,
    leave_out: bool = False,
) -> RetryPlan:
    """Plan to submit failed, cancelled or waiting runs, with those they need that did not finish.

    Args:
        store: the workspace's runs.
        runs: the runs; active and finished ones are skipped.
        settings: `SETTING=VALUE` for `runs`, instead of the remedies of their diagnoses.
        again: whether to submit a run although it would fail, or has failed twice, the same way.
        leave_out: whether to go on without a run that cannot be submitted.

    Raises:
        UserError: a run cannot be submitted (unless `leave_out`), a setting is invalid or belongs to the
            signature, or an active run processes the same dataset with other settings.
    """
    related: dict[str, Run] = {}
    for run in runs:
        _add_needs(store, run, related)
    processing = (
        validate.processing_runs(store) if any("processing_run" in r.info for r in related.values()) else []
    )
    state_of = states([*related.values(), *processing])
    active = [each for each in processing if state_of[each.id].active]
    named = {run.id for run in runs}
    skipped: list[Submitted] = []
    refused: list[UserError] = []
    groups: dict[str, dict[str, PlannedRetry]] = {}
    seen: set[str] = set()
    for run in runs:
        try:
            run.check_format()
            unfinished = _unfinished(store, run, state_of)
            if not unfinished:
                skipped.append(Submitted(run, FINISHED if state_of[run.id].finished else "active"))
                continue
            _check_mine(run)
            executor = _executor_of(run)
            for need in unfinished.values():
                if (other := _executor_of(need)) != executor:
                    raise UserError(
                        f"{run.id} needs {need.id}, a run of cluster.executor={other}: retry {need.id} first"
                    )
            new = {
                key: _plan_one(each, state_of[key], settings if key in named else (), again)
                for key, each in unfinished.items()
                if key not in seen
            }
            validate.check_no_conflict([planned.run for planned in new.values()], active)
        except UserError as error:
            if not leave_out:
                raise
            refused.append(error)
            continue
        seen |= new.keys()
        groups.setdefault(executor, {}).update(new)
    for executor in groups:
        EXECUTORS[executor].check_available()
    by_executor = {executor: list(group.values()) for executor, group in groups.items()}
    return RetryPlan(skipped, by_executor, state_of, refused)


@owner_writes()
def send_retry(store: RunStore, plan: RetryPlan) -> list[Submitted]:
    """Submit a plan; the runs of an executor together, so that those of a sweep are one job array again.

    Returns:
        One entry per run of `plan.skipped`, then one per run that was submitted.

    Raises:
        JobsRefused: Slurm refused a job; the others are submitted.
    """
    start_queued(store, [entry.run for entry in plan.skipped])
    entries = list(plan.skipped)
    errors: list[UserError] = []
    for executor, group in plan.groups.items():
        for planned in group:
            run, attempt = planned.run, planned.run.attempt
            status = plan.state_of[run.id]
            known = not status.reason.startswith(UNKNOWN_CAUSE)  # two unknown causes are not the same failure
            if attempt and attempt.submitted and not attempt.outcome and known:
                # Slurm forgets its jobs; the next diagnosis compares with this one.
                attempt.end(status.name, status.reason, ended=last_seen(attempt))
            if planned.changes:
                store.create(run.id, planned.frozen, run.info)
        runs = [planned.run for planned in group]
        actions, refused = start_attempts(store, runs, executor, plan.state_of)
        errors += refused
        entries += [Submitted(run, actions[run.id]) for run in runs]
    if errors:
        raise JobsRefused(errors, entries)
    return entries


def _executor_of(run: Run) -> str:
    """Return the executor that can start a run again.

    Raises:
        UserError: it was run in the foreground, or its config is damaged.
    """
    executor = run.executor()
    if not EXECUTORS[executor].in_background:
        raise UserError(f"{run.id} was run by cluster={executor}: run the same command again to resume it")
    return executor


def _check_mine(run: Run) -> None:
    run.check_mine("retry it", f"have {run.owner} retry it, or submit it in another workspace=FOLDER")


def _plan_one(run: Run, status: State, settings: Sequence[str], again: bool) -> PlannedRetry:
    _check_mine(run)
    run.executor()  # raises if the config is damaged
    diagnosis, frozen = diagnose(run, status=status), run.frozen()
    if settings:
        changed = _with_settings(run, frozen, settings)
        names = [_name(_for_stage(line, frozen, run)) for line in settings]
        changes = {name: (_value(frozen, name), _value(changed, name)) for name in names}
        return PlannedRetry(run, diagnosis, changes, changed)
    remedy = diagnosis.remedy if diagnosis and not again else {}
    if diagnosis and not remedy and not again:
        _check_changed(run, diagnosis)
    changed, changes = copy.deepcopy(frozen), {}
    for name, value in remedy.items():
        changes[name] = _value(frozen, name), value
        *groups, last = name.split(".")
        node = changed
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return PlannedRetry(run, diagnosis, changes, changed)


def _check_changed(run: Run, diagnosis: Diagnosis) -> None:
    """Raise if the run would fail the same way again, as far as its attempts show."""
    kind = class_of(diagnosis.kind)
    attempts = run.attempts()
    if kind.passing or diagnosis.continues:
        return
    if kind.certain and (diagnosis.kind != HOST_MEMORY or run.executor() == "slurm"):  # here memory is shared
        problem = "would fail again, since nothing has changed"
    elif len(attempts) > 1 and diagnosis.is_same(diagnose(run, attempts[-2])) and not _is_new_code(run):
        problem = "failed twice the same way"
    else:
        return
    raise UserError(
        f"{run.id} {problem} ({quoted(diagnosis.text)}): {diagnosis.command}; "
        "retry it with SETTING=VALUE, or unchanged with --again"
    )


def _is_new_code(run: Run) -> bool:
    code = run.attempt.submitted.get("code") if run.attempt else None
    return bool(code) and code != code_version()


def _with_settings(run: Run, frozen: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return the frozen config with other values.

    Raises:
        UserError: an invalid setting, or one that makes it another run.
    """
    from hpc_imagenet.config.compose import with_overrides  # Hydra takes 0.2 s to import

    config = from_dict(frozen)
    changed = with_overrides(config, [_for_stage(line, frozen, run) for line in settings])
    stage = STAGES[config.stage.name]
    if stage.run_id(changed) != stage.run_id(config) or _other_place(changed, config):
        raise UserError(
            f"{' '.join(settings)} makes it another run than {run.id}: submit it with that setting instead"
        )
    cluster = cluster_for(changed, stage.name)
    stage.check_settings(changed, cluster)
    shares_loader = stage.loader_key(changed) is not None
    EXECUTORS[cluster.executor].check_settings(stage.name, cluster, shares_loader)
    return asdict(changed)


def _other_place(changed: Config, config: Config) -> bool:
    """Whether other settings say which run it is, or where: not part of the signature, yet not of a retry."""
    return any(
        getattr(changed, name) != getattr(config, name)
        for name in ("workspace", "stage", "dataset", "datastore", "sweep")
    ) or (changed.cluster.executor != config.cluster.executor)


def _for_stage(line: str, frozen: dict[str, Any], run: Run) -> str:
    """Return `cluster.X=V` as `cluster.stage.<stage>.X=V` if the run's stage has its own value of X."""
    name, equals, value = line.partition("=")
    group, _, rest = name.lstrip("+").partition(".")
    if group == "cluster" and rest and "." not in rest:
        name = cluster_setting(frozen, str(run.info.get("stage")), rest)[0]
    return f"{name}{equals}{value}"


def _name(line: str) -> str:
    return line.partition("=")[0].lstrip("+")


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _shown(value: Any) -> str:
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _add_needs(store: RunStore, run: Run, found: dict[str, Run]) -> None:
    """Add to `found` all runs that `run` needs, and `run` itself."""
    if run.id not in found:
        found[run.id] = run
        for need in map(store.run, run.info.get("needs", ())):
            _add_needs(store, need, found)


def _unfinished(store: RunStore, run: Run, state_of: Mapping[str, State]) -> dict[str, Run]:
    """Return all runs that `run` needs and that failed, were cancelled or wait, then `run` itself, by id."""
    found: dict[str, Run] = {}
    if state_of[run.id].active or state_of[run.id].finished:
        return found
    for need in map(store.run, run.info.get("needs", ())):
        if need.attempt:
            found |= _unfinished(store, need, state_of)
    run.check_format()
    return {**found, run.id: run}
