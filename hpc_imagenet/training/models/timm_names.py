"""Print the names of the installed timm, the content of hpc_imagenet/config/names/timm_names.txt."""

from __future__ import annotations

import timm
from timm.models import get_pretrained_cfg
from timm.optim import list_optimizers

from hpc_imagenet.config.names.backbones import TimmNames

# They need other packages (bitsandbytes, apex), or gradients of gradients.
_EXCLUDED = ("bnb", "fused", "adahessian")


def installed_names() -> TimmNames:
    """Return the names of the installed timm."""
    tags: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for published in timm.list_models(pretrained=True):
        name, _, tag = published.partition(".")
        if tag:
            tags[name].append(tag)
    networks = {}
    for name, found in sorted(tags.items()):
        own_choice = get_pretrained_cfg(name).tag
        networks[name] = tuple(sorted(found, key=lambda tag: (tag != own_choice, tag)))
    optimizers = tuple(name for name in list_optimizers() if not name.startswith(_EXCLUDED))
    return TimmNames(timm.__version__, optimizers, networks)


if __name__ == "__main__":
    print(installed_names().text(), end="")
