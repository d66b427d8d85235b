"""Errors of a full disk, and of a file that is larger than the limit."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.disk import explain_disk_full


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (
            errno.ENOSPC,
            r"No space left on device \(bytes or inodes\); free some space, or set another workspace=",
        ),
        (errno.EDQUOT, r"quota exceeded \(bytes or inodes\); free some space, or set another workspace="),
        (errno.EFBIG, "File too large; raise the limit with ulimit -f"),
    ],
)
def test_the_fix_is_that_of_the_error(number: int, line: str) -> None:
    with pytest.raises(UserError, match=f"{line}; run the same command again"), explain_disk_full(Path("x")):
        raise OSError(number, os.strerror(number))
