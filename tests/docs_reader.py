"""The pages of README.md and docs/, and a folder in which their commands are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from command_line import Cli
from fake_slurm import write_command

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent
SMALL = "shufflenet_v2_x0_5"


STAGES = ("download", "process", "upload", "train")


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def commands(page: Path) -> list[str]:
    """Return the commands of a page, without the comments behind them."""
    lines = "".join(blocks(page, "sh")).splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]


class Reader:
    """Runs the commands of the pages in a folder of its own, with stub Slurm commands."""

    def __init__(self, folder: Path) -> None:
        self.cli = Cli(folder / "workspace")
        self.folder = folder
        self.lab = folder / "lab"
        stubs = folder / "stubs"
        stubs.mkdir()
        # sbatch logs its arguments and prints a job id; the queue is empty, so no job ever runs.
        # With --test-only it submits nothing.
        test_only = "[[ $* == *--test-only* ]] && exit"
        write_command(
            stubs, "sbatch", f'{test_only}; echo "$@" >> {stubs}/sbatch.log; echo Submitted batch job $$'
        )
        write_command(stubs, "srun", "true")
        write_command(stubs, "squeue", "true")
        write_command(stubs, "scancel", "true")
        self.sbatch_log = stubs / "sbatch.log"
        self.cli.env |= {"PATH": os.pathsep.join([str(stubs), str(BIN), os.environ["PATH"]])}
        for name in ("conf", "slurm"):
            shutil.copytree(ROOT / name, folder / name)

    def run_shell(self, command: str, cwd: Path | None = None, code: int = 0, **env: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=cwd or self.folder,
            env={**self.cli.env, **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def submitted(self) -> list[str]:
        return self.sbatch_log.read_text().splitlines() if self.sbatch_log.exists() else []

    @property
    def digits(self) -> Path:
        """Archives in the ImageNet layout, in a folder of the user."""
        folder = self.folder / "archives"
        if not folder.exists():
            self.run_shell(f"python -m hpc_imagenet.demo.digits {folder}")
        return folder

    def make_datastore(self) -> None:
        """Make the datastore of the digits, unless an earlier command has."""
        if not (self.cli.workspace / "datastores/digits").exists():
            for stage in STAGES[:3]:
                self.cli(f"+stage={stage}", "dataset=digits", "cluster=foreground")

    def submit_one_more(self) -> str:
        """Return the id of a new run that does not end at once."""
        words = ["dataset=digits", "cluster=local", f"model={SMALL}", f"seed={1000 + len(self.cli.runs())}"]
        before = set(self.cli.runs())
        self.cli(*words)
        (run,) = set(self.cli.runs()) - before
        return run
