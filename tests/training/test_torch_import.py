"""The import of torch: garbage collection during it and after it."""

from __future__ import annotations

import gc
import sys

import pytest

from hpc_imagenet.training.torch_import import torch_import


def test_garbage_is_collected_again_after_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    before = gc.get_freeze_count()
    with torch_import():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    gc.disable()  # as its caller may have it
    try:
        with torch_import():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
