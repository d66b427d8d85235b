"""From a laptop to a finished run on Slurm with two commands, through an sshd of the login node."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lab import LAB, Lab
from laptop import Laptop
from servers import SSHD, keys_for_ssh


def test_two_commands_from_a_laptop(lab: Lab, tmp_path: Path) -> None:
    if SSHD is None:
        pytest.skip("sshd is missing: apt-get install openssh-server")
    home = tmp_path / "home"
    home.mkdir()
    path = f"{lab.env['PATH']}:/usr/sbin"
    variables = {
        "HOME": home,
        "PATH": path,
        "SLURM_CONF": lab.env["SLURM_CONF"],
        "HPC_IMAGENET_LAB": lab.folder,
    }
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    # This machine has no route into the lab, so sshd runs over a pipe.
    inside = f"{LAB} --dir {lab.folder} login {SSHD} -i -f {home}/sshd_config"
    keys_for_ssh(home, f"SetEnv {settings}\n", f" ProxyCommand {inside}\n")
    laptop = Laptop(tmp_path / "laptop", home)
    (laptop.user / "hpc_imagenet.yaml").unlink()
    laptop.env = {name: value for name, value in laptop.env.items() if "SLURM" not in name}
    host = [line.replace(": ", "=") for line in laptop.host.splitlines()]
    # The lab's nodes claim GPUs, CPUs and memory that this machine does not have.
    real = ["cluster.gpus_per_node=0", "cluster.cpus_per_task=1", "cluster.memory_gb=8G"]
    try:
        done = laptop.process("doctor", "--write", "mine", "dataset=digits", *host, *real)
        assert "made it the default cluster" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("cluster.host: there is stored in")
        shown = laptop.process("+stage=download", "dataset=digits", "wait=true").stdout
        assert shown.startswith("cluster: slurm · ")
        (row,) = laptop.jobs()
        assert row["state"] == "finished"
        submitted = json.loads((Path(row["dir"]) / "attempts/1/submitted.json").read_text())
        assert submitted["executor"] == "slurm"
        assert submitted["code"]["folder"].startswith(str(laptop.there))
        # A session is reached through the host as it is named on the laptop.
        frozen = (Path(row["dir"]) / "config.yaml").read_text()
        assert re.search(r"^  host: there$", frozen, re.MULTILINE)
        assert not laptop.workspace.exists()
        assert (home / ".config/hpc_imagenet/cluster/mine.yaml").exists()
    finally:
        laptop.close()
