"""Send a message when a run has ended, and when all runs of a submission have, through Apprise.

`notify` names an environment variable or a file of mode 600; the URLs in it hold secrets, so they appear in
no config, record, log or error. The process that sees the end of a run sends its message: on Slurm the last
line of the job's script (requeue.py), else the local worker or the foreground command. A message that cannot
be sent is one warning, and never fails a run.

    runs/.user-<uid>/submissions/<id>.json           runs of one command that were submitted together
    runs/.user-<uid>/submissions/<id>-<hash>.sent    written by the process that sends the message of its end
    attempts/<n>/submission               id of the submission
    attempts/<n>/notified.json            written by the process that sends the message of this attempt
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from hpc_imagenet.config.setting import is_variable
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home, read_private
from hpc_imagenet.io.atomic_files import read_json, write_json, write_json_once
from hpc_imagenet.runs.attempt import FAILED, FINISHED, Attempt
from hpc_imagenet.runs.job import signature
from hpc_imagenet.runs.store import Run, RunStore

_FOLDER = "submissions"
_MOST_LINES = 20  # of runs in one message


def check(notify: str | None, elsewhere: bool = False) -> None:
    """Check at submission that the message can be sent.

    Args:
        notify: the setting.
        elsewhere: whether the jobs run in a container, with other packages than here.

    Raises:
        UserError: no such variable or file, other users may read it, no URL that Apprise knows, or Apprise is
            not installed.
    """
    if notify is None:
        return
    urls = read_urls(notify)
    if elsewhere:
        return
    if importlib.util.find_spec("apprise") is None:
        raise UserError(
            f"notify={notify} needs the package apprise: pip install -c constraints.txt -e '.[notify]'"
        )
    _service(urls, notify)


def read_urls(notify: str) -> list[str]:
    """Return the URLs that `notify` names: one a line, lines with # are comments.

    Raises:
        UserError: as in `check`; it never quotes a URL.
    """
    if "://" in notify:
        raise UserError(
            "notify must not be the URL, which holds a secret: write it to a file of mode 600 and set "
            "notify=FILE, or to an environment variable and set notify=NAME"
        )
    if is_variable(notify):
        text = os.environ.get(notify, "")
        if not text.strip():
            raise UserError(
                f"notify={notify}: this environment variable is not set: export {notify}=URL, or set "
                "notify=FILE, a path with a / or a ."
            )
    else:
        text = read_private(expand_home(notify), "notify")
    lines = [line.strip() for line in text.splitlines()]
    urls = [line for line in lines if line and not line.startswith("#")]
    if not urls:
        raise UserError(f"notify={notify} holds no URL: write one a line")
    return urls


def _service(urls: Sequence[str], notify: str) -> Any:
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # its errors may quote a URL
    service = apprise.Apprise()
    for number, url in enumerate(urls, 1):
        if not service.add(url):
            raise UserError(
                f"notify={notify}: Apprise does not know URL {number} of {len(urls)}: its forms are at "
                "https://github.com/caronc/apprise/wiki"
            )
    return service


def record_submission(store: RunStore, attempts: Sequence[tuple[Run, Attempt]]) -> None:
    """Record which attempts were submitted together, if one of them is to send messages."""
    if not any(run.frozen().get("notify") for run, _ in attempts[:1]):
        return
    name = f"{time.time_ns():020d}"
    folder = store.make_own_folder(_FOLDER)
    write_json(folder / f"{name}.json", [run.id for run, _ in attempts])
    for _, attempt in attempts:
        (attempt.folder / "submission").write_text(name)


def run_ended(run: Run, attempt: Attempt) -> None:
    """Send the messages that an ended attempt leads to; nothing if it has not ended, or was announced.

    Of a submission of several runs only failures are announced one by one.
    """
    try:
        outcome = attempt.outcome
        notify = run.frozen().get("notify") if outcome else None
        if outcome is None or not notify:
            return
        read_urls(notify)  # another process may have the variable that this one does not have
        if not write_json_once(attempt.folder / "notified.json", {}):
            return
        runs = _submission(run, attempt)
        if len(runs) == 1 or outcome.state == FAILED:
            _send(notify, f"{run.id}: {outcome.state}", _line(run), success=outcome.state == FINISHED)
        if len(runs) > 1:
            _submission_ended(run, attempt, runs, notify)
    except UserError as error:
        print(f"warning: no message was sent: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # its text may quote the URL
        print(f"warning: no message was sent ({type(error).__name__})", file=sys.stderr, flush=True)


def _submission(run: Run, attempt: Attempt) -> list[Run]:
    """Return the runs that were submitted together with this attempt."""
    try:
        name = (attempt.folder / "submission").read_text()
    except FileNotFoundError:
        return [run]
    store = RunStore(run.folder.parents[1])
    return [
        store.run(run_id) for run_id in read_json(store.own_folder / _FOLDER / f"{name}.json") or [run.id]
    ]


def _submission_ended(run: Run, attempt: Attempt, runs: Sequence[Run], notify: str) -> None:
    """Send one message if no run of the submission is active any more."""
    from hpc_imagenet.launch.states import state  # here: the executors behind it import this module

    ended: list[str] = []
    results: dict[str, str] = {}
    for each in reversed(runs):  # the last ones end last, so most calls return at the first
        newest = each.attempt
        outcome = newest.outcome if newest else None
        name = outcome.state if outcome else (current := state(each)).name
        if outcome is None and not current.ended:
            return
        results[each.id] = name
        ended.append(f"{each.id}/{newest.number if newest else 0}")
    name = (attempt.folder / "submission").read_text()
    # After a retry of some runs the end is announced again.
    sent = RunStore(run.folder.parents[1]).own_folder / _FOLDER / f"{name}-{signature(sorted(ended))}.sent"
    if not write_json_once(sent, {}):
        return
    finished = sum(name == FINISHED for name in results.values())
    others = [each for each in runs if results[each.id] != FINISHED]
    shown = [*others, *(each for each in runs if results[each.id] == FINISHED)]
    lines = [_line(each) for each in shown[:_MOST_LINES]]
    more = [f"and {len(shown) - _MOST_LINES} more"] if shown[_MOST_LINES:] else []
    sweep = (run.info.get("sweeps") or [""])[-1]
    title = f"{sweep or 'submission'}: {finished} of {len(runs)} runs finished"
    _send(notify, title, "\n".join([*lines, *more]), success=finished == len(runs))


def _line(run: Run) -> str:
    """Return one line: id, state, reason or top-1."""
    attempt = run.attempt
    outcome = attempt.outcome if attempt else None
    if outcome is None:
        return f"{run.id}  ended without an outcome"
    top1 = (outcome.result or {}).get("top1")
    result = f"top-1 {100 * top1:.2f} %" if top1 is not None else outcome.reason
    line = f"{run.id}  {outcome.state}{f'  {result}' if result else ''}"
    return "".join(each if each.isprintable() else " " for each in line)


def _send(notify: str, title: str, text: str, success: bool) -> None:
    service = _service(read_urls(notify), notify)
    import apprise

    kind = apprise.NotifyType.SUCCESS if success else apprise.NotifyType.FAILURE
    if not service.notify(body=text, title=title, notify_type=kind, body_format=apprise.NotifyFormat.TEXT):
        raise UserError(f"a server that notify={notify} names did not accept it, or cannot be reached")
