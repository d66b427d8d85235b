"""Optimizers of torch.optim and of timm, with options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpc_imagenet.config.names.backbones import timm_names
from hpc_imagenet.config.names.optimizers import TORCH_OPTIMIZERS
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.models.optim import build_optimizer

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
    ],
)
def test_invalid_options_are_one_line(name: str, options: dict[str, Any], message: str, config) -> None:
    recipe = config(optimizer=name, optimizer_options=options).recipe
    with pytest.raises(
        UserError, match=rf"^recipe.optimizer={name} with recipe.optimizer_options=.*{message}"
    ):
        build_optimizer(network(), recipe)
