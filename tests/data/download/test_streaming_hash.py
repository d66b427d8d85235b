"""The MD5 of a partial file while it is written."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from hpc_imagenet.data.download import streaming_hash
from hpc_imagenet.data.download.partial_file import PartialFile
from hpc_imagenet.data.download.streaming_hash import StreamingHash
from hpc_imagenet.data.sources.range_source import Origin


def test_md5_after_a_restart_is_that_of_the_new_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_hash, "CHUNK", 1000)
    reading, resume, real_preadv = threading.Event(), threading.Event(), os.preadv

    def slow_preadv(file: int, buffers: Any, at: int) -> int:
        if at == 1000:  # the second read of the old bytes
            reading.set()
            resume.wait()
        return real_preadv(file, buffers, at)

    monkeypatch.setattr(os, "preadv", slow_preadv)
    with PartialFile(tmp_path / "x.tar") as part:
        part.restart(Origin("http://x", "1"))
        part.write(0, b"a" * 3000)
        with StreamingHash(part) as md5:
            reading.wait()
            part.restart(Origin("http://x", "2"))
            part.write(0, b"b" * 500)
            try:
                assert md5.result(resume.set) == hashlib.md5(b"b" * 500).hexdigest()
            finally:
                resume.set()
