from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.signals import StopSignal as StopSignal
from hpc_imagenet.launch import local_queue
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.training import distributed
from hpc_imagenet.training.callbacks.checkpoint import CheckpointCallback
from hpc_imagenet.training.models.build import build_model
from hpc_imagenet.training.models.optim import build_optimizer, lr_factor, set_norm_momentum


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [lr_factor(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates.index(max(rates)) == 10
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert rates[-1] < 1e-3
    assert lr_factor(100, 100, 10) == pytest.approx(0)
    assert lr_factor(0, 100, 0) == 1


def test_norms_and_biases_are_spared_where_the_recipe_says(config) -> None:
    model = build_model("resnet18", 10, size=32)
    everything = sum(p.numel() for p in model.parameters())
    for decays in (True, False):
        groups = build_optimizer(model, config(norm_decay=decays, weight_decay=0.5).recipe).param_groups
        assert sum(p.numel() for g in groups for p in g["params"]) == everything
        spared = [p for g in groups for p in g["params"] if g["weight_decay"] == 0]
        assert {p.ndim for p in spared} == (set() if decays else {1})
        assert all(g["weight_decay"] in (0, 0.5) for g in groups)
    assert isinstance(build_optimizer(model, config(optimizer="adamw").recipe), torch.optim.AdamW)


def test_norm_momentum() -> None:
    model = build_model("mobilenet_v3_small", 10, size=32)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    set_norm_momentum(model, None)
    assert {m.momentum for m in norms} == {0.01}
    set_norm_momentum(model, 0.1)
    assert {m.momentum for m in norms} == {0.1}


@pytest.mark.parametrize(
    ("batch", "size", "accumulate", "near"),
    [
        (64, 3, 1, "by 3 tasks: 63 or 66 would"),
        (64, 2, 3, "by 2 tasks times train.accumulate=3: 60 or 66 would"),
    ],
)
def test_a_global_batch_that_does_not_divide(config, batch, size, accumulate, near) -> None:
    asked = config(global_batch=batch)
    asked.train.accumulate = accumulate
    with pytest.raises(UserError, match=f"recipe.global_batch={batch} does not divide {near}"):
        distributed.batch_share(asked, DistEnv(size=size, local_size=size))


def test_a_share_of_the_global_batch(config) -> None:
    asked = config(global_batch=24)
    asked.train.accumulate = 2
    assert distributed.batch_share(asked, DistEnv(1, 3, 1, 3)).images == 4


@pytest.fixture
def without_gpus(monkeypatch) -> None:
    """Hide whatever this machine and this job have of GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("SLURM_JOB_ID", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "sign"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),  # as the local queue hands it out
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a"}, "CUDA_VISIBLE_DEVICES=MIG-1a"),
        (
            {"CUDA_VISIBLE_DEVICES": None, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"},
            "SLURM_GPUS_ON_NODE=2",
        ),
        ({"CUDA_VISIBLE_DEVICES": None}, "this machine has a GPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        # A job without GPUs on a node that has some.
        ({"CUDA_VISIBLE_DEVICES": None, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_an_error(
    config, monkeypatch, without_gpus, tmp_path: Path, variables, sign
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(local_queue, "_DEVICES", tmp_path)
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    if sign is None:
        assert distributed.device(config_of_any_gpus(config), DistEnv()).type == "cpu"
        return
    with pytest.raises(UserError, match=rf"^{sign}.*, but torch .* sees no GPU: .*cluster.gpus_per_node=0"):
        distributed.device(config_of_any_gpus(config), DistEnv())
    asked = config_of_any_gpus(config)
    asked.cluster.gpus_per_node = 0
    assert distributed.device(asked, DistEnv()).type == "cpu"


def config_of_any_gpus(config) -> Config:
    asked = config()
    asked.cluster.gpus_per_node = None
    return asked


def test_gpus_that_are_not_there(config, without_gpus) -> None:
    asked = config()
    assert distributed.device(asked, DistEnv()).type == "cpu"
    asked.cluster.gpus_per_node = 2
    with pytest.raises(UserError, match=r"cluster.gpus_per_node=2, but .* set cluster.gpus_per_node=0"):
        distributed.device(asked, DistEnv())
    asked.cluster.gpus_per_node = None
    assert distributed.device(asked, DistEnv()).type == "cpu"
    asked.loader.decode = "gpu"
    with pytest.raises(UserError, match=r"^loader.decode=gpu, but .* on CPUs: set loader.decode=cpu$"):
        distributed.device(asked, DistEnv())


def test_too_little_memory_of_this_machine_is_known_by_what_torch_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert distributed.out_of_memory(caught.value)
    assert distributed.out_of_memory(torch.OutOfMemoryError())
    # No peer is lost because NCCL finds no memory.
    assert distributed.out_of_memory(RuntimeError("NCCL error … Cuda failure 2 'out of memory'"))
    assert not distributed.out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_out_of_memory_in_the_words_of_cudas_libraries(words: str) -> None:
    assert distributed.out_of_memory(RuntimeError(words), torch.device("cuda", 0))


def test_out_of_memory_is_judged_before_lightning_empties_the_gpu(tmp_path: Path, monkeypatch) -> None:
    """Its teardown moves the network to the CPU."""
    boundary = CheckpointCallback(tmp_path, StopSignal(), 60, {}, lambda step: [], True)
    free = [2**30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (free[0], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda place: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda place: 0)
    module: Any = SimpleNamespace(device=torch.device("cuda", 0))
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    boundary.on_exception(SimpleNamespace(world_size=1), module, error)  # type: ignore[arg-type]
    free[0] = 79 * 2**30
    assert not distributed.out_of_memory(error, module.device)
    assert boundary.out_of_memory


@pytest.mark.parametrize(("free", "expected"), [(1, True), (20, False)])
def test_a_missing_cudnn_engine_is_out_of_memory_only_on_a_full_gpu(monkeypatch, free, expected) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda place: 60 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda place: 59 * 2**30)
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    assert distributed.out_of_memory(error, torch.device("cuda", 0)) is expected
    assert not distributed.out_of_memory(error)


@pytest.mark.parametrize(
    ("nodes", "site", "right"),
    [(1, "", "lo"), (2, "=lo", "lo"), (2, "nowhere0", None), (2, "^docker", None), (2, "", None)],
)
def test_gloo_goes_by_the_network_that_the_site_names(monkeypatch, nodes, site, right) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", site)
    distributed.trainer_arguments(DistEnv(size=nodes), torch.device("cpu"), 1, "32-true")
    assert os.environ.get("GLOO_SOCKET_IFNAME") == right


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_automatic_precision_is_that_of_the_device(monkeypatch, capability, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert [distributed.precision("auto", place) for place in (gpu, cpu)] == [expected, "32-true"]
    assert distributed.precision("16-mixed", gpu) == "16-mixed"
    assert distributed.precision("bf16-mixed", gpu) == "bf16-mixed"


@pytest.mark.parametrize(
    ("nodes", "precision", "compressed"),
    [(1, "bf16-mixed", False), (2, "bf16-mixed", True), (2, "32-true", False)],
)
def test_gradients_are_compressed_between_nodes_only(monkeypatch, nodes, precision, compressed) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist_env, gpu = DistEnv(size=2, local_size=2 // nodes), torch.device("cuda", 0)
    strategy = distributed.trainer_arguments(dist_env, gpu, 1, precision)["strategy"]
    assert (strategy._ddp_comm_hook is not None) == compressed


def test_deterministic_algorithms_replace_the_search_for_fast_ones() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert distributed.algorithm_arguments(gpu, False) == {"benchmark": True, "deterministic": False}
    assert distributed.algorithm_arguments(gpu, True) == {"benchmark": False, "deterministic": True}
    assert distributed.algorithm_arguments(cpu, False) == {"benchmark": False, "deterministic": False}


def test_the_device_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA H100 80GB HBM3")
    line = distributed.describe_device(torch.device("cuda", 1), "bf16-mixed", DistEnv(0, 4, 0, 2), 8)
    assert line == "device: NVIDIA H100 80GB HBM3, 8 CPUs, bf16-mixed, 4 tasks on 2 nodes"
    assert (
        distributed.describe_device(torch.device("cpu"), "32-true", DistEnv(), 2)
        == "device: CPU, 2 CPUs, 32-true"
    )


def test_a_gpu_that_only_emulates_bf16_is_told(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "Tesla T4")
    right = "Tesla T4 emulates bf16: recipe.precision=16-mixed is faster there"
    assert distributed.emulated("bf16-mixed", torch.device("cuda", 0)) == right
    assert not distributed.emulated("16-mixed", torch.device("cuda", 0))
    assert not distributed.emulated("bf16-mixed", torch.device("cpu"))


def test_gpus_that_are_there(config, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = config()
    asked.cluster.gpus_per_node = 2
    assert distributed.device(asked, DistEnv(3, 4, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"4 tasks share 2 GPUs on this node: set cluster.tasks_per_node=2"):
        distributed.device(asked, DistEnv(3, 4, 3, 4))
    asked.cluster.gpus_per_node = 0
    assert distributed.device(asked, DistEnv()).type == "cpu"
