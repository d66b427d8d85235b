"""Who can write a file: what other users of the machine could have written is not executed.

A job executes its frozen config (cluster.setup, the source of a network), and settings can name commands.
They are therefore read only from files and folders that belong to this user or to root, and that no other
user may write. In a group's workspace the folders of runs are made this way whatever the umask allows;
archives, datasets and datastores, which are only data, are shared as the umask says.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from hpc_imagenet.errors import UserError

UMASK = "HPC_IMAGENET_UMASK"  # environment variable of jobs: the umask of the command that submitted them
_OTHERS = 0o022


def user_name(uid: int) -> str:
    """Return the name of a user, or `uid N` for one of another host or container."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def owner_name(path: Path) -> str:
    """Return the name of the owner of a file or folder."""
    return user_name(path.stat().st_uid)


def is_own(path: Path) -> bool:
    """Whether this user owns a file or folder, or it does not exist."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return path.stat().st_uid == os.geteuid()
    return True


def foreign_writer(path: Path, top: Path | None = None, named: bool = False) -> str:
    """Return why another user could have written a file or folder, or replaced it; empty if none could.

    Args:
        path: the file or folder.
        top: the last of the folders above it that are checked too; None: no folder.
        named: whether its owner is trusted.
    """
    for each in _up_to(path, top):
        status = each.lstat()
        if stat.S_ISLNK(status.st_mode):  # both the link and what it leads to
            if why := _why(each, status, named):
                return why
            if not each.exists():  # what it leads to can be made by who can write where it would be
                each = next(folder for folder in Path(os.path.realpath(each)).parents if folder.exists())
            status = each.stat()
        if why := _why(each, status, named):
            return why
    return ""


def check_own(path: Path, top: Path | None, what: str, named: bool = False) -> None:
    """Raise unless only this user, or root, could have written a file or folder.

    Args:
        path: the file or folder.
        top: as in `foreign_writer`.
        what: what would be done with it, for the error.
        named: whether the user has named it, and thereby trusts its owner; no other may write it.

    Raises:
        UserError: names the file or folder, its owner or mode, and what to type.
    """
    if why := foreign_writer(path, top, named):
        raise UserError(f"{what}: {why}")


def read_own(path: Path, top: Path | None, what: str) -> bytes:
    """Return the content of a file that only this user, or root, could have written.

    The file is checked after it was opened, so that it cannot be replaced in between.

    Raises:
        UserError: as in `check_own`.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if why := _why(path, os.fstat(file.fileno())):
            raise UserError(f"{what}: {why}")
        if path.parent != path and top is not None:
            check_own(path.parent, top, what)
        return file.read()


def make_own_folder(path: Path, private: bool = False, exist_ok: bool = True) -> None:
    """Make a folder that only this user may write, whatever the umask allows; its parent must exist.

    Args:
        path: the folder.
        private: whether only this user may read it, too.
        exist_ok: whether it may exist.

    Raises:
        UserError: it exists, and another user could write it.
        FileExistsError: it exists, and may not.
    """
    try:
        path.mkdir(mode=0o700 if private else 0o755)
    except FileExistsError:
        if not exist_ok:
            raise
        check_own(path, path, "it cannot be used")


def keep_names(folder: Path) -> None:
    """Set the sticky bit of an own folder that others may write: each can remove only what is theirs."""
    mode = folder.stat().st_mode
    if mode & _OTHERS and not mode & stat.S_ISVTX and is_own(folder):
        folder.chmod(stat.S_IMODE(mode) | stat.S_ISVTX)


@contextlib.contextmanager
def owner_writes() -> Iterator[None]:
    """Within the block, this user alone can write new files; jobs get the umask of before as `UMASK`."""
    before = os.umask(0o777)
    os.umask(before | _OTHERS)
    known = os.environ.get(UMASK)
    if known is None or int(known, 8) | _OTHERS != before:  # else this is a job, whose umask says nothing
        os.environ[UMASK] = f"{before:04o}"
    try:
        yield
    finally:
        os.umask(before)
        if known is None:
            os.environ.pop(UMASK, None)
        else:
            os.environ[UMASK] = known


def set_job_umask(shares: bool) -> None:
    """Set the umask of this job.

    Args:
        shares: whether it writes data for all users of the workspace: then that of the command that submitted
            it, else the files that it makes can be written by this user alone.
    """
    umask = os.umask(0o777)
    with contextlib.suppress(ValueError, KeyError):
        umask = int(os.environ[UMASK], 8) & 0o777
    os.umask(umask if shares else umask | _OTHERS)


def _up_to(path: Path, top: Path | None) -> Iterator[Path]:
    yield path
    if top is None or path == top:
        return
    for folder in path.parents:
        yield folder
        if folder == top:
            return


def _why(path: Path, status: os.stat_result, named: bool = False) -> str:
    if not named and status.st_uid not in (0, os.geteuid()):
        name = user_name(status.st_uid)
        return f"{path} belongs to {name}, and could make you execute what {name} wrote"
    if stat.S_ISLNK(status.st_mode):  # its mode has no meaning
        return ""
    if status.st_mode & 0o002 or (status.st_mode & 0o020 and not _is_private_group(status.st_gid)):
        return f"other users may write {path} (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w {path}"
    return ""


def _is_private_group(gid: int) -> bool:
    """Whether a group is that of this user alone, as many systems make one for each user (umask 002)."""
    with contextlib.suppress(KeyError):
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
        return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return False
