"""Two runs compared: settings that differ, the state of their code, and their results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import one_line
from hpc_imagenet.report.jobs_table import job_rows
from hpc_imagenet.report.show.config_leaves import config_leaves, short_hash
from hpc_imagenet.runs.attempt import is_number
from hpc_imagenet.runs.store import Run

NOT_SET = "not set"  # in a config of another version, or of another stage
_LONG = 200  # characters of a value that are printed


def compare_runs(run: Run, other: Run) -> dict[str, Any]:
    """Return how two runs differ.

    Returns:
        runs (both ids), settings (of each setting that differs, by its full name: both values), code
        (`same`, and both states: commit, version and the hash of the difference to the commit) and results
        (by name: both values; None where a run has none).

    Raises:
        UserError: the frozen config of one of them is missing or damaged.
    """
    configs = [dict(config_leaves(each.readable_config())) for each in (run, other)]
    if unreadable := [each.id for each, config in zip((run, other), configs, strict=True) if not config]:
        raise UserError(
            f"{unreadable[0]}: its config.yaml is missing or damaged: submit the run again, which writes it"
        )
    names = dict.fromkeys(name for config in configs for name in config)
    pairs = {name: [config.get(name, NOT_SET) for config in configs] for name in names}
    code = [_code(each) for each in (run, other)]
    results = [_results(row) for row in job_rows([run, other])]
    return {
        "runs": [run.id, other.id],
        "settings": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "code": {"same": code[0] == code[1], "states": code},
        "results": {
            name: [each.get(name) for each in results]
            for name in dict.fromkeys(name for each in results for name in each)
        },
    }


def render_comparison(found: dict[str, Any]) -> RenderableType:
    """Return the result of `compare_runs` as tables for a terminal."""
    settings, results = (_table(name, *found["runs"]) for name in ("setting", "result"))
    for name, pair in found["settings"].items():
        settings.add_row(*_cells(name, *pair))
    if not found["settings"]:
        settings.add_row("none differs")
    first, second = found["code"]["states"]
    for name in dict.fromkeys([*first, *second]):
        settings.add_row(*_cells(f"code: {name}", first.get(name, "none"), second.get(name, "none")))
    if not first or not second:
        settings.add_row("code", *("" if state else "unknown" for state in (first, second)))
    results.add_column("change", justify="right")
    for name, pair in found["results"].items():
        if pair == [None, None]:
            continue
        results.add_row(*_cells(name, *map(_short, pair)), escape(_change(*pair)))
    return Group(settings, "", results)


def _table(heading: str, first: str, second: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (heading, first, second):
        table.add_column(escape(one_line(name)), overflow="fold")
    return table


def _cells(*values: Any) -> tuple[str, ...]:
    texts = [one_line(value) for value in values]
    return tuple(escape(text if len(text) <= _LONG else f"{text[:_LONG]}…") for text in texts)


def _code(run: Run) -> dict[str, str]:
    """Return the code state of the newest attempt; empty if it is unknown."""
    attempt = run.attempt
    code = attempt.submitted.get("code") if attempt else None
    if not isinstance(code, dict):
        return {}
    state = {name: str(code[name]) for name in ("commit", "version") if code.get(name)}
    if patch := code.get("difference"):
        try:
            state["difference"] = short_hash(Path(str(patch)).read_bytes().decode(errors="replace"))
        except OSError:
            state["difference"] = f"{patch} cannot be read"
    return state


def _results(row: dict[str, Any]) -> dict[str, Any]:
    """Return state and result of a row of `job_rows`; nested values, such as lists, are left out."""
    result = {name: value for name, value in row["result"].items() if not isinstance(value, (dict, list))}
    return {"state": row["state"], "reason": row["reason"] or None, "duration s": row["seconds"], **result}


def _change(first: Any, second: Any) -> str:
    if not (is_number(first) and is_number(second)):
        return ""
    return f"{second - first:+.4g}" if first != second else ""


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
