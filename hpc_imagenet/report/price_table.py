"""The prices of trainings as a table of at most 80 columns, and what would make them lower."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpc_imagenet.io.printable import one_line
from hpc_imagenet.launch.price import DATA, NETWORK, Price, sweep_seconds, tasks_of
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.run_summary import amount

WIDTH = 80  # columns
_MEMORY = 0.9  # share of cluster.memory_gb from which it is scarce
_LEAST = 8  # columns of a run's name at least: its signature
_START = re.compile(r"to start at (\d+-(\d+-\d+))T(\d+:\d+)")


def print_prices(prices: Sequence[Price], starts: Mapping[str, str], console: Console) -> None:
    """Print a row for each training, the whole sweep, and advice.

    Args:
        prices: the trainings, in their order.
        starts: reply of `sbatch --test-only` by run id; empty without Slurm.
        console: where to print.
    """
    console.print(price_table(prices, starts))
    for line in [_total(prices), *_notes(prices, starts)]:
        console.print(escape(one_line(line)), soft_wrap=True)


def price_table(prices: Sequence[Price], starts: Mapping[str, str]) -> Table:
    """Return the table; columns that no training fills are left out."""
    on_gpus = any(each.gpus for each in prices)
    columns = {
        "time": [clock(each.total.wall) if each.known else each.state.name for each in prices],
        "GPU-h" if on_gpus else "CPU-h": [
            _number(each.device_hours) if each.known else "" for each in prices
        ],
        "starts": ["" if each.allowed == float("inf") else f"{each.starts:g}" for each in prices],
        "bound": [each.known.bound if each.known else "" for each in prices],
        "kWh": ["" if each.energy is None else _number(each.energy) for each in prices],
        "money": ["" if each.money is None else _number(each.money) for each in prices],
        "start": [_start(starts.get(each.job.run_id, "")) for each in prices],
        "timed by": [each.known.record.run.partition("-")[0] if each.known else "" for each in prices],
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    widths = [max(map(len, (name, *cells))) + 2 for name, cells in shown.items()]
    free = max(_LEAST, WIDTH - sum(widths))
    table.add_column("run", no_wrap=True, max_width=free)
    for name in shown:
        table.add_column(name, justify="left" if name == "bound" else "right", no_wrap=True)
    for each, *cells in zip(prices, *shown.values(), strict=True):
        table.add_row(escape(one_line(each.job.run_id)), *cells)
    return table


def _total(prices: Sequence[Price]) -> str:
    """Return the line of the whole submission."""
    priced = [each for each in prices if each.known]
    unit = "GPU-h" if any(each.gpus for each in priced) else "CPU-h"
    parts = [amount(len(prices), "trainings")]
    if free := len(prices) - len(priced):
        parts.append(f"{free} of them free: finished, or running already")
    if priced:
        parts += [f"done after {clock(sweep_seconds(priced))} without queues"]
        parts += [f"{_number(sum(each.device_hours for each in priced))} {unit}"]
    money = [each.money for each in priced if each.money is not None]
    energy = [each.energy for each in priced if each.energy is not None]
    parts += [f"money {_number(sum(money))}"] if money else []
    parts += [f"{_number(sum(energy))} kWh"] if energy else []
    return " · ".join(parts)


def _notes(prices: Sequence[Price], starts: Mapping[str, str]) -> list[str]:
    """Return lines about limits, data, memory, network, copies and refusals, each once for equal runs."""
    lines: dict[str, list[str]] = {}
    for each in prices:
        for line in _notes_of(each, starts.get(each.job.run_id, "")):
            lines.setdefault(line, []).append(each.job.label)
    return [f"{', '.join(dict.fromkeys(labels))}: {line}" for line, labels in lines.items()]


def _notes_of(each: Price, start: str) -> list[str]:
    if each.known is None:
        return []
    lines, cluster, record = [], each.job.cluster, each.known.record
    if each.too_long:
        lines.append(
            f"cluster.time={cluster.time} and {each.allowed - 1:g} requeues are too short; "
            f"cluster.time={each.minutes_needed} would do"
        )
    if each.known.bound == DATA:
        fix = f": {record.suggestion} would make the loader fast enough" if record.suggestion else ""
        lines.append(f"waits for data {record.waiting or 0:.0%} of the time{fix}")
    if each.known.bound == NETWORK:
        lines.append("its steps take longer than on one GPU alone: the network between the tasks bounds it")
    tasks, timed = tasks_of(each.job), int(record.shape["nodes"]) * int(record.shape["tasks"])
    if tasks > timed:
        lines.append(f"one of {tasks} tasks was timed, so the network between them is not in the time")
    here = tasks // cluster.nodes
    memory = record.memory / int(record.shape["tasks"]) * here / 2**30
    if cluster.memory_gb and memory > _MEMORY * cluster.memory_gb:
        lines.append(
            f"takes {memory:.1f} of {cluster.memory_gb:g} GiB of memory: "
            f"cluster.memory_gb={int(1.3 * memory) + 1} would be safe"
        )
    if record.staged:
        cached, whole = record.staged
        found = (
            "a staged copy is" if cached == whole else f"{amount(cached, 'B')} of {amount(whole, 'B')} are"
        )
        lines.append(f"{found if cached else 'no staged copy is'} on {record.host} already")
    if start and not _START.search(start):
        lines.append(f"sbatch --test-only: {start}")
    return lines


def _start(reply: str) -> str:
    """Return when Slurm expects a start: the time if that is today, else month and day."""
    found = _START.search(reply)
    if not found:
        return ""
    return found[3] if found[1] == date.today().isoformat() else found[2]


def _number(value: float) -> str:
    """Return a number with three significant digits, at most two of them after the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
