"""Environments of child processes: which variables are left out."""

from __future__ import annotations

import os

import pytest

from hpc_imagenet.io.child_environment import environment_without_secrets

SECRET = (
    "SLURM_JWT",
    "GITHUB_TOKEN",
    "AZURE_DEVOPS_EXT_PAT",
    "MYSQL_PWD",
    "RCLONE_CONFIG_PASS",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
)
PLAIN = ("PATH", "PWD", "OLDPWD", "LD_LIBRARY_PATH", "SLURM_JOB_ID", "SSH_AUTH_SOCK", "PASSENGERS")


def test_variables_that_hold_a_secret_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRET + PLAIN:
        monkeypatch.setenv(name, os.environ.get(name, "value"))
    found = environment_without_secrets()
    assert [name for name in SECRET + PLAIN if name in found] == list(PLAIN)
