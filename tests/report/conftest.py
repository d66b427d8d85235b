"""Run folders of trainings that never ran, as benchmarks/report_page.py writes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import Cli

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # for fake_trainings


@pytest.fixture
def sweep(cli: Cli) -> Cli:
    """A workspace of 20 trainings with 12 classes: 17 finished, one failed, one running, one queued."""
    from fake_trainings import write_trainings

    write_trainings(cli.workspace, 20, classes=12, epochs=5)
    return cli
