"""Names of optimizers: torch.optim's in lower case, and timm's as `timm/NAME`; checked without torch."""

from __future__ import annotations

from hpc_imagenet.config.names.backbones import TIMM, check_timm, timm_name, timm_names
from hpc_imagenet.config.recipe import Recipe
from hpc_imagenet.errors import UserError, did_you_mean

# Without LBFGS (calls the network several times per step), Rprop (for whole batches, without weight decay),
# SparseAdam and Muon (only some shapes of weights).
TORCH_OPTIMIZERS = (
    *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw"),
    *("asgd", "nadam", "radam", "rmsprop", "sgd"),
)
_OWN_SETTINGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def check_optimizer(recipe: Recipe) -> None:
    """Raise unless torch.optim or timm has this optimizer, and its options are not settings of their own.

    Raises:
        UserError: an unknown name, with near ones; timm is not installed; or an option that is a setting.
    """
    name = recipe.optimizer
    if timm := timm_name(name):
        known = timm_names()
        installed = check_timm(f"recipe.optimizer={name}")
        if timm not in known.optimizers and installed == known.version:
            near = did_you_mean(name, [f"{TIMM}{each}" for each in known.optimizers])
            raise UserError(f"recipe.optimizer={name} is unknown{near}")
    elif name not in TORCH_OPTIMIZERS:
        near = did_you_mean(name, (*TORCH_OPTIMIZERS, *(f"{TIMM}{each}" for each in timm_names().optimizers)))
        raise UserError(f"recipe.optimizer={name} is unknown{near}")
    settings = _OWN_SETTINGS | ({"momentum": "momentum"} if timm or name == "sgd" else {})
    for option in recipe.optimizer_options:
        if option in settings:
            raise UserError(f"recipe.optimizer_options.{option}: set recipe.{settings[option]} instead")
