"""The command tensorboard, and the setting tracker on the command line."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from command_line import Cli, eventually
from servers import free_port

from hpc_imagenet.config.compose import compose
from hpc_imagenet.runs.job import signature
from hpc_imagenet.runs.store import RunStore


def write_run(cli: Cli, name: str, sweep: str | None, curves: bool = True) -> Path:
    info = {"stage": "train", "label": name.partition("-")[2], "sweeps": [sweep] if sweep else []}
    config = {"cluster": {"executor": "local", "login": "login.example.org"}, "stage": {"name": "train"}}
    run = RunStore(cli.workspace).create(name, config, info)
    if curves:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run.folder / "tensorboard")) as writer:
            writer.add_scalar("val_top1", 0.5, 4)
    return run.folder


def served(url: str) -> list[str]:
    with (
        contextlib.suppress(OSError, ValueError),
        urllib.request.urlopen(f"{url}/data/runs", timeout=5) as reply,
    ):
        return sorted(json.loads(reply.read()))
    return []


@pytest.mark.slow
def test_it_serves_a_sweep_and_prints_the_tunnel(cli: Cli) -> None:
    write_run(cli, "00000001-a", "seed-1f0c2e")
    write_run(cli, "00000002-b", "seed-1f0c2e")
    write_run(cli, "00000003-c", None)
    write_run(cli, "00000004-d", "seed-1f0c2e", curves=False)
    port = free_port()
    words = ["tensorboard", "--sweep", "seed-1f0c2e", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "hpc_imagenet", *words],
        cwd=cli.cwd,
        env=cli.env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout
        printed = [server.stdout.readline() for _ in range(3)]
        assert printed[0].startswith("2 runs")
        assert re.search(rf"ssh -N -L {port}:127.0.0.1:{port} \w+@login.example.org$", printed[1].strip())
        url = printed[2].split()[-1]
        eventually(lambda: served(url) == ["00000001-a", "00000002-b"])
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(30)
        if server.stdout:
            server.stdout.close()
    assert code == 0


def test_what_it_refuses(cli: Cli) -> None:
    write_run(cli, "00000001-a", None, curves=False)
    assert "no learning curves in" in cli.refused("tensorboard")
    write_run(cli, "00000002-b", "seed-1f0c2e", curves=False)
    line = cli.refused("tensorboard", "--sweep", "nothing")
    assert line == "error: --sweep nothing: no such sweep; one of: seed-1f0c2e"
    assert "no learning curves in" in cli.refused("tensorboard", "--sweep", "seed")
    assert "no run xyz" in cli.refused("tensorboard", "xyz")


@pytest.mark.slow
def test_trackers_on_the_command_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    line = cli.refused("+stage=pipeline", "dataset=digits", "tracker=wanbd")
    assert "tracker=wanbd is unknown; did you mean: wandb" in line
    assert "tracker=3 is not a name" in cli.refused("+stage=pipeline", "dataset=digits", "tracker=3")
    assert "tracker=wandb,mlflow is a sweep" in cli.refused("dataset=digits", "tracker=wandb,mlflow")
    assert "tracker cannot be swept" in cli.refused("-m", "dataset=digits", "tracker=tensorboard,null")
    monkeypatch.setitem(sys.modules, "trackio", None)  # not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = cli.refused("+stage=pipeline", "dataset=digits", "cluster=local", "tracker=[tensorboard,trackio]")
    assert "pip install -c constraints.txt -e '.[" in line


@pytest.mark.slow
def test_trackers_are_not_part_of_the_signature() -> None:
    identities = [
        signature(compose(["dataset=digits", f"tracker={tracker}"])[0].training_identity())
        for tracker in ("tensorboard", "[wandb,mlflow]", "null")
    ]
    assert len(set(identities)) == 1
