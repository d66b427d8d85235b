"""What a run does, or how it ended, in a few words for a row of the job table."""

from __future__ import annotations

from typing import Any

from hpc_imagenet.launch.retries.diagnosis import failure_words
from hpc_imagenet.report.durations import clock, span
from hpc_imagenet.runs.attempt import FINISHED, QUEUED, RUNNING, is_number

_SHORT = {"images": "img", "bytes": "B"}  # units
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def best_top1(result: dict[str, Any], progress: dict[str, Any]) -> float | None:
    """Return the highest validation accuracy of a training so far, 0 to 1; None before the first."""
    values = result.get("top1"), progress.get("top1")
    return max((float(value) for value in values if is_number(value)), default=None)


def seconds_left(row: dict[str, Any]) -> float | None:
    """Return the s until a running run ends at its present rate; None if that is unknown."""
    done, total, rate = (row["progress"].get(key) for key in ("done", "total", "rate"))
    known = row["state"] == RUNNING and all(map(is_number, (done, total, rate)))
    return max(0.0, (total - done) / rate) if known and rate > 0 else None


def describe(row: dict[str, Any]) -> str:
    """Return the reason, the progress or the result of a row of `jobs_table.job_rows`."""
    if row["reason"]:
        text = ": ".join(
            filter(None, [failure_words(row.get("failure", ""), str(row["reason"])), str(row["reason"])])
        )
    elif row["state"] == FINISHED:
        text = summary(row["stage"], row["result"])
    elif row["state"] == RUNNING:
        text = _progress(row)
    else:
        text = ""
    more = [f"attempt {row['attempt']}"] if row["attempt"] > 1 else []
    if row["state"] in (QUEUED, RUNNING) and (others := row.get("shares_with")):
        more.append(f"shares a loader with {len(others)}")
    if times := row["requeued"]:
        more.append(f"requeued {times} {'time' if times == 1 else 'times'}")
    return " · ".join([text, *more] if text else more)


def _progress(row: dict[str, Any]) -> str:
    progress = row["progress"]
    done, total, rate = (progress.get(key) for key in ("done", "total", "rate"))
    if not is_number(done):
        return "starting"
    unit, note = (str(progress.get(key) or "") for key in ("unit", "note"))
    unit = _SHORT.get(unit, unit)
    parts = [f"{min(1.0, done / total):.0%}"] if is_number(total) and total > 0 else []
    if (left := row["seconds_left"]) is not None:
        parts.append(f"{span(left)} left")
    if is_number(rate) and rate > 0:
        parts.append(f"{amount(rate, unit)}/s")
    if unit == "B" or not (parts or note):
        whole = f" of {amount(total, unit)}" if is_number(total) else ""
        note = (f"{note} · " if note else "") + f"{amount(done, unit)}{whole}"
    return " ".join(parts) + (f" · {note}" if parts and note else note)


def summary(stage: str | None, result: dict[str, Any]) -> str:
    """Return a stage's result in a few words."""

    def count(key: str, unit: str) -> str:
        value = result.get(key)
        return amount(value, unit) if is_number(value) and value else ""

    skipped = [f"{text} skipped"] if (text := count("skipped", "images")) else []
    if stage == "download":
        present = result.get("downloaded") == 0 and "bytes" in result
        parts = [count("bytes", "B"), "complete already" if present else ""]
    elif stage == "process":
        parts = [count("images", "images"), count("classes", "classes"), *skipped]
    elif stage == "upload":
        parts = [str(result.get("datastore") or ""), count("images", "images"), count("bytes", "B")]
    elif stage == "train":
        time = result.get("seconds")
        parts = [count("epochs", "epochs"), f"in {clock(time)}" if is_number(time) else ""]
        parts = [
            " ".join(filter(None, parts)),
            f"{speed}/s" if (speed := count("images_per_second", "img")) else "",
        ]
        parts = [*(["at chance"] if result.get("learned") is False else []), *parts, *skipped]
    elif stage == "evaluate":
        source = " of ".join(str(result[key]) for key in ("split", "datastore") if result.get(key))
        top5 = result.get("top5")
        parts = [source, count("images", "images"), f"top-5 {100 * top5:.2f} %" if is_number(top5) else ""]
        parts += skipped
    elif stage == "search":
        budget, best = result.get("budget"), result.get("trial")
        spent = f"search.budget={budget:g} is spent" if is_number(budget) else ""
        parts = [count("trials", "trials"), spent, f"best so far {best}" if best else ""]
    elif stage == "price":
        parts = [f"{count('images_per_second', 'img')}/s"]
    elif stage == "session":
        parts = [str(result.get("ended") or ""), count("minutes", "minutes")]
    else:
        parts = [f"{key} {value}" for key, value in result.items()]
    return " · ".join(filter(None, parts))


def amount(value: float, unit: str) -> str:
    """Return a number with its unit: 1 epoch, 1,234 images, 1.3 M images, 154.6 GB."""
    unit = unit.removesuffix("s") if value == 1 else unit
    for limit, letter in _PREFIXES:
        if value >= limit:
            return f"{value / limit:.1f} {letter}{'' if unit == 'B' else ' '}{unit}".rstrip()
    number = f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
    return f"{number} {unit}".rstrip()
