"""Files and folders without permission: the error names the owner and a fix."""

from __future__ import annotations

import errno
import importlib
import os
import pwd
import re
from pathlib import Path
from unittest import mock

import pytest
from command_line import Cli
from other_users import unprivileged

import hpc_imagenet.cli.main as cli
from hpc_imagenet.cli.main import main
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch import submission, validate

DIGITS = ("dataset=digits", "cluster=local")


@pytest.mark.parametrize(("folder", "denied"), [("", "it"), ("below", "{locked}")])
def test_permission_error_names_the_owner(
    public_path: Path, capsys: pytest.CaptureFixture[str], folder: str, denied: str
) -> None:
    locked, owner = public_path / "locked", pwd.getpwuid(os.geteuid()).pw_name
    (locked / "below").mkdir(parents=True)
    locked.chmod(0)
    error = PermissionError(errno.EACCES, "Permission denied", str(locked / folder))
    try:
        with (
            unprivileged(),
            mock.patch.object(cli, "run", side_effect=error),
            pytest.raises(SystemExit) as end,
        ):
            main(["jobs"])
        own = os.geteuid() != 0
    finally:
        locked.chmod(0o700)
    fix = (
        "you: change its permissions with chmod u+rwX, or choose another workspace=FOLDER"
        if own
        else f"{owner}: choose another workspace=FOLDER, or have {owner} grant you access"
    )
    assert end.value.code == 2
    line = f"error: {locked / folder}: permission denied; {denied.format(locked=locked)} is owned by {fix}\n"
    assert capsys.readouterr().err == line


def test_permission_error_names_an_unknown_owner_by_uid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
    with (
        mock.patch.object(cli, "run", side_effect=error),
        mock.patch.object(os, "access", return_value=False),
        mock.patch.object(os, "geteuid", return_value=tmp_path.stat().st_uid + 1),
        mock.patch.object(pwd, "getpwuid", side_effect=KeyError),
        pytest.raises(SystemExit),
    ):
        main(["jobs"])
    assert f"it is owned by uid {tmp_path.stat().st_uid}: choose another" in capsys.readouterr().err


def test_permission_error_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    error = PermissionError(errno.EPERM, "Operation not permitted")
    with mock.patch.object(cli, "run", side_effect=error), pytest.raises(SystemExit) as end:
        main(["jobs"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: Operation not permitted: choose another workspace=FOLDER\n"


def test_workspace_of_another_user_is_refused_with_its_owner(public_path: Path) -> None:
    theirs, owner = public_path / "theirs", pwd.getpwuid(os.geteuid()).pw_name
    theirs.mkdir()
    theirs.chmod(0o500)
    with unprivileged(), pytest.raises(UserError) as refusal:
        validate.prepare_workspace(theirs)
    owned = "you: change its permissions with chmod u+rwX" if os.geteuid() else f"{owner}: choose another"
    line = (
        f"workspace={theirs} cannot be written: {theirs / 'runs'}: permission denied; {theirs} is owned by "
    )
    assert str(refusal.value).startswith(line + owned)


@pytest.mark.slow
def test_permission_error_of_a_submission_names_file_and_owner(cli: Cli, tmp_path: Path) -> None:
    file, owner = tmp_path / "config.yaml", pwd.getpwuid(os.geteuid()).pw_name
    file.touch()
    error = PermissionError(errno.EACCES, "Permission denied", str(file))
    with (
        mock.patch.object(submission, "submit_plan", side_effect=error),
        mock.patch.object(os, "access", return_value=False),
        mock.patch.object(os, "geteuid", return_value=file.stat().st_uid + 1),
    ):
        line = cli.refused("+stage=download", *DIGITS)
    assert line == (
        f"error: {file}: permission denied; it is owned by {owner}: choose another workspace=FOLDER, "
        f"or have {owner} grant you access"
    )


def test_jobs_of_an_inaccessible_workspace_is_a_permission_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("hpc_imagenet.report.jobs_table")  # by root, to whom Python's folder may belong
    (tmp_path / "locked" / "runs").mkdir(parents=True)
    (tmp_path / "locked").chmod(0)
    try:
        with unprivileged(), pytest.raises(SystemExit) as end:
            main(["jobs", f"workspace={tmp_path}/locked"])
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert end.value.code == 2
    assert re.fullmatch(
        rf"error: {tmp_path}\S*: permission denied; \S+ is owned by .*workspace=FOLDER.*\n",
        capsys.readouterr().err,
    )
