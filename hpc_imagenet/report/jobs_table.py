"""Job table: one row per run, as data or for a terminal, optionally updated until all runs have ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from hpc_imagenet.launch.states import states
from hpc_imagenet.runs.store import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING, Run

_COLOURS = {QUEUED: "yellow", RUNNING: "cyan", FINISHED: "green", FAILED: "red", CANCELLED: "magenta"}


def job_rows(runs: Iterable[Run], since: float | None = None) -> list[dict[str, Any]]:
    """Return one row per run, in the given order.

    Args:
        runs: the runs.
        since: when polling began, as in `states.states`; None: no polling.

    Returns:
        Rows with run, stage, model, state, reason, top1 (0 to 1, None before the end), result, dir, attempt,
        requeued (times Slurm restarted the attempt), created, seconds (duration so far, or in total) and
        progress (see `runs.store.Progress`).
    """
    runs = list(runs)
    state_of = states(runs, since)
    table = []
    for run in runs:
        info, attempt = run.info, run.attempt
        outcome = attempt.outcome if attempt else None
        result = (outcome.result if outcome else None) or {}
        began = attempt.started.get("time") if attempt else None
        table.append(
            {
                "run": run.id,
                "stage": info.get("stage"),
                "model": info.get("model"),
                "state": state_of[run.id].name,
                "reason": state_of[run.id].reason,
                "top1": result.get("top1"),
                "result": result,
                "dir": str(run.folder),
                "attempt": attempt.number if attempt else 0,
                "requeued": state_of[run.id].restarts,
                "created": info.get("created"),
                "seconds": _seconds(began, outcome.time if outcome else None),
                "progress": run.progress,
            }
        )
    return table


def render_jobs(table: Sequence[dict[str, Any]]) -> Table:
    """Return the rows of `job_rows` as a table for a terminal."""
    rendered = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "stage", "state", "time"):
        rendered.add_column(name, no_wrap=True)
    rendered.add_column("progress", overflow="fold")
    for row in table:
        colour = _COLOURS[row["state"]]
        suffix = f" (attempt {row['attempt']})" if row["attempt"] > 1 else ""
        if times := row["requeued"]:
            suffix += f" (requeued {times} {'time' if times == 1 else 'times'})"
        rendered.add_row(
            escape(row["run"]),
            row["stage"],
            f"[{colour}]{row['state']}[/]{suffix}",
            clock(row["seconds"]),
            escape(_describe(row)),
        )
    return rendered


def watch(runs: Sequence[Run], console: Console, every: float = 0.5) -> bool:
    """Show the runs until all have ended: a live table on a terminal, else a line per change of state.

    Args:
        runs: the runs.
        console: where the table is printed.
        every: s between two updates.

    Returns:
        Whether all runs finished.
    """
    began = time.monotonic()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                table = job_rows(runs, began)
                live.update(render_jobs(table), refresh=True)
                if _all_ended(table):
                    break
                time.sleep(every)
    else:
        shown: dict[str, str] = {}
        while True:
            table = job_rows(runs, began)
            for row in table:
                if shown.get(row["run"]) != row["state"]:
                    shown[row["run"]] = row["state"]
                    text = _describe(row) if row["state"] != RUNNING else ""
                    print(f"{row['state']:9}  {row['run']}  {text}".rstrip(), flush=True)
            if _all_ended(table):
                break
            time.sleep(every)
    return all(row["state"] == FINISHED for row in table)


def clock(seconds: float | None) -> str:
    """Return a duration in s as 0:07, 12:05 or 3:04:09; empty for None."""
    if seconds is None:
        return ""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def terminal() -> Console:
    """Return the console for tables; 240 columns if piped, so that rows are not wrapped."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240, highlight=False)


def _all_ended(table: Sequence[dict[str, Any]]) -> bool:
    return all(row["state"] in (FINISHED, FAILED, CANCELLED) for row in table)


def _describe(row: dict[str, Any]) -> str:
    if row["reason"]:
        return str(row["reason"])
    if row["state"] == FINISHED:
        return summary(row["result"])
    if row["state"] != RUNNING:
        return ""
    done, total, unit = (row["progress"].get(key) for key in ("done", "total", "unit"))
    if done is None:
        return "starting"
    percent = f"{done / total:4.0%} " if total else ""
    note = row["progress"].get("note") or f"{_number(done)} {unit}"
    if unit == "B" and total:
        note += f" · {_amount(done, unit)} of {_amount(total, unit)}"
    rate = row["progress"].get("rate")
    if not rate:
        return f"{percent}{note}"
    left = f" · {clock((total - done) / rate)} left" if total else ""
    return f"{percent}{note} · {_amount(rate, unit)}/s{left}"


def summary(result: dict[str, Any]) -> str:
    """Return a one-line summary of a stage's result."""
    if "top1" in result:
        speed = result.get("images_per_second")
        return f"top-1 {result['top1']:.2%}" + (f" · {_number(speed)} images/s" if speed else "")
    return " · ".join(
        f"{key} {_number(v) if isinstance(v, (int, float)) else v}" for key, v in result.items()
    )


def _number(value: float) -> str:
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.1f} {letter}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def _amount(value: float, unit: str) -> str:
    number = _number(value)
    return f"{number}{unit}" if unit == "B" and number[-1].isalpha() else f"{number} {unit}"


def _seconds(began: str | None, ended: str | None) -> float | None:
    if began is None:
        return None
    end = datetime.fromisoformat(ended) if ended else datetime.now(timezone.utc)
    return (end - datetime.fromisoformat(began)).total_seconds()
