"""Messages at the end of runs and submissions, to a webhook on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, eventually
from servers import free_port
from webhook import TOKEN, Webhook

from hpc_imagenet.launch.tasks import notification
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, Attempt
from hpc_imagenet.runs.store import Run, RunStore

pytestmark = pytest.mark.slow

pytest.importorskip("apprise", reason="apprise is not installed")


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook().serve() as served:
        yield served


@pytest.fixture
def secret(tmp_path: Path, webhook: Webhook) -> Path:
    return write_secret(tmp_path / "webhook.txt", f"# the lab's channel\n{webhook.url}\n")


def write_secret(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


def submission(tmp_path: Path, notify: Path | str, count: int) -> list[tuple[Run, Attempt]]:
    store = RunStore(tmp_path / "workspace")
    config = {"cluster": {"executor": "local"}, "stage": {"name": "train"}, "notify": str(notify)}
    info = {"stage": "train", "label": "net", "needs": []}
    runs = [store.create(f"0000000{index}-net", config, info) for index in range(count)]
    attempts = [(run, run.new_attempt()) for run in runs]
    notification.record_submission(store, attempts)
    return attempts


def end(pair: tuple[Run, Attempt], state: str, **details: Any) -> None:
    pair[1].end(state, **details)
    notification.run_ended(*pair)


def test_jobs_of_the_local_queue_send_messages(cli: Cli, secret: Path, webhook: Webhook) -> None:
    """Failures at once, and the end of the submission."""
    settings = ("cluster=local", "dataset=ilsvrc", "download.retries=0")
    cli("+stage=pipeline", "dataset.source=/nowhere", "dataset.name=a", *settings, f"notify={secret}")
    eventually(lambda: len(webhook.messages) == 2)
    failed, whole = webhook.messages
    assert failed["title"].endswith("-download-a: failed")
    assert "/nowhere" in failed["message"]
    assert whole["title"] == "submission: 0 of 4 runs finished"
    assert [line.split()[1] for line in whole["message"].splitlines()].count("cancelled") == 3
    assert (failed["type"], whole["type"]) == ("failure", "failure")
    for path in cli.workspace.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_run_in_the_foreground_sends_one_message(cli: Cli, webhook: Webhook) -> None:
    cli.env["LAB_WEBHOOK"] = webhook.url
    cli("+stage=download", "dataset=digits", "cluster=foreground", "notify=LAB_WEBHOOK")
    (message,) = webhook.messages
    assert message["title"].endswith("-download-digits: finished")
    cli("+stage=download", "dataset=digits", "cluster=foreground", "notify=LAB_WEBHOOK")
    assert len(webhook.messages) == 1  # nothing was submitted


def test_a_failing_message_fails_no_run(cli: Cli) -> None:
    cli.env["LAB_WEBHOOK"] = f"json://127.0.0.1:{free_port()}/{TOKEN}"
    done = cli.process("+stage=download", "dataset=digits", "cluster=foreground", "notify=LAB_WEBHOOK")
    assert done.stderr.count("warning: no message was sent: a server that notify=LAB_WEBHOOK names") == 1
    assert TOKEN not in done.stdout + done.stderr
    assert cli.states() == ["finished"]


def test_a_sweep_sends_its_failures_and_its_end_once(tmp_path: Path, secret: Path, webhook: Webhook) -> None:
    first, second, third = submission(tmp_path, secret, 3)
    end(first, FINISHED, result={"top1": 0.7614})
    assert webhook.titles == []
    end(second, FAILED, reason="loss is nan \x1b[31m<b>")
    assert webhook.titles == ["00000001-net: failed"]
    assert webhook.messages[0]["message"] == "00000001-net  failed  loss is nan  [31m<b>"
    end(third, FINISHED, result={"top1": 0.5})
    notification.run_ended(*third)  # another process sees the same end
    assert webhook.titles[1:] == ["submission: 2 of 3 runs finished"]
    assert webhook.messages[1]["message"].splitlines() == [
        "00000001-net  failed  loss is nan  [31m<b>",
        "00000000-net  finished  top-1 76.14 %",
        "00000002-net  finished  top-1 50.00 %",
    ]
    run = second[0]  # a retry is a submission of its own
    again = (run, run.new_attempt())
    notification.record_submission(RunStore(tmp_path / "workspace"), [again])
    end(again, FINISHED)
    assert webhook.titles[2:] == ["00000001-net: finished"]


def test_a_requeue_sends_nothing(tmp_path: Path, secret: Path, webhook: Webhook) -> None:
    (only,) = submission(tmp_path, secret, 1)
    notification.run_ended(*only)
    assert webhook.titles == []
    end(only, CANCELLED, reason="by the cancel command")
    assert webhook.titles == ["00000000-net: cancelled"]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (f"json://host/{TOKEN}", "notify must not be the URL, which holds a secret"),
        ("NO_SUCH_VARIABLE", "notify=NO_SUCH_VARIABLE: this environment variable is not set"),
        ("missing.txt", "missing.txt cannot be read (No such file or directory)"),
        ("open.txt", "holds a secret and other users may read it (mode 644): chmod 600"),
        ("empty.txt", "holds no URL"),
        ("unknown.txt", "Apprise does not know URL 1 of 1"),
    ],
)
def test_a_bad_notify_is_refused_without_its_secret(cli: Cli, value: str, line: str) -> None:
    write_secret(cli.cwd / "open.txt", f"json://host/{TOKEN}").chmod(0o644)
    write_secret(cli.cwd / "empty.txt", "# nothing\n")
    write_secret(cli.cwd / "unknown.txt", f"carrier-pigeon://{TOKEN}")
    refused = cli.refused("+stage=download", "dataset=digits", "cluster=local", f"notify={value}")
    assert line in refused
    assert TOKEN not in refused


def test_notify_cannot_be_swept(cli: Cli) -> None:
    assert "notify cannot be swept" in cli.refused("-m", "dataset=digits", "notify=./a,./b")
