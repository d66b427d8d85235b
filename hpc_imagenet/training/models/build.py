"""Build any torchvision classification backbone, optionally with a stem for small images.

`shrink_stem` and `check_size` serve other networks too.

The published networks downsample by 32 and were designed for 224 px, so 32 px become a single point. The
small stem removes the first two downsamplings, a factor of 4 (for a ResNet, a 3x3 convolution of stride 1
replaces the 7x7 convolution of stride 2 and the max-pool, as in He et al. 2016 for CIFAR). The layers are
found from their input sizes in a forward pass at 224 px, so no model code is copied here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from hpc_imagenet.config.recipe import is_small
from hpc_imagenet.errors import UserError, first_line

GRID = 8  # patches per side of a vision transformer with the small stem
STEM_STRIDE = 4  # downsampling factor that the small stem removes

# No auxiliary heads: they helped to train networks without batch norm.
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
    """Return a backbone with random weights from torch's global generator.

    Args:
        name: one of `hpc_imagenet.config.names.backbones.BACKBONES`.
        classes: number of outputs of the last layer.
        stem: standard, small or auto (small if `size` ≤ 64).
        size: px, side of the training images.
        val_size: px, side of the validation images; None: `size`.
        start_size: px, initial side of the training images; None: `size`.
        options: additional arguments of torchvision's constructor.

    Returns:
        A module from [batch, 3, side, side] to [batch, classes].

    Raises:
        UserError: an unknown option, or an image size that the network does not support.
    """
    small = is_small(stem, size)
    arguments = {**constructor_arguments(name, small, size), **(options or {})}
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **arguments)
    except TypeError as error:
        raise UserError(f"model.options={dict(options or {})} does not fit {name}: {error}") from None
    except (AssertionError, ValueError, RuntimeError) as error:
        if options:
            both = f"model.options={dict(options)} or recipe.size={size}"
            raise UserError(f"{both} does not fit {name}: {first_line(error)}") from None
        fix = f"use a multiple of {_required_multiple(name, small)}"
        raise UserError(
            f"recipe.size={size} does not fit model.name={name} ({first_line(error)}): {fix}"
        ) from None
    if small:
        if name.startswith("vit_"):
            _shrink_patches(model, size)
        else:
            shrink_stem(model)
    check_size(model, name, "recipe.size", size)
    check_size(model, name, "recipe.val_size", val_size or size)
    check_size(model, name, "recipe.start_size", start_size or size)
    return model


def constructor_arguments(name: str, small: bool, size: int) -> dict[str, Any]:
    """Return the arguments of a torchvision constructor that depend on the image size in px."""
    if name.startswith("vit_"):
        return {"image_size": GRID * _required_multiple(name, small) if small else size}
    if name == "maxvit_t":  # attention windows depend on the size after the stem
        side = size * STEM_STRIDE if small else size
        return {"input_size": (side, side)}
    return _DEFAULTS.get(name, {})


def _required_multiple(name: str, small: bool) -> int:
    """Return the px of which an image's side must be a multiple, for models whose constructor checks that."""
    if name.startswith("vit_"):
        return int(name.rsplit("_", 1)[1])
    return 224 // STEM_STRIDE if small else 224


def shrink_stem(model: nn.Module) -> None:
    """Remove the first downsamplings of `model`, a factor of `STEM_STRIDE` in total."""
    # Strided layers by the side of their input in px.
    levels: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)

    def record_input(name: str, layer: nn.Module) -> Any:
        return layer.register_forward_pre_hook(
            lambda layer, inputs: levels[inputs[0].shape[-1]].append((name, layer))
        )

    hooks = [record_input(name, layer) for name, layer in model.named_modules() if _stride(layer) > 1]
    _infer_shape(model, 224)
    for hook in hooks:
        hook.remove()
    removed = 1
    for px in sorted(levels, reverse=True):
        if removed >= STEM_STRIDE:
            break
        removed *= _stride(levels[px][0][1])
        for name, layer in levels[px]:  # several if there is a parallel shortcut
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
    """Split images of `size` px into 8x8 patches, the number of patches of the position embedding."""
    if size % GRID:
        nearest = max(GRID, round(size / GRID) * GRID)
        raise UserError(f"recipe.size={size} cannot be split into {GRID}x{GRID} patches: use {nearest}")
    assert isinstance(model, models.VisionTransformer)
    patch = size // GRID
    conv = nn.Conv2d(3, model.hidden_dim, patch, stride=patch)
    nn.init.trunc_normal_(conv.weight, std=(3 * patch * patch) ** -0.5)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    model.conv_proj, model.patch_size, model.image_size = conv, patch, size


def _infer_shape(model: nn.Module, side: int) -> Tensor:
    """Run a forward pass on meta tensors, which computes shapes only and needs no memory."""
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


def check_size(model: nn.Module, name: str, setting: str, side: int, fix: str = "") -> None:
    """Raise unless the network takes images of `side` px.

    Args:
        model: the network.
        name: its name, for the error.
        setting: setting that holds the size, for the error.
        side: px.
        fix: what to do then; empty: use a size of 8 to 384 px that it takes, if there is one.

    Raises:
        UserError: the network does not take them; the message has a size that it takes.
    """
    problem = _shape_error(model, side)
    if problem is None:
        return
    valid = None if fix else next((px for px in range(8, 385, 8) if _shape_error(model, px) is None), None)
    fix = fix or (f"use {valid}" if valid else "use another model, or other model.options")
    raise UserError(f"{setting}={side} does not fit model.name={name} ({problem}): {fix}")


def _shape_error(model: nn.Module, side: int) -> str | None:
    try:
        _infer_shape(model, side)
    except (AssertionError, RuntimeError, ValueError) as error:
        return first_line(error)
    return None
