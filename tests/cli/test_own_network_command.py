"""A user's own network from the command line: queued jobs do not see later edits."""

from __future__ import annotations

import pytest
from command_line import Cli

pytestmark = pytest.mark.slow

NETWORK = """
from torch import nn

def build(num_classes, width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )
"""
SMALL = ("dataset=digits", "recipe=demo", "recipe.epochs=1", "cluster=local", "cluster.gpus_per_node=0")


def test_a_queued_training_runs_the_network_as_it_was_submitted(cli: Cli) -> None:
    file = cli.cwd / "own_cli.py"
    file.write_text(NETWORK)
    command = ("+stage=pipeline", "model=own_cli:build", *SMALL)
    cli(*command)
    file.write_text("raise SystemExit('edited')\n" + NETWORK.replace("3, 2", "5, 2"))
    jobs = cli.until(*["finished"] * 4)
    assert jobs[-1]["model"] == "own_cli:build"
    assert jobs[-1]["run"].endswith("-own_cli-build")
    runs = cli.runs()
    cli(*command)  # the edited network is another training, of the same data
    assert len(cli.runs()) == len(runs) + 1
    edited = cli.until(*["finished"] * 4, "failed")[-1]
    assert "edited" in edited["reason"]
    file.write_text(NETWORK)
    assert "already finished" in cli(*command).stdout
    assert len(cli.runs()) == len(runs) + 1


def test_what_is_wrong_with_a_network_is_one_line_at_submission(cli: Cli) -> None:
    (cli.cwd / "own_cli.py").write_text(NETWORK)
    for model, message in (
        ("own_cli:buidl", "own_cli.py has no buidl; did you mean: build"),
        ("own_clip:build", "no module own_clip in the current folder"),
        ("timm/resnet19", "did you mean: timm/resnet18"),
    ):
        assert message in cli.refused(f"model={model}", *SMALL)
