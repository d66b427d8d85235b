"""Access to files: home folders, denied files explained, and no secret that other users can read."""

from __future__ import annotations

import os
from pathlib import Path

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.ownership import user_name

_CHOOSE = "choose another workspace=FOLDER"


def expand_home(path: str | Path) -> Path:
    """Return a path with the home folder for ~ or ~USER.

    Raises:
        UserError: there is no such user, or the home folder is unknown.
    """
    expanded = os.path.expanduser(os.fspath(path))  # noqa: PTH111 - Path.expanduser raises a RuntimeError
    if expanded.startswith("~"):
        home = expanded.partition("/")[0]
        raise UserError(f"{path}: {home} is no user's home folder here; a file of that name is ./{path}")
    return Path(expanded)


def read_private(path: Path, setting: str) -> str:
    """Return the text of a file with a secret.

    Args:
        path: the file.
        setting: the setting that names it, for errors.

    Raises:
        UserError: it cannot be read, or other users may read it too.
    """
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise UserError(
                f"{setting}={path} holds a secret and other users may read it (mode {mode:o}): "
                f"chmod 600 {path}"
            )
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{setting}={path} cannot be read ({error.strerror})") from None


def explain_permission_error(error: PermissionError, workspace: Path | None = None) -> str:
    """Return one line: the path, the owner of the file or folder that denies access, and the fix.

    Args:
        error: the error; without a file name, its message and the fix are returned.
        workspace: the workspace if known; another one is suggested only for a path within it.
    """
    if not isinstance(error.filename, (str, bytes)):
        return f"{error.strerror or error}: {_CHOOSE}"
    path = Path(os.fsdecode(error.filename)).absolute()
    choose = workspace is None or path.is_relative_to(workspace.absolute())
    # If the path does not exist, cannot be seen or has the right mode, a folder above it denies access: its
    # own by any of its permissions, those above by the right to enter them alone.
    for denied in (path, *path.parents):
        try:
            uid = denied.stat().st_uid
        except OSError:
            continue
        mode = os.X_OK if denied.is_dir() else 0
        if denied in (path, path.parent):
            mode |= os.R_OK | os.W_OK
        if not os.access(denied, mode, effective_ids=True):
            break
    else:
        return f"{path}: permission denied" + (f": {_CHOOSE}" if choose else "")
    if uid == os.geteuid():
        owner, fixes = "you", ["change its permissions with chmod u+rwX", *[_CHOOSE] * choose]
    else:
        owner = user_name(uid)
        fixes = [*[_CHOOSE] * choose, f"have {owner} grant you access"]
    owned = "it" if denied == path else str(denied)
    return f"{path}: permission denied; {owned} is owned by {owner}: {', or '.join(fixes)}"
