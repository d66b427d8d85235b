from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training import distributed
from hpc_imagenet.training.loading.sampler import batch_share
from hpc_imagenet.training.models.build import build_model
from hpc_imagenet.training.models.optim import build_optimizer, lr_factor, set_norm_momentum


def test_lr_factor_warms_up_and_decays_to_zero() -> None:
    rates = [lr_factor(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates.index(max(rates)) == 10
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert rates[-1] < 1e-3
    assert lr_factor(100, 100, 10) == pytest.approx(0)
    assert lr_factor(0, 100, 0) == 1


@pytest.mark.slow
def test_norm_decay_excludes_norms_and_biases(config) -> None:
    model = build_model("resnet18", 10, size=32)
    total = sum(p.numel() for p in model.parameters())
    for norm_decay in (True, False):
        groups = build_optimizer(model, config(norm_decay=norm_decay, weight_decay=0.5).recipe).param_groups
        assert sum(p.numel() for g in groups for p in g["params"]) == total
        without_decay = [p for g in groups for p in g["params"] if g["weight_decay"] == 0]
        assert {p.ndim for p in without_decay} == (set() if norm_decay else {1})
        assert all(g["weight_decay"] in (0, 0.5) for g in groups)
    assert isinstance(build_optimizer(model, config(optimizer="adamw").recipe), torch.optim.AdamW)


@pytest.mark.slow
def test_norm_momentum() -> None:
    model = build_model("mobilenet_v3_small", 10, size=32)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    set_norm_momentum(model, None)
    assert {m.momentum for m in norms} == {0.01}
    set_norm_momentum(model, 0.1)
    assert {m.momentum for m in norms} == {0.1}


@pytest.mark.parametrize(
    ("batch", "size", "accumulate", "message"),
    [
        (64, 3, 1, "by 3 tasks: set it to 63 or 66"),
        (64, 2, 3, "by 2 tasks times train.accumulate=3: set it to 60 or 66"),
    ],
)
def test_indivisible_global_batch_is_an_error(config, batch, size, accumulate, message) -> None:
    settings = config(global_batch=batch)
    settings.train.accumulate = accumulate
    with pytest.raises(UserError, match=f"recipe.global_batch={batch} is not divisible {message}"):
        batch_share(settings, DistEnv(size=size, local_size=size))


def test_batch_share_of_a_device(config) -> None:
    settings = config(global_batch=24)
    settings.train.accumulate = 2
    assert batch_share(settings, DistEnv(1, 3, 1, 3)).images == 4


@pytest.fixture
def without_gpus(monkeypatch) -> None:
    """Hide the GPUs of this machine and job."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("SLURM_JOB_ID", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),  # as set by the local queue
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a"}, "CUDA_VISIBLE_DEVICES=MIG-1a"),
        (
            {"CUDA_VISIBLE_DEVICES": None, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"},
            "SLURM_GPUS_ON_NODE=2",
        ),
        ({"CUDA_VISIBLE_DEVICES": None}, "this machine has a GPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        # A job without GPUs on a node with GPUs.
        ({"CUDA_VISIBLE_DEVICES": None, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_gpu_that_torch_does_not_see_is_an_error(
    config, monkeypatch, without_gpus, tmp_path: Path, variables, message
) -> None:
    (tmp_path / "nvidia0").touch()
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    if message is None:
        assert distributed.device(config_of_any_gpus(config), DistEnv(), tmp_path).type == "cpu"
        return
    with pytest.raises(
        UserError, match=rf"^{message}.*, but torch .* sees no GPU: .*cluster.gpus_per_node=0"
    ):
        distributed.device(config_of_any_gpus(config), DistEnv(), tmp_path)
    settings = config_of_any_gpus(config)
    settings.cluster.gpus_per_node = 0
    assert distributed.device(settings, DistEnv(), tmp_path).type == "cpu"


def config_of_any_gpus(config) -> Config:
    settings = config()
    settings.cluster.gpus_per_node = None
    return settings


def test_missing_gpus_are_an_error(config, without_gpus) -> None:
    settings = config()
    assert distributed.device(settings, DistEnv()).type == "cpu"
    settings.cluster.gpus_per_node = 2
    with pytest.raises(UserError, match=r"cluster.gpus_per_node=2, but .* set cluster.gpus_per_node=0"):
        distributed.device(settings, DistEnv())
    settings.cluster.gpus_per_node = None
    assert distributed.device(settings, DistEnv()).type == "cpu"
    settings.loader.decode = "gpu"
    with pytest.raises(UserError, match=r"^loader.decode=gpu, but .* on CPUs: set loader.decode=cpu$"):
        distributed.device(settings, DistEnv())


@pytest.mark.parametrize(
    ("nodes", "nccl_interface", "gloo_interface"),
    [
        (1, "", "lo"),
        (2, "=eth7", "eth7"),
        (2, "eth", "lo"),
        (2, "eth7,lo", "lo"),
        (2, "^docker", "lo"),
        (2, "", "lo"),
    ],
)
def test_gloo_uses_the_network_interface_of_nccl(monkeypatch, nodes, nccl_interface, gloo_interface) -> None:
    """If it is one; otherwise the interface to another node, which is loopback here."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth7")])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set below is removed again
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl_interface)
    distributed.trainer_arguments(DistEnv(size=nodes), torch.device("cpu"), "32-true", False)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == gloo_interface


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_auto_precision_depends_on_the_device(monkeypatch, capability, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert [distributed.precision("auto", device) for device in (gpu, cpu)] == [expected, "32-true"]
    assert distributed.precision("16-mixed", gpu) == "16-mixed"
    assert distributed.precision("bf16-mixed", gpu) == "bf16-mixed"


@pytest.mark.parametrize(
    ("nodes", "precision", "compressed"),
    [(1, "bf16-mixed", False), (2, "bf16-mixed", True), (2, "32-true", False)],
)
def test_gradients_are_compressed_between_nodes_only(monkeypatch, nodes, precision, compressed) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist_env, gpu = DistEnv(size=2, local_size=2 // nodes), torch.device("cuda", 0)
    strategy = distributed.trainer_arguments(dist_env, gpu, precision, False)["strategy"]
    assert (strategy._ddp_comm_hook is not None) == compressed


@pytest.mark.parametrize(("kind", "bound"), [("cuda", True), ("cpu", False)])
def test_nccl_is_bound_to_its_gpu(monkeypatch, tmp_path: Path, kind: str, bound: bool) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **options: given.update(options))
    device = torch.device(kind, 1) if bound else torch.device(kind)
    distributed.join_ranks(Run(tmp_path / "run"), DistEnv(1, 2, 1, 2), device, tmp_path)
    assert given["device_id"] == (device if bound else None)


@pytest.mark.parametrize(
    ("kind", "deterministic", "ranks", "fixed"),
    [
        ("cpu", False, 2, False),
        ("cpu", False, 3, True),
        ("cuda", False, 4, False),  # rounding differs anyway, and this is faster
        ("cuda", True, 4, True),
    ],
)
def test_ddp_has_one_layout_of_gradients_where_a_resumed_training_must_be_equal(
    monkeypatch, kind: str, deterministic: bool, ranks: int, fixed: bool
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for accumulate in (1, 2):
        options = distributed.trainer_arguments(
            DistEnv(0, ranks, 0, ranks), torch.device(kind, 0), "32-true", deterministic, accumulate
        )["strategy"]._ddp_kwargs
        assert options["find_unused_parameters"] == fixed
        assert options["static_graph"] == (not fixed and accumulate == 1)


def test_deterministic_disables_cudnn_benchmark() -> None:
    def algorithms(kind: str, deterministic: bool) -> tuple[bool, bool]:
        device = torch.device(kind, 0)
        arguments = distributed.trainer_arguments(DistEnv(), device, "32-true", deterministic)
        return arguments["benchmark"], arguments["deterministic"]

    assert algorithms("cuda", False) == (True, False)
    assert algorithms("cuda", True) == (False, True)
    assert algorithms("cpu", False) == (False, False)


def test_describe_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    line = distributed.describe_device(torch.device("cuda", 1), "bf16-mixed", DistEnv(0, 4, 0, 2), 8)
    assert line == "device: NVIDIA H100 80GB HBM3, 8 CPUs, bf16-mixed, 4 tasks on 2 nodes"
    assert (
        distributed.describe_device(torch.device("cpu"), "32-true", DistEnv(), 2)
        == "device: CPU, 2 CPUs, 32-true"
    )


def test_bf16_emulation_warning(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    expected = "Tesla T4 emulates bf16: recipe.precision=16-mixed is faster there"
    assert distributed.bf16_emulation_warning("bf16-mixed", torch.device("cuda", 0)) == expected
    assert not distributed.bf16_emulation_warning("16-mixed", torch.device("cuda", 0))
    assert not distributed.bf16_emulation_warning("bf16-mixed", torch.device("cpu"))


@pytest.fixture
def gpus(monkeypatch) -> SimpleNamespace:
    """Two GPUs, as torch describes them; a test may change what it finds."""
    cuda = SimpleNamespace(capability=(9, 0), kernels=["sm_75", "sm_80", "sm_90"], problem=None)

    def start() -> None:
        if cuda.problem:
            raise RuntimeError(cuda.problem)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", start)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cuda.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: cuda.kernels)
    return cuda


def test_device_of_each_task(config, gpus) -> None:
    settings = config()
    settings.cluster.gpus_per_node = 2
    assert distributed.device(settings, DistEnv(3, 4, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"4 tasks share 2 GPUs on this node: set cluster.tasks_per_node=2"):
        distributed.device(settings, DistEnv(3, 4, 3, 4))
    settings.cluster.gpus_per_node = 0
    assert distributed.device(settings, DistEnv()).type == "cpu"


@pytest.mark.parametrize("requested", [None, 1])
def test_gpu_with_too_old_a_driver_is_an_error(config, gpus, requested) -> None:
    """The driver's library counts such a GPU, so torch does too."""
    gpus.problem = "The NVIDIA driver on your system is too old (found version 12020).\nPlease update"
    settings = config()
    settings.cluster.gpus_per_node = requested
    message = r"cannot use the GPU of this node \(The NVIDIA driver .*12020\).*\): install a torch build for"
    with pytest.raises(UserError, match=message):
        distributed.device(settings, DistEnv())


def test_gpu_that_the_torch_build_has_no_kernels_for_is_an_error(config, gpus) -> None:
    settings = config()
    settings.cluster.gpus_per_node = 1
    gpus.capability = (7, 0)
    with pytest.raises(UserError, match=r"no kernels for Tesla V100 \(it has sm_75 sm_80 sm_90\): install"):
        distributed.device(settings, DistEnv())


@pytest.mark.parametrize(
    ("kernels", "capability", "expected"),
    [
        ("sm_75 sm_80", (7, 0), False),  # of the same generation, but for later GPUs
        ("sm_75 sm_80", (7, 5), True),
        ("sm_80", (8, 9), True),
        ("sm_80 sm_86", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_80 compute_90", (12, 0), True),  # compiled for the GPU when it is loaded
        ("sm_120 compute_120", (10, 0), False),
        ("gfx90a gfx942", (9, 4), True),  # of AMD's GPUs
        ("", (9, 0), True),
    ],
)
def test_kernels_of_a_torch_build(kernels, capability, expected) -> None:
    assert distributed.has_kernels(kernels.split(), capability) is expected


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.28.9\n"
    "{}: see the documentation\nLast error:\n{}"
)


@pytest.mark.parametrize(
    ("code", "cause", "fix"),
    [
        ("ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0", "start one task per GPU"),
        ("ncclInvalidUsage", "Bootstrap : no socket interface found", "check the NCCL_ variables"),
    ],
)
def test_nccl_that_cannot_start_is_no_lost_task(code, cause, fix) -> None:
    error = torch.distributed.DistBackendError(NCCL.format("invalid usage", code, cause))
    found = distributed.nccl_setup_error(error)
    assert found.startswith(f"NCCL cannot connect the GPUs of this job: {cause}: {fix}")


def test_lost_task_is_named_by_nccls_last_error() -> None:
    cause = "socketPollConnect: connect to 10.1.1.2<4242> returned Connection refused"
    error = torch.distributed.DistBackendError(NCCL.format("remote error", "ncclRemoteError", cause))
    assert not distributed.nccl_setup_error(error)
    assert distributed.peer_failure(error) == f"lost another task of this job: {cause}"
    assert (
        distributed.peer_failure(RuntimeError("a\nConnection closed by peer"))
        == "lost another task of this job: a"
    )
    assert not distributed.peer_failure(RuntimeError("shape mismatch"))
