"""Errors of too little memory, of a GPU or of the machine."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.training import distributed
from hpc_imagenet.training.callbacks import checkpoint
from hpc_imagenet.training.callbacks.checkpoint import CheckpointCallback


def test_out_of_memory_is_recognised_by_torchs_message() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert distributed.out_of_memory(caught.value)
    assert distributed.out_of_memory(torch.OutOfMemoryError())
    # NCCL without memory is out of memory, not a lost peer.
    assert distributed.out_of_memory(RuntimeError("NCCL error … Cuda failure 2 'out of memory'"))
    assert not distributed.out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_out_of_memory_is_recognised_by_messages_of_cuda_libraries(message: str) -> None:
    assert distributed.out_of_memory(RuntimeError(message), torch.device("cuda", 0))


def test_out_of_memory_is_detected_before_lightnings_teardown(tmp_path: Path, monkeypatch) -> None:
    """The teardown moves the network to the CPU, which frees GPU memory."""
    kept: Any = None  # nothing is saved
    callback = CheckpointCallback(tmp_path, StopSignal(), 60, {}, kept, lambda step: [], True)
    free = [2**30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    module: Any = SimpleNamespace(device=torch.device("cuda", 0))
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    callback.on_exception(SimpleNamespace(world_size=1), module, error)  # type: ignore[arg-type]
    free[0] = 79 * 2**30
    assert not distributed.out_of_memory(error, module.device)
    assert callback.out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'"),
            "CUDA out of",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of host memory: DefaultCPU"),
        (MemoryError(), "out of host memory: MemoryError"),
        (RuntimeError("Connection closed"), "(Connection closed)"),
    ],
)
def test_a_task_that_cannot_exit_says_that_memory_was_the_cause(
    error: Exception, expected: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(checkpoint, "EXIT_TIMEOUT", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    kept: Any = None  # nothing is saved
    callback = CheckpointCallback(tmp_path, StopSignal(), 60, {}, kept, lambda step: [], True)
    module: Any = SimpleNamespace(device=torch.device("cuda", 0))
    callback.on_exception(SimpleNamespace(world_size=2), module, error)  # type: ignore[arg-type]
    assert ended.wait(60)
    assert expected in capsys.readouterr().err


def test_a_lack_of_memory_while_the_ranks_join_is_no_matter_of_images(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    gpu = torch.device("cuda", 0)
    line = distributed.joining_memory_error(DistEnv(0, 2, 0, 2), gpu)
    assert line.startswith("H100 has too little free memory to connect the tasks of this job: end the other")
    assert not distributed.joining_memory_error(DistEnv(), gpu)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not distributed.joining_memory_error(DistEnv(0, 2, 0, 2), gpu)


@pytest.mark.parametrize(("free", "expected"), [(1, True), (20, False)])
def test_a_missing_cudnn_engine_is_out_of_memory_only_on_a_full_gpu(monkeypatch, free, expected) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 59 * 2**30)
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    assert distributed.out_of_memory(error, torch.device("cuda", 0)) is expected
    assert not distributed.out_of_memory(error)
