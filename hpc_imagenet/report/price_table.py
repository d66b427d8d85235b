"""The prices of trainings as a table of at most 80 columns, and what would make them lower."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpc_imagenet.cluster.free_nodes import FreeNode
from hpc_imagenet.io.printable import one_line
from hpc_imagenet.launch.pricing.price import DATA, NETWORK, Price, sweep_seconds, tasks_of
from hpc_imagenet.launch.pricing.search_price import SearchPrice
from hpc_imagenet.launch.pricing.time_limits import search_needs
from hpc_imagenet.report.durations import clock
from hpc_imagenet.report.run_summary import amount

WIDTH = 80  # columns
_MEMORY = 0.9  # share of cluster.memory_gb from which it is scarce
_LEAST = 8  # columns of a run's name at least: its signature
_START = re.compile(r"to start at (\d+-(\d+-\d+))T(\d+:\d+)")


@dataclass(frozen=True)
class PriceReport:
    """The prices of a submission, and what Slurm says about them.

    Attributes:
        prices: the trainings, in their order; of a search its possible trials.
        search: the whole search; None: there is none.
        starts: reply of `sbatch --test-only` by run id; empty without Slurm.
        free: nodes of the partition, by the ids of trainings that wait for data on Slurm.
    """

    prices: Sequence[Price]
    search: SearchPrice | None = None
    starts: Mapping[str, str] = field(default_factory=dict)
    free: Mapping[str, Sequence[FreeNode]] = field(default_factory=dict)

    def notes(self, each: Price) -> list[str]:
        """Return lines about limits, data, memory, network, copies and refusals of one training."""
        return _notes_of(each, self.starts.get(each.job.run_id, ""), self.free.get(each.job.run_id, ()))

    def as_json(self) -> dict[str, Any]:
        """Return JSON values: `trainings`, and the whole; null: unknown, or not set. Times are in s.

        Of a search the whole is as if each trial trains to its end.
        """
        priced = [each for each in self.prices if each.known]
        whole = self.search
        return {
            "trainings": [self._row(each) for each in self.prices],
            "search": asdict(whole) if whole else None,
            "seconds": whole.seconds if whole else sweep_seconds(priced),
            **_hours(whole.hours if whole else sum(each.device_hours for each in priced), priced),
            "kwh": whole.kwh if whole else _sum([each.energy for each in priced]),
            "money": whole.money if whole else _sum([each.money for each in priced]),
        }

    def _row(self, each: Price) -> dict[str, Any]:
        found = _START.search(self.starts.get(each.job.run_id, ""))
        return {
            "run": each.job.run_id,
            "label": each.job.label,
            "state": each.state.name if each.free else None,
            "seconds": each.total.wall,
            **_hours(each.device_hours, [each] if each.known else []),
            "starts": each.starts if each.known and math.isfinite(each.starts) else None,
            "enough_time": not each.too_long,
            "bound": each.known.bound if each.known else None,
            "kwh": each.energy,
            "money": each.money,
            "start": f"{found[1]}T{found[3]}" if found else None,
            "timed_by": each.known.record.run if each.known else None,
            "notes": self.notes(each),
        }


def _hours(hours: float, priced: Sequence[Price]) -> dict[str, float | None]:
    on_gpus = any(each.gpus for each in priced)
    return {"gpu_hours": hours if on_gpus else None, "cpu_hours": None if on_gpus else hours}


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def print_prices(report: PriceReport, console: Console) -> None:
    """Print a row for each training, the whole sweep or search, and advice."""
    console.print(price_table(report.prices, report.starts))
    for line in [_total(report.prices, report.search), *_limit_of_search(report), *_notes(report)]:
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


def _total(prices: Sequence[Price], search: SearchPrice | None) -> str:
    """Return the line of the whole submission."""
    priced = [each for each in prices if each.known]
    unit = "GPU-h" if any(each.gpus for each in priced) else "CPU-h"
    if search:
        return _search_total(search, unit)
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


def _search_total(search: SearchPrice, unit: str) -> str:
    """Return the line of a whole search."""
    if not search.trials and search.rest == 0:
        return f"search.budget={search.budget:g} is spent: no trial begins"
    if not search.trials:
        return "no trial of the search is left: more search.trials would continue it"
    who = f"{amount(search.trials, search.noun)} by {amount(search.workers, 'workers')}"
    who += f", {search.at_once} at a time" if search.at_once < search.workers else ""
    parts = [f"{_cost(search, unit, 1.0)} if each trains to its end"]
    if search.share is not None:
        parts.insert(0, f"about {_cost(search, unit, search.share)} if two of three end at each rung")
    if search.budget is not None:
        parts.append(f"no trial begins after search.budget={search.budget:g}")
    return f"{who}: {' · '.join(parts)}"


def _cost(search: SearchPrice, unit: str, share: float) -> str:
    """Return time, hours, money and energy of a share of a search."""
    *parts, last = [
        clock(share * search.seconds),
        f"{_number(share * search.hours)} {unit}",
        *([] if search.money is None else [f"money {_number(share * search.money)}"]),
        *([] if search.kwh is None else [f"{_number(share * search.kwh)} kWh"]),
    ]
    return f"{', '.join(parts)} and {last}"


def _limit_of_search(report: PriceReport) -> list[str]:
    """Return a line if the workers of a search would not end all trials within their time limits."""
    search, cluster = report.search, report.prices[0].job.cluster
    if search is None or any(each.too_long for each in report.prices):
        return []
    fix = search_needs(search, report.prices)
    limits = f"cluster.time={cluster.time} and {report.prices[0].allowed - 1:g} requeues"
    return [f"{limits} are too short for all trials; {fix} would do"] if fix else []


def _notes(report: PriceReport) -> list[str]:
    """Return the notes of all trainings, each once for equal runs."""
    lines: dict[str, list[str]] = {}
    for each in report.prices:
        for line in report.notes(each):
            lines.setdefault(line, []).append(each.job.label)
    return [f"{', '.join(dict.fromkeys(labels))}: {line}" for line, labels in lines.items()]


def _notes_of(each: Price, start: str, free: Sequence[FreeNode]) -> list[str]:
    if each.known is None:
        return []
    lines, cluster, record = [], each.job.cluster, each.known.record
    if each.too_long:
        lines.append(
            f"cluster.time={cluster.time} and {each.allowed - 1:g} requeues are too short; "
            f"{each.settings_needed} would do"
        )
    if each.known.bound == DATA:
        fix = f": {record.suggestion} would make the loader fast enough" if record.suggestion else ""
        lines.append(f"waits for data {record.waiting or 0:.0%} of the time{fix}{_now_free(each, free)}")
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


def _now_free(each: Price, nodes: Sequence[FreeNode]) -> str:
    """Return how many nodes have the CPUs now that would make the loader fast enough, and the memory."""
    assert each.known is not None
    needed = re.fullmatch(r"cluster\.cpus_per_task=(\d+)", each.known.record.suggestion)
    if not needed or not nodes:
        return ""
    cluster = each.job.cluster
    cpus, memory = int(needed[1]) * tasks_of(each.job) // cluster.nodes, cluster.memory_gb or 0
    found = [node.name for node in nodes if node.cpus >= cpus and node.memory >= memory]
    what = f"{cpus} free CPUs and {memory:g} GiB" if memory else f"{cpus} free CPUs"
    names = f" ({', '.join(found[:3])}{' …' if len(found) > 3 else ''})" if found else ""
    return f"; {len(found)} of {amount(len(nodes), 'nodes')} have {what} now{names}"


def _start(reply: str) -> str:
    """Return when Slurm expects a start: the time if that is today, else month and day."""
    found = _START.search(reply)
    if not found:
        return ""
    return found[3] if found[1] == date.today().isoformat() else found[2]


def _number(value: float) -> str:
    """Return a number with three significant digits, at most two of them after the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
