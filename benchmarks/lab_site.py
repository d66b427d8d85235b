"""A private Slurm cluster (slurm/lab) and the command line on it, for benchmarks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LAB = Path(__file__).resolve().parent.parent / "slurm/lab/lab"


class LabSite:
    """A lab in a folder, which also has the workspaces."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lab = folder, folder / "lab"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "HPC_IMAGENET_"))}
        self.env |= {
            "PATH": f"{self.lab}/bin:{os.environ['PATH']}",
            "SLURM_CONF": f"{self.lab}/etc/slurm.conf",
        }

    def run(self, *command: str) -> tuple[float, str]:
        """Run a command; return its duration in s and its stdout."""
        begin = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=self.env, check=False
        )
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return seconds, done.stdout

    def command(self, *words: str, workspace: str = "workspace") -> tuple[float, str]:
        """Run `python -m hpc_imagenet` on a workspace of this site."""
        there = f"workspace={self.folder / workspace}"
        return self.run(sys.executable, "-m", "hpc_imagenet", *words, there)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start the lab, and stop it at the end."""
        try:
            self.run(str(LAB), "--dir", str(self.lab), "up")
            yield
        finally:
            self.run(str(LAB), "--dir", str(self.lab), "down")
