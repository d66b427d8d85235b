"""The environment on the host, made by a real `pip install -c constraints.txt` over a real sshd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from laptop import ROOT, Laptop, running_host
from packaging.requirements import Requirement
from packed_wheels import write_wheels

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # minutes of pip


def test_packages_are_installed_in_their_pinned_versions_and_run_commands(tmp_path: Path) -> None:
    """From wheels packed here: whole ones, but of large packages such as torch only name and version."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [*project["project"]["dependencies"], *extras["demo"], *extras["report"], *extras["session"]]
    needed = [each for each in needed if not each.startswith("hpc-imagenet")]  # an extra of another
    versions = write_wheels(tmp_path / "wheels", [*needed, *project["build-system"]["requires"]])
    home = tmp_path / "home"
    with running_host(home):
        laptop = Laptop(tmp_path / "laptop", home)
        laptop.store(laptop.host.replace(f"{home}/python", getattr(sys, "_base_executable", sys.executable)))
        (home / ".config/pip").mkdir(parents=True)
        (home / ".config/pip/pip.conf").write_text(
            f"[global]\nno-index = true\nfind-links = {tmp_path}/wheels\nextra-index-url =\n"
            "[install]\nno-compile = true\n"
        )
        try:
            done = laptop.process("jobs")
            assert done.stdout == f"no runs in {laptop.there}/workspace/runs\n"
            assert "installing the packages of constraints.txt, once" in done.stderr
            (made,) = laptop.there.glob("venv/*/.made")
            installed = packages(made.parent / "bin/python")
            assert installed["torch"] == versions["torch"]
            lines = [line.partition("#")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
            required = [Requirement(line) for line in lines if line.strip()]
            pins = {
                each.name: str(each.specifier).removeprefix("==")
                for each in required
                if each.marker is None or each.marker.evaluate()
            }
            for name in ("hydra-core", "submitit", "jupyterlab", "scikit-learn", "torch"):
                assert installed[name].partition("+")[0] == pins[name]
            # The code is that of the parcel, not an installed copy.
            assert "hpc-imagenet" not in installed
            # The environment is used as it is from then on, for a command that composes a config, too.
            done = laptop.process("+stage=download", "dataset=digits", "dry_run=true")
            assert "nothing was submitted" in done.stdout
            assert done.stderr == ""
        finally:
            laptop.close()


def packages(python: Path) -> dict[str, str]:
    """Return the versions of the packages of an environment by name."""
    command = [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(line.split("==") for line in text.splitlines())
