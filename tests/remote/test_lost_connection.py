"""A slow connection to the host, which is cut in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Gate, eventually
from laptop import Laptop, Terminal, running_host
from relay import Relay

pytestmark = pytest.mark.slow


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay().running() as relay:
        relay.delay = 0.1  # 200 ms there and back
        yield relay


@pytest.fixture
def laptop(tmp_path: Path, relay: Relay) -> Iterator[Laptop]:
    with running_host(tmp_path / "home", relay):
        laptop = Laptop(tmp_path / "laptop", tmp_path / "home")
        yield laptop
        relay.delay = 0
        laptop.close()


def gated(gate: tuple[Gate, str], name: str) -> tuple[str, ...]:
    """Return the settings of a download that waits at a gate."""
    return (f"dataset.source={gate[1]}/{name}", f"dataset.name={name}", "dataset=ilsvrc", "+stage=download")


def test_a_lost_connection_ends_the_view_and_nothing_else(
    laptop: Laptop, relay: Relay, gate: tuple[Gate, str]
) -> None:
    process = laptop.start(*gated(gate, "one"), "wait=true")
    assert process.stdout is not None
    eventually(lambda: gate[0].waiting == ["one"])
    relay.cut()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 255
    assert "submitted" in out
    assert err.splitlines()[-1] == (
        "connection to there lost: jobs there go on; python -m hpc_imagenet jobs shows what was submitted, "
        "and the same command submits the rest, nothing twice"
    )
    assert "already running" in laptop.process(*gated(gate, "one")).stdout
    laptop.write_log("download-one", "a line of the job")
    for on_terminal in (False, True):
        view = ("logs", "download-one", "-f")
        if on_terminal:
            terminal = Terminal(laptop, *view)
            terminal.read_until("a line of the job")
            relay.cut()
            code, shown = terminal.wait(), terminal.output
        else:
            process = laptop.start(*view)
            assert process.stdout is not None
            assert any("a line of the job" in line for line in process.stdout)
            relay.cut()
            shown, code = process.communicate(timeout=60)[1], process.returncode
        assert code == 255
        assert shown.splitlines()[-1] == (
            "connection to there lost: jobs there go on; look again with "
            "python -m hpc_imagenet logs download-one -f"
        )
    assert [row["state"] for row in laptop.jobs()] == ["running"]
    process = laptop.start(*view)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    laptop.process("cancel", "download-one")


def test_cuts_while_code_is_sent_and_runs_are_pulled(laptop: Laptop, relay: Relay) -> None:
    relay.cut_at = [40_000]
    done = laptop.process("+stage=download", "dataset=digits", "wait=true", code=None)
    if done.returncode == 255:  # cut before or after the code was sent
        laptop.process("+stage=download", "dataset=digits", "wait=true")
    assert relay.cut_at == []
    (run,) = laptop.runs()
    there = laptop.there / "workspace/runs" / run
    (there / "checkpoints").mkdir()
    (there / "token").write_text("secret")
    (there / "datastore").symlink_to(laptop.there / "code")
    content = {name: os.urandom(2_000_000) for name in ("last.ckpt", "previous.ckpt", "best.ckpt")}
    for name, data in content.items():
        (there / "checkpoints" / name).write_bytes(data)
    laptop.process("pull", run, "--results")
    here = laptop.cwd / "pulled/runs" / run
    assert not (here / "checkpoints").exists()
    assert not (here / "token").exists()
    assert not (here / "datastore").exists()
    pulling = laptop.start("pull", "download", "--json")
    eventually(lambda: any(p.stat().st_size > 200_000 for p in here.glob("checkpoints/.last.ckpt.*")))
    relay.cut()
    shown, err = pulling.communicate(timeout=120)
    assert pulling.returncode == 0, err
    assert "retry in" in err
    assert f'"folder": "pulled/runs/{run}"' in shown
    assert (here / "checkpoints/last.ckpt").read_bytes() == content["last.ckpt"]
    assert not (here / "checkpoints/previous.ckpt").exists()
    assert (here / "run.json").read_text() == (there / "run.json").read_text()
    # A pulled run is one of a workspace here.
    local = laptop.process("jobs", "cluster=local", "workspace=pulled").stdout
    assert all(part in local for part in run.split("-", 1))
    assert "finished" in local
    assert "no run nope in" in laptop.process("pull", "nope", code=2).stderr


def test_a_command_takes_no_more_round_trips_than_ssh_needs(laptop: Laptop, relay: Relay) -> None:
    """A shared connection is open: a session is opened and the command sent, and the answer comes back.

    1.5 times these two round trips are three: the third is the end of the session, which is not waited for.
    """
    relay.delay = 0
    laptop.process("+stage=download", "dataset=digits", "wait=true")
    relay.delay = 0.1
    for words in (("jobs",), ("jobs", "--json"), ("report",), ("show", "download-digits")):
        relay.round_trips = 0
        laptop.process(*words)
        assert 1 <= relay.round_trips <= 3, words
