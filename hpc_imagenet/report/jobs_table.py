"""Job table: one row per run, as data or as lines for a terminal, optionally until all runs have ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hpc_imagenet.io.printable import one_line
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.retries.diagnosis import failure_class
from hpc_imagenet.launch.states import states
from hpc_imagenet.launch.watched_runs import WatchedRuns
from hpc_imagenet.report.durations import seconds_between, span
from hpc_imagenet.report.run_summary import best_top1, describe, seconds_left
from hpc_imagenet.report.terminal_text import Line, columns, fit, print_lines
from hpc_imagenet.runs.attempt import (
    CANCELLED,
    ENDED,
    FAILED,
    FINISHED,
    PRUNED,
    QUEUED,
    RUNNING,
    Attempt,
    instant,
)
from hpc_imagenet.runs.run_records import RecordCache, RunRecord, read_run
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.runs.usage_records import last_seen

COLOURS = {QUEUED: "yellow", RUNNING: "cyan", FINISHED: "green", FAILED: "red", CANCELLED: "magenta"}
COLOURS[PRUNED] = "blue"
_HEADER = ("id", "label", "state", "progress, result or reason", "top-1", "nodes", "age")
_DETAILS = 24  # columns that progress, result or reason get at least
_LABEL, _NODES = 24, 10  # columns of label and nodes at most
_SHRINK = ((1, 18), (5, 5), (1, 12))  # columns that become so narrow, one after the other, to make space


def job_rows(runs: Iterable[Run], since: float | None = None) -> list[dict[str, Any]]:
    """Return one row per run, in the given order.

    Args:
        runs: the runs.
        since: when polling began, as in `states.states`; None: no polling.

    Returns:
        Rows with run, id, label, stage, model, sweeps, state, failure (its class, see
        `launch.retries.diagnosis`), reason, top1 (0 to 1, None before the end),
        best_top1 (of all validations so far), result, dir, attempt, requeued (times Slurm restarted the
        attempt), executor, job_id, shares_with (ids of the runs that
        share its loader), nodes, created, changed (when it was submitted, started or ended last),
        age (s since created), seconds (duration so far, or in total), progress (see `runs.store.Progress`)
        and seconds_left.
    """
    runs = list(runs)
    return _rows(runs, {run.id: read_run(run) for run in runs}, since)


def workspace_rows(store: RunStore, cache: RecordCache, since: float | None = None) -> list[dict[str, Any]]:
    """Return the rows of all runs of a workspace, oldest first; records of ended runs come from `cache`."""
    runs = store.unsorted()
    records = cache.read(runs)
    cache.save(runs)
    # A folder that was deleted meanwhile has no records any more.
    runs = [run for run in runs if run.id in records]
    runs = [run for run in runs if records[run.id].info or records[run.id].attempt or run.folder.is_dir()]
    runs.sort(key=lambda run: (str(records[run.id].info.get("created", "")), run.id))
    return _rows(runs, records, since)


def _rows(runs: Sequence[Run], records: dict[str, RunRecord], since: float | None) -> list[dict[str, Any]]:
    state_of = states([run for run in runs if records[run.id].outcome is None], since)
    table = []
    for run in runs:
        record = records[run.id]
        if record.outcome is None and not state_of[run.id].active:
            record = read_run(run)  # it has ended since it was read
        if outcome := record.outcome:
            status = State(outcome.state, outcome.reason, record.started.get("restarts", 0))
        else:
            status = state_of[run.id]
        table.append(_row(run, record, status))
    return table


def _row(run: Run, record: RunRecord, status: State) -> dict[str, Any]:
    info, outcome, started = record.info, record.outcome, record.started
    run_id, _, label = run.id.partition("-")
    result = (outcome.result if outcome else None) or {}
    times = [instant(each.get("time")) for each in (record.submitted, started)]
    ended = instant(outcome.time) if outcome else None
    if ended is None and status.ended:  # by Slurm, or with its machine
        ended = last_seen(Attempt(run.folder / "attempts" / str(record.attempt)))
    times = [instant(info.get("created")), *times, ended]
    created, _, began, _ = times
    row = {
        "run": run.id,
        "id": run_id,
        "label": info.get("label") or label,
        "stage": info.get("stage"),
        "model": info.get("model"),
        "sweeps": _texts(info.get("sweeps")),
        "state": status.name,
        "failure": failure_class(status.name, status.reason),
        "reason": status.reason or ("" if info else "run.json is missing or damaged"),
        "top1": result.get("top1"),
        "best_top1": best_top1(result, record.progress),
        "result": result,
        "dir": str(run.folder),
        "attempt": record.attempt,
        "requeued": status.restarts,
        "executor": record.submitted.get("executor"),
        "job_id": record.submitted.get("job_id"),
        "shares_with": _texts(record.submitted.get("shares_with")),
        "nodes": str(started.get("nodes") or started.get("host") or "").partition(".")[0],
        "created": info.get("created"),
        "changed": max(filter(None, times)).isoformat() if any(times) else None,
        "age": seconds_between(created, None),
        "seconds": seconds_between(began, ended) if began and (ended or not outcome) else None,
        "progress": record.progress,
    }
    row["seconds_left"] = seconds_left(row)
    return row


def _texts(value: Any) -> list[str]:
    """Return a list of texts in a record; empty if there is something else, such as in a damaged one."""
    return list(map(str, value)) if isinstance(value, list) else []


def table_lines(table: Sequence[dict[str, Any]], width: int | None) -> list[Line]:
    """Return a header and one line per row of `job_rows`.

    Args:
        table: the rows.
        width: columns of the terminal, which no line exceeds; None: nothing is cut.
    """
    cells = [_cells(row) for row in table]
    widths = [max(map(columns, column)) for column in zip(_HEADER, *cells, strict=True)]
    if width is not None:
        widths[1], widths[5] = min(widths[1], _LABEL), min(widths[5], _NODES)
        free = width - len(widths) + 1 - sum(widths) + widths[3]
        for index, least in _SHRINK:
            short = min(max(0, _DETAILS - free), max(0, widths[index] - least))
            widths[index], free = widths[index] - short, free + short
        widths[3] = max(1, min(widths[3], free))
    lines = [[(_joined(_HEADER, widths), "bold")]]
    for row, line in zip(table, cells, strict=True):
        before, after = _joined(line[:2], widths), _joined(line[3:], widths[3:])
        lines.append(
            [(f"{before} ", ""), (fit(line[2], widths[2]), COLOURS[row["state"]]), (f" {after}", "")]
        )
    return lines


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    top1 = row["best_top1"]
    cells = (
        row["id"],
        row["label"],
        row["state"],
        describe(row),
        "" if top1 is None else f"{100 * top1:.2f}",
    )
    return (*map(one_line, cells), one_line(row["nodes"]), span(row["age"]))


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " ".join(fit(cell, width) for cell, width in zip(cells, widths, strict=False))


def print_jobs(table: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows of `job_rows`: on a terminal in its width, else whole."""
    print_lines(table_lines(table, console.width if console.is_terminal else None), console)


def watch(runs: Sequence[Run], console: Console, every: float = 0.5) -> bool:
    """Show the runs until all have ended: a live table on a terminal, else a line per change of state.

    Runs that wait because of a limit of submitted jobs are submitted when others have ended. A local worker
    that was killed is started again.

    Args:
        runs: the runs.
        console: where the table is printed.
        every: s between two updates.

    Returns:
        Whether all runs finished.
    """
    began, watched = time.monotonic(), WatchedRuns()

    def rows() -> list[dict[str, Any]]:
        watched.keep_going(runs)
        return job_rows(runs, began)

    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                table = rows()
                lines = table_lines(table, console.width)
                live.update(Text("\n").join(Text.assemble(*line) for line in lines), refresh=True)
                if _all_ended(table):
                    break
                time.sleep(every)
    else:
        shown: dict[str, str] = {}
        while True:
            table = rows()
            for row in table:
                if shown.get(row["run"]) != row["state"]:
                    shown[row["run"]] = row["state"]
                    text = one_line(describe(row)) if row["state"] != RUNNING else ""
                    print(f"{row['state']:9}  {one_line(row['run'])}  {text}".rstrip(), flush=True)
            if _all_ended(table):
                break
            time.sleep(every)
    return all(row["state"] == FINISHED for row in table)


def terminal() -> Console:
    """Return the console for tables; 240 columns if piped, so that rows are not wrapped."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240, highlight=False)


def _all_ended(table: Sequence[dict[str, Any]]) -> bool:
    return all(row["state"] in ENDED for row in table)
