"""Locking of a partial file by several processes."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.sources.range_source import Origin


@pytest.mark.parametrize("state", ["no partial file", "new partial file"])
def test_archive_finalized_between_open_and_lock_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    target = tmp_path / "x.tar"
    first = PartialFile(target)
    first.restart(Origin("http://example/x.tar", None, None, 5, True))
    first.write(0, b"bytes")
    real_flock = fcntl.flock

    def finalize_then_lock(*args: Any) -> None:
        """Finalize the first file after the second one has opened it and before it is locked."""
        monkeypatch.setattr(fcntl, "flock", real_flock)
        first.finalize()
        first.__exit__()
        if state == "new partial file":
            first.path.touch()
        real_flock(*args)

    monkeypatch.setattr(fcntl, "flock", finalize_then_lock)
    with PartialFile(target) as second:
        assert target.read_bytes() == b"bytes"
        assert second.size == 0
        second.write(0, b"other")
    assert target.read_bytes() == b"bytes"
