"""A part of an archive and the processes that want it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.sources.range_source import Origin


@pytest.mark.parametrize("meanwhile", ["nothing", "another part"])
def test_an_archive_that_became_whole_before_the_lock_was_had_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    target = tmp_path / "x.tar"
    first = PartialFile(target)
    first.begin(Origin("http://there/x.tar", None, None, 5, True))
    first.write(0, b"bytes")
    lock = fcntl.flock

    def late(*args: Any) -> None:
        """The other one ends between this one's opening of the part and its lock."""
        monkeypatch.setattr(fcntl, "flock", lock)
        first.finalize()
        first.__exit__()
        if meanwhile == "another part":
            first.path.touch()
        lock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with PartialFile(target) as second:
        assert target.read_bytes() == b"bytes"
        assert second.size == 0
        second.write(0, b"other")
    assert target.read_bytes() == b"bytes"
