"""Any torchvision classification backbone by its name, with a stem that fits small images.

The published networks halve an image five times and were drawn for 224 px: of 32 px one point is left. The
small stem takes the first two halvings back, whatever layers do them (for a ResNet: the 7x7 convolution of
stride 2 and the max-pool behind it become a 3x3 convolution of stride 1, as He et al. 2016 did for CIFAR).
The layers are found by looking at what a forward pass at 224 px hands to them, so no model is copied here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from hpc_imagenet.errors import UserError, first_line

SMALL = 64  # px: up to here `auto` takes the small stem
GRID = 8  # patches a side of a vision transformer with the small stem
SHORTER = 4  # what the small stem takes off a network's total stride

# Without the auxiliary heads, which were there to train networks that had no batch norm yet.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build_model(
    name: str,
    classes: int,
    *,
    stem: str = "auto",
    size: int = 224,
    val_size: int | None = None,
    start_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the untrained backbone, drawn from torch's global generator.

    Args:
        name: one of `hpc_imagenet.config.backbones.BACKBONES`.
        classes: outputs of the last layer.
        stem: standard, small or auto (small where `size` ≤ 64).
        size: px, side of the training images.
        val_size: px, side of the validation images; None: the same.
        start_size: px, side of the training images at first; None: the same.
        options: for torchvision's constructor.

    Returns:
        A module from [batch, 3, side, side] to [batch, classes].

    Raises:
        UserError: an unknown option, or images that the network cannot take.
    """
    small = stem == "small" or (stem == "auto" and size <= SMALL)
    arguments = {**_arguments(name, small, size), **(options or {})}
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **arguments)
    except TypeError as error:
        raise UserError(f"model.options={dict(options or {})} does not fit {name}: {error}") from None
    except (AssertionError, ValueError, RuntimeError) as error:
        right = f"a multiple of {_multiple(name, small)} would"
        raise UserError(
            f"recipe.size={size} does not fit model.name={name} ({first_line(error)}): {right}"
        ) from None
    if small:
        if name.startswith("vit_"):
            _shrink_patches(model, size)
        else:
            _shrink_stem(model)
    _check_size(model, name, "recipe.size", size)
    _check_size(model, name, "recipe.val_size", val_size or size)
    _check_size(model, name, "recipe.start_size", start_size or size)
    return model


def _arguments(name: str, small: bool, size: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": GRID * _multiple(name, small) if small else size}
    if name == "maxvit_t":  # its attention windows are laid out for the size behind the stem
        side = size * SHORTER if small else size
        return {"input_size": (side, side)}
    return _DEFAULTS.get(name, {})


def _multiple(name: str, small: bool) -> int:
    """Return of what the side (px) of an image must be a multiple where a constructor asks for that."""
    if name.startswith("vit_"):
        return int(name.rsplit("_", 1)[1])
    return 224 // SHORTER if small else 224


def _shrink_stem(model: nn.Module) -> None:
    """Take the first halvings back, a factor of `SHORTER` in all."""
    levels: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)  # px that a layer gets: the layers

    def note(name: str, layer: nn.Module) -> Any:
        return layer.register_forward_pre_hook(
            lambda layer, inputs: levels[inputs[0].shape[-1]].append((name, layer))
        )

    hooks = [note(name, layer) for name, layer in model.named_modules() if _stride(layer) > 1]
    _probe(model, 224)
    for hook in hooks:
        hook.remove()
    undone = 1
    for px in sorted(levels, reverse=True):
        if undone >= SHORTER:
            break
        undone *= _stride(levels[px][0][1])
        for name, layer in levels[px]:  # several where a shortcut runs beside
            model.set_submodule(name, _unstrided(layer))


def _stride(layer: nn.Module) -> int:
    if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return 1
    return layer.stride if isinstance(layer.stride, int) else int(layer.stride[0])


def _unstrided(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, nn.Conv2d):
        return nn.Identity()
    if layer.kernel_size[0] <= 3:
        layer.stride = (1, 1)
        return layer
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=layer.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _shrink_patches(model: nn.Module, size: int) -> None:
    """Cut images of `size` px into 8x8 patches: as many as the position embedding was made for."""
    if size % GRID:
        near = max(GRID, round(size / GRID) * GRID)
        raise UserError(f"recipe.size={size} is not cut into {GRID}x{GRID} patches: {near} would be")
    assert isinstance(model, models.VisionTransformer)
    patch = size // GRID
    conv = nn.Conv2d(3, model.hidden_dim, patch, stride=patch)
    nn.init.trunc_normal_(conv.weight, std=(3 * patch * patch) ** -0.5)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    model.conv_proj, model.patch_size, model.image_size = conv, patch, size


def _probe(model: nn.Module, side: int) -> Tensor:
    """Run shapes only: the weights stand in as meta tensors, so this costs no arithmetic and no memory."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    images = torch.empty(2, 3, side, side, device="meta")
    training = model.training
    try:
        with torch.no_grad():
            output: Tensor = torch.func.functional_call(model.eval(), shapes, (images,))
            return output
    finally:
        model.train(training)


def _check_size(model: nn.Module, name: str, setting: str, side: int) -> None:
    problem = _problem(model, side)
    if problem is None:
        return
    fits = next((px for px in range(8, 385, 8) if _problem(model, px) is None), None)
    right = f"{fits} would fit" if fits else "take another model"
    raise UserError(f"{setting}={side} does not fit model.name={name} ({problem}): {right}")


def _problem(model: nn.Module, side: int) -> str | None:
    try:
        _probe(model, side)
    except (AssertionError, RuntimeError, ValueError) as error:
        return first_line(error)
    return None
