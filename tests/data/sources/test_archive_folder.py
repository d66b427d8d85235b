"""Archives that are verified where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.sources.archive_folder import verify_in_place
from hpc_imagenet.errors import UserError


def test_an_archive_that_is_still_copied_keeps_its_name(tmp_path: Path) -> None:
    target = tmp_path / "train.tar"
    target.write_bytes(b"x" * 1000)

    def copy_more(done: int) -> None:
        if target.stat().st_size == 1000:
            target.write_bytes(b"x" * 1001)

    expected = ExpectedArchive("dataset.archives.train", "train.tar", gzip=False)
    with pytest.raises(UserError, match="changed while it was read; run the same command again once"):
        verify_in_place(target, expected, "source", copy_more)
    assert list(tmp_path.iterdir()) == [target]
