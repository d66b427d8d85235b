"""Optimizers of torch.optim and of timm, with options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpc_imagenet.config.names.backbones import timm_names
from hpc_imagenet.config.names.optimizers import TORCH_OPTIMIZERS
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.models.optim import build_optimizer, load_optimizer_state

# kron draws random numbers of its own, and kron's steps take a second here.
OPTIMIZERS = [*TORCH_OPTIMIZERS, *(f"timm/{name}" for name in timm_names().optimizers if "kron" not in name)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_names_are_those_of_torch() -> None:
    classes = {name for name in torch.optim.__all__ if name[0].isupper()}
    left_out = {"LBFGS", "Muon", "Optimizer", "Rprop", "SparseAdam"}
    assert {name.lower() for name in classes - left_out} == set(TORCH_OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_resumes(name: str, config, tmp_path) -> None:
    recipe = config(optimizer=name, learning_rate=1e-3).recipe
    straight, resumed = network(), network()
    before = [parameter.detach().clone() for parameter in straight.parameters()]
    expected = steps(straight, build_optimizer(straight, recipe), 4)
    assert not any(map(torch.equal, before[::4], expected[::4]))
    first = build_optimizer(resumed, recipe)
    assert {group["lr"] for group in first.param_groups} == {1e-3}
    steps(resumed, first, 2)
    torch.save(first.state_dict(), tmp_path / "state")
    second = build_optimizer(resumed, recipe)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for one, other in zip(steps(resumed, second, 2), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_options_reach_the_optimizer(config) -> None:
    def group(name: str, **options: Any) -> dict[str, Any]:
        recipe = config(optimizer=name, optimizer_options=options).recipe
        return build_optimizer(network(), recipe).param_groups[0]

    assert group("sgd", nesterov=True)["nesterov"]
    assert group("adamw", betas=[0.9, 0.95])["betas"] == (0.9, 0.95)
    assert group("rmsprop", momentum=0.7)["momentum"] == 0.7
    assert group("timm/lamb", betas=[0.8, 0.9])["betas"] == (0.8, 0.9)
    assert group("timm/sgd")["momentum"] == config().recipe.momentum


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {"beta": 1}, "unexpected keyword argument 'beta'"),
        ("adam", {"betas": [0.9, 2]}, "Invalid beta parameter"),
        ("timm/lamb", {"trust": 1}, "unexpected keyword argument 'trust'"),
        ("sgd", {"fused": True, "dampening": 0.5}, "fused does not go with dampening: leave one"),
    ],
)
def test_invalid_options_are_one_line(name: str, options: dict[str, Any], message: str, config) -> None:
    recipe = config(optimizer=name, optimizer_options=options).recipe
    with pytest.raises(
        UserError, match=rf"^recipe.optimizer={name} with recipe.optimizer_options=.*{message}"
    ):
        build_optimizer(network(), recipe)


@pytest.fixture
def unwritten_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not written is NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, float("nan")))


def scaled_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, overflow: bool
) -> None:
    """One step as with 16-mixed on a GPU."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    scaler.scale(nn.functional.cross_entropy(model(images), torch.arange(8))).backward()
    if overflow:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("inf"))
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(
    ("name", "options"), [("sgd", {}), ("sgd", {"nesterov": True}), ("adamw", {}), ("timm/sgd", {})]
)
def test_a_first_step_that_overflows_changes_nothing(name, options, config, unwritten_memory) -> None:
    """The fused kernel, which is the default on GPUs, exists on CPUs too."""
    recipe = config(optimizer=name, optimizer_options={"fused": True, **options}).recipe
    trained = []
    for overflow in (False, True):
        model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = build_optimizer(model, recipe)
        if overflow:
            scaled_step(model, optimizer, scaler, overflow=True)
            assert all(map(torch.equal, model.parameters(), network().parameters()))
        for _ in range(3):
            scaled_step(model, optimizer, scaler, overflow=False)
        trained.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *trained))
    assert all(parameter.isfinite().all() for parameter in trained[0])


def test_a_momentum_of_zeros_is_exact(config) -> None:
    recipe = config(optimizer_options={"fused": True}).recipe
    (one, ours), (other, plain) = [(model := network(), build_optimizer(model, recipe)) for _ in range(2)]
    plain.state.clear()  # as torch begins
    assert all(map(torch.equal, steps(one, ours, 5), steps(other, plain, 5)))


def test_a_state_saved_on_a_cpu_goes_on_in_the_fused_kernel(config, tmp_path) -> None:
    """It selects another kernel, which does not accept what 16-mixed passes to the optimizer."""
    for name in ("sgd", "adamw"):
        recipe = config(optimizer=name, learning_rate=1e-3).recipe
        model = network()
        before = build_optimizer(model, recipe)
        expected = [*steps(copied := network(), other := build_optimizer(copied, recipe), 1)]
        assert all(map(torch.equal, steps(model, before, 1), expected))
        torch.save(before.state_dict(), tmp_path / "state")
        recipe.optimizer_options = {"fused": True}
        after, scaler = build_optimizer(model, recipe), torch.amp.GradScaler("cpu")
        after.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        scaled_step(model, after, scaler, overflow=False)
        for one, two in zip(model.parameters(), steps(copied, other, 1), strict=True):
            torch.testing.assert_close(one.detach(), two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_weights_without_a_saved_momentum_start_at_zero(
    momentum: float, config, tmp_path, unwritten_memory
) -> None:
    """Those of a branch that had no gradient, and all weights of a run without momentum."""
    recipe, model = config().recipe, network()
    recipe.momentum = momentum
    before = build_optimizer(model, recipe)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model[0](images).mean().backward()  # type: ignore[index]
    before.step()
    torch.save({"optimizer_states": [before.state_dict()]}, tmp_path / "state")
    recipe.momentum, recipe.optimizer_options = 0.9, {"fused": True}
    after, scaler = build_optimizer(model, recipe), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    load_optimizer_state(after, tmp_path / "state")
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    scaled_step(model, after, scaler, overflow=True)
    assert all(map(torch.equal, model.parameters(), weights))
    scaled_step(model, after, scaler, overflow=False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_dampening_is_not_fused_by_default(config, monkeypatch) -> None:
    """Its first step, with the whole gradient, is not that of a momentum of zeros."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    fused = [
        build_optimizer(network(), config(optimizer_options=options).recipe).param_groups[0]["fused"]
        for options in ({}, {"dampening": 0.5})
    ]
    assert fused == [True, None]
