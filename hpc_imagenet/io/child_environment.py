"""Environments of child processes: without secrets that they do not need."""

from __future__ import annotations

import os
import re

_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|SSHPASS|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|COOKIE|WEBHOOK|NOTIFY"
    r"|JWT|STORAGE_?KEY|CONNECTION_?STRING|_(PAT|PWD|PASS)$|^HPC_IMAGENET_HEADER$",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"PATH|HOME|TMPDIR|LANG|LC_\w+|LD_\w+|JSIMD_\w+")


def plain_environment() -> dict[str, str]:
    """Return what a program needs that converts its standard input, such as jpegtran."""
    return {name: value for name, value in os.environ.items() if _PLAIN.fullmatch(name)}


def environment_without_secrets() -> dict[str, str]:
    """Return the environment without the variables whose names say that they hold a secret."""
    return {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
