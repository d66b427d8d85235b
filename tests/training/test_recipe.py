from __future__ import annotations

import os

import pytest
import torch

from hpc_imagenet.errors import UserError
from hpc_imagenet.training import environment
from hpc_imagenet.training.model import build
from hpc_imagenet.training.recipe import optimizer, rate, set_norm_momentum
from hpc_imagenet.world import World


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates.index(max(rates)) == 10
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert rates[-1] < 1e-3
    assert rate(100, 100, 10) == pytest.approx(0)
    assert rate(0, 100, 0) == 1


def test_norms_and_biases_are_spared_where_the_recipe_says(config) -> None:
    model = build("resnet18", 10, size=32)
    everything = sum(p.numel() for p in model.parameters())
    for decays in (True, False):
        groups = optimizer(model, config(norm_decay=decays, weight_decay=0.5).recipe).param_groups
        assert sum(p.numel() for g in groups for p in g["params"]) == everything
        spared = [p for g in groups for p in g["params"] if g["weight_decay"] == 0]
        assert {p.ndim for p in spared} == (set() if decays else {1})
        assert all(g["weight_decay"] in (0, 0.5) for g in groups)
    assert isinstance(optimizer(model, config(optimizer="adamw").recipe), torch.optim.AdamW)


def test_norm_momentum() -> None:
    model = build("mobilenet_v3_small", 10, size=32)
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
        environment.share(asked, World(size=size, local_size=size))


def test_a_share_of_the_global_batch(config) -> None:
    asked = config(global_batch=24)
    asked.train.accumulate = 2
    assert environment.share(asked, World(1, 3, 1, 3)).images == 4


def test_gpus_that_are_not_there(config, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    asked = config()
    assert environment.device(asked, World()).type == "cpu"
    asked.cluster.gpus_per_node = 2
    with pytest.raises(UserError, match=r"cluster.gpus_per_node=2, but .* set cluster.gpus_per_node=0"):
        environment.device(asked, World())
    asked.cluster.gpus_per_node = None
    assert environment.device(asked, World()).type == "cpu"
    asked.loader.decode = "gpu"
    with pytest.raises(UserError, match=r"^loader.decode=gpu, but .* on CPUs: set loader.decode=cpu$"):
        environment.device(asked, World())


def test_too_little_memory_of_this_machine_is_known_by_what_torch_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert environment.out_of_memory(caught.value)
    assert environment.out_of_memory(torch.OutOfMemoryError())
    # No peer is lost because NCCL finds no memory.
    assert environment.out_of_memory(RuntimeError("NCCL error … Cuda failure 2 'out of memory'"))
    assert not environment.out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    ("nodes", "site", "right"),
    [(1, "", "lo"), (2, "=lo", "lo"), (2, "nowhere0", None), (2, "^docker", None), (2, "", None)],
)
def test_gloo_goes_by_the_network_that_the_site_names(monkeypatch, nodes, site, right) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", site)
    environment.placement(World(size=nodes), torch.device("cpu"), 1, "32-true")
    assert os.environ.get("GLOO_SOCKET_IFNAME") == right


def test_precision_is_that_of_the_device() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert [environment.precision("auto", place) for place in (gpu, cpu)] == ["bf16-mixed", "32-true"]
    assert environment.precision("16-mixed", gpu) == "16-mixed"


def test_a_gpu_that_only_emulates_bf16_is_told(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "Tesla T4")
    right = "Tesla T4 emulates bf16: recipe.precision=16-mixed is faster there"
    assert environment.emulated("bf16-mixed", torch.device("cuda", 0)) == right
    assert not environment.emulated("16-mixed", torch.device("cuda", 0))
    assert not environment.emulated("bf16-mixed", torch.device("cpu"))


def test_gpus_that_are_there(config, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = config()
    asked.cluster.gpus_per_node = 2
    assert environment.device(asked, World(3, 4, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"4 tasks share 2 GPUs on this node: set cluster.tasks_per_node=2"):
        environment.device(asked, World(3, 4, 3, 4))
    asked.cluster.gpus_per_node = 0
    assert environment.device(asked, World()).type == "cpu"
