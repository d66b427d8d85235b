"""Errors of denied access: which file or folder is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from other_users import unprivileged

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home, explain_permission_error


def explain(path: Path) -> str:
    error = PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
    with unprivileged():
        return explain_permission_error(error)


def test_no_owner_is_named_if_no_permission_is_missing(public_path: Path) -> None:
    """As of chmod of another user's file, or of a file in a folder with the sticky bit."""
    folder = public_path / "folder"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "file").touch()
    (folder / "file").chmod(0o666)
    assert explain(folder / "file") == (f"{folder}/file: permission denied: choose another workspace=FOLDER")


def test_a_folder_above_is_named_if_it_cannot_be_entered_or_written(public_path: Path) -> None:
    (public_path / "a/b/c").mkdir(parents=True)
    (public_path / "a/b/c").chmod(0o777)
    for mode, name in ((0o444, "a"), (0o555, "a/b")):
        (public_path / "a").chmod(mode)
        (public_path / "a/b").chmod(0o555)
        missing = "a/b/c/d" if name == "a" else "a/b/new"
        assert f"permission denied; {public_path / name} is owned by" in explain(public_path / missing)
    (public_path / "a").chmod(0o700)


def test_a_path_below_the_home_of_an_unknown_user_is_refused() -> None:
    assert expand_home("~/x") == Path.home() / "x"
    assert expand_home("./~nosuchuser") == Path("~nosuchuser")
    with pytest.raises(UserError, match=r"^~nosuchuser/x: ~nosuchuser is no user's home folder here"):
        expand_home("~nosuchuser/x")
