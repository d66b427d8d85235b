"""The table of jobs: one row a run, for people and for programs; watched until all have ended."""

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
    """Return what is known of each run, in the given order; `since` as in `states.states`.

    Each row has run, stage, model, state, reason, top1 (0 to 1, None before the end), dir, attempt,
    requeued (times that Slurm has started the attempt again), created, seconds (since the job began, or how
    long it took) and progress (see `runs.Progress`).
    """
    runs = list(runs)
    told = states(runs, since)
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
                "state": told[run.id].name,
                "reason": told[run.id].reason,
                "top1": result.get("top1"),
                "result": result,
                "dir": str(run.folder),
                "attempt": attempt.number if attempt else 0,
                "requeued": told[run.id].restarts,
                "created": info.get("created"),
                "seconds": _seconds(began, outcome.time if outcome else None),
                "progress": run.progress,
            }
        )
    return table


def render_jobs(table: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table for a terminal."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "stage", "state", "time"):
        drawn.add_column(name, no_wrap=True)
    drawn.add_column("progress", overflow="fold")
    for row in table:
        colour = _COLOURS[row["state"]]
        again = f" (attempt {row['attempt']})" if row["attempt"] > 1 else ""
        if times := row["requeued"]:
            again += f" (requeued {times} {'time' if times == 1 else 'times'})"
        drawn.add_row(
            escape(row["run"]),
            row["stage"],
            f"[{colour}]{row['state']}[/]{again}",
            clock(row["seconds"]),
            escape(_words(row)),
        )
    return drawn


def watch(runs: Sequence[Run], console: Console, every: float = 0.5) -> bool:
    """Show the table until every run has ended; on a terminal it is live, elsewhere a line a change.

    Returns:
        Whether all ended well.
    """
    began = time.monotonic()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                table = job_rows(runs, began)
                live.update(render_jobs(table), refresh=True)
                if _over(table):
                    break
                time.sleep(every)
    else:
        shown: dict[str, str] = {}
        while True:
            table = job_rows(runs, began)
            for row in table:
                if shown.get(row["run"]) != row["state"]:
                    shown[row["run"]] = row["state"]
                    words = _words(row) if row["state"] != RUNNING else ""
                    print(f"{row['state']:9}  {row['run']}  {words}".rstrip(), flush=True)
            if _over(table):
                break
            time.sleep(every)
    return all(row["state"] == FINISHED for row in table)


def clock(seconds: float | None) -> str:
    """Return a duration as 0:07, 12:05 or 3:04:09; empty for None."""
    if seconds is None:
        return ""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def terminal() -> Console:
    """Return the console for tables; wide enough that piped rows are not folded."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240, highlight=False)


def _over(table: Sequence[dict[str, Any]]) -> bool:
    return all(row["state"] in (FINISHED, FAILED, CANCELLED) for row in table)


def _words(row: dict[str, Any]) -> str:
    if row["reason"]:
        return str(row["reason"])
    if row["state"] == FINISHED:
        return summary(row["result"])
    if row["state"] != RUNNING:
        return ""
    done, total, unit = (row["progress"].get(key) for key in ("done", "total", "unit"))
    if done is None:
        return "starting"
    share = f"{done / total:4.0%} " if total else ""
    note = row["progress"].get("note") or f"{_number(done)} {unit}"
    if unit == "B" and total:
        note += f" · {_amount(done, unit)} of {_amount(total, unit)}"
    rate = row["progress"].get("rate")
    if not rate:
        return f"{share}{note}"
    left = f" · {clock((total - done) / rate)} left" if total else ""
    return f"{share}{note} · {_amount(rate, unit)}/s{left}"


def summary(result: dict[str, Any]) -> str:
    """Return a stage's result in a few words."""
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
