"""Export a trained network to a folder: its files and its model card."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_folder
from hpc_imagenet.io.disk import require_free_space
from hpc_imagenet.training.export.export_formats import check_target, find_format
from hpc_imagenet.training.export.model_card import FILE, model_card
from hpc_imagenet.training.export.model_files import write_files
from hpc_imagenet.training.trained import TrainedModel

_OTHER_BYTES = 10 << 20  # of an export, besides the weights


def export_network(
    trained: TrainedModel, out: Path, name: str, evaluations: Iterable[dict[str, Any]] = ()
) -> Path:
    """Write a network to the new folder `out`, which appears complete or not at all.

    Args:
        trained: the network.
        out: a folder that does not exist or is empty.
        name: name of the format.
        evaluations: for the model card; see `model_card`.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: the folder exists or cannot be written, a package is missing, or the format cannot
            represent the network.
    """
    find_format(name)
    out = check_target(out)
    weights = sum(value.nbytes for value in trained.network.state_dict().values())
    require_free_space(out.parent, weights + _OTHER_BYTES, f"--format {name}")
    try:
        with atomic_folder(out) as temporary:
            plain = write_files(trained, name, temporary)
            card = model_card(trained, name, plain, evaluations)
            (temporary / FILE).write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return out
