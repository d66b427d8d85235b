"""The attempts of a run: where and how long each ran, how it ended, why it failed, what it used."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hpc_imagenet.io.printable import one_line
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.retries.diagnosis import diagnose
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.show.attempt_times import intervals, nodes_of, starts_of
from hpc_imagenet.report.show.resources import describe_resources, resources_of, slurm_usage
from hpc_imagenet.runs.attempt import ENDED, FAILED, RUNNING, Attempt, record_time
from hpc_imagenet.runs.store import Run
from hpc_imagenet.runs.usage_records import last_seen


def attempt_details(run: Run, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is known of each attempt, oldest first; see `details.run_details`.

    Args:
        run: the run.
        row: its row of `jobs_table.job_rows`.
    """
    attempts = run.attempts()
    usages = slurm_usage(attempts)
    found = []
    for attempt in attempts:
        is_newest = attempt is attempts[-1]
        now = row["state"] if is_newest else ""  # what the attempt does, if it has not ended
        outcome, submitted, started = attempt.outcome, attempt.submitted, attempt.started
        if outcome:
            state, reason = outcome.state, outcome.reason
        elif is_newest:
            state, reason = row["state"], row["reason"]
        else:
            state, reason = FAILED, "ended without an outcome"
        ended = outcome.time if outcome else None
        if outcome is None and state in ENDED and (seen := last_seen(attempt)):
            ended = record_time(seen)
        code = submitted.get("code")
        found.append(
            {
                "number": attempt.number,
                "state": state,
                "reason": reason,
                "executor": submitted.get("executor"),
                "job": submitted.get("job_id"),
                "nodes": nodes_of(attempt),
                "requeued": max(0, len(starts_of(attempt)) - 1),
                "code": code if isinstance(code, dict) else {},
                "submitted": submitted.get("time"),
                "started": started.get("time"),
                "ended": ended,
                "queued_seconds": sum(
                    part.end - part.begin for part in intervals(attempt, now) if part.kind != RUNNING
                ),
                "resources": resources_of(run, attempt, now, usages.get(attempt)),
                "diagnosis": _diagnosis(run, attempt, State(state, reason)),
            }
        )
    return found


def attempt_lines(found: dict[str, Any], with_diagnosis: bool) -> list[str]:
    """Return an attempt in two or three lines for a terminal."""
    job = f"job {found['job']}" if found["job"] and found["executor"] == "slurm" else found["executor"]
    times = found["requeued"]
    code = found["code"]
    parts = [
        found["state"],
        f"{job or 'not submitted'}{' on ' if found['nodes'] else ''}{', '.join(found['nodes'])}",
        f"queued {clock(found['queued_seconds'])}",
        f"requeued {times} {'time' if times == 1 else 'times'}" if times else "",
        f"code {code.get('commit') or code.get('version')}" if code else "",
        f"changed by {code['difference']}" if code.get("difference") else "",
    ]
    lines = [one_line(" · ".join(part for part in parts if part))]
    diagnosis = found["diagnosis"]
    if with_diagnosis and diagnosis:
        lines.append(one_line(diagnosis["text"]))
    if found["started"]:
        lines.append(describe_resources(found["resources"]))
    return lines


def _diagnosis(run: Run, attempt: Attempt, status: State) -> dict[str, Any] | None:
    diagnosis = diagnose(run, attempt, status)
    if diagnosis is None:
        return None
    values = asdict(diagnosis)
    return {"class": values.pop("kind"), **{name: values[name] for name in ("text", "remedy", "command")}}
