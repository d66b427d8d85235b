"""A fake Slurm, and the command line on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import write_slurm


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """The folder of the fake commands, in which they also keep what they were given."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    write_slurm(folder)
    return folder


@pytest.fixture
def cluster(tmp_path: Path, commands: Path) -> Cli:
    """The command line with the fake commands on the PATH."""
    return Cli(tmp_path / "workspace", path=f"{commands}:{os.environ['PATH']}")
