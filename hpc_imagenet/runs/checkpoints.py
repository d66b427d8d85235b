"""Names of the checkpoints of a run, which one a command means, and what another run may begin with."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any

from hpc_imagenet.config.names.backbones import implied_options, is_own, tagged_name
from hpc_imagenet.config.recipe import Model, Recipe, is_small
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.io.ownership import foreign_writer
from hpc_imagenet.runs.job import signature
from hpc_imagenet.runs.store import Run

CHECKPOINTS = "checkpoints"  # in the folder of a run
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
INITIAL = "initial.ckpt"  # in the folder of a run: the checkpoint of another one that it began with
_PIXELS = ("mean", "std", "interpolation")  # of model.preprocessing: what trained weights expect


def find_checkpoint(source: Path | Run, checkpoint: str | None = None) -> Path:
    """Return the path of a checkpoint.

    Args:
        source: a run, its folder, or a file.
        checkpoint: of a run: best, last, previous or epoch-N; None: best if there is one, else last.

    Raises:
        UserError: there is no such file.
    """
    folder = source.folder if isinstance(source, Run) else source
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or run: list the runs with python -m hpc_imagenet jobs")
    found = {path.stem: path for path in list_checkpoints(folder)}
    for name in [checkpoint.removesuffix(".ckpt")] if checkpoint else ["best", "last"]:
        if name in found:
            return found[name]
    if checkpoint and found:
        raise UserError(f"{folder.name} has no checkpoint {checkpoint}; it has {', '.join(found)}")
    raise UserError(f"{folder.name} has no checkpoint: only a training has, after its first epoch")


def check_source(path: Path, model: str, own: bool | None = None) -> None:
    """Raise if a checkpoint names a network whose source or function would be executed, and others wrote it.

    Weights are only data; the source of a user's own network, `my.package:factory`, is not.

    Args:
        path: the checkpoint.
        model: its model.name.
        own: whether no other user could have written it and its config, if that is known.

    Raises:
        UserError: names the file and what to do.
    """
    if not is_own(model) or own:
        return
    if why := foreign_writer(path, path.parent) or (own is False and f"the run of {path} is not yours"):
        raise UserError(
            f"{path} holds the source of {model}, which would run as you: {why}; read the source, then use a "
            "copy of the file in a folder of your own"
        )


def fingerprint(checkpoint: Path, file: IO[bytes] | None = None) -> str:
    """Return a short hash of a checkpoint's content.

    The file is a zip archive, whose directory has a CRC-32 of each tensor, so not even a large file is read.

    Args:
        checkpoint: path of the file.
        file: the file, if it is open: another process may have replaced what has this path since.

    Raises:
        UserError: the file cannot be read, or is no checkpoint.
    """
    try:
        with zipfile.ZipFile(file or checkpoint) as archive:
            entries = [[entry.filename, entry.file_size, entry.CRC] for entry in archive.infolist()]
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: no such file") from None
    except zipfile.BadZipFile:
        raise UserError(f"{checkpoint} is not a checkpoint of a training, or damaged") from None
    return signature(entries)


def check_fingerprint(config: Config, found: str | None = None) -> None:
    """Raise if the checkpoint is no longer the one that was submitted for evaluation.

    Args:
        config: config of the evaluation.
        found: fingerprint of the checkpoint that was read; None: that of the file as it is now.

    Raises:
        UserError: it is missing, or its training has replaced it since.
    """
    path = Path(config.evaluate.checkpoint or "")
    if (found or fingerprint(path)) != config.evaluate.fingerprint:
        raise UserError(
            f"{path} is another checkpoint than the one submitted: its training has continued since; "
            "evaluate it again"
        )


def check_network(
    setting: str, source: dict[str, Any], model: Model, recipe: Recipe, has_small_stem: bool
) -> None:
    """Raise if the weights of a training would compute something else in a network of these settings.

    Names and shapes of weights, compared when they are loaded, do not show all of these differences.

    Args:
        setting: the user's input, such as `model.weights=RUN`, for the error.
        source: config of that training.
        model: settings of the network that is to begin with the weights.
        recipe: its recipe.
        has_small_stem: whether model.stem changes this network, as far as that is known.

    Raises:
        UserError: names the setting.
    """
    saved, saved_recipe = with_implied(source["model"]), source["recipe"]
    for key in ("name", "options"):
        check_equal(setting, f"model.{key}", saved[key], getattr(model, key))
    if saved.get("source_hash") != model.source_hash:
        raise UserError(
            f"{setting}: it was trained with another source of {model.name}: restore those files, or export "
            "its weights and set model.weights=EXPORT/model.pt"
        )
    check_equal(setting, "recipe.blurpool", bool(saved_recipe.get("blurpool")), recipe.blurpool)
    if has_small_stem:
        stems = [is_small(saved["stem"], saved_recipe["size"]), is_small(model.stem, recipe.size)]
        check_equal(setting, "model.stem", *("small" if small else "standard" for small in stems))
    for key, value in image_settings(saved).items():
        if key not in model.preprocessing:
            words = str(value).replace(" ", "")
            raise UserError(
                f"{setting}: its model.preprocessing.{key} is {words}, and this training sets none: "
                f"add '+model.preprocessing.{key}={words}', or leave the weights out"
            )


def check_equal(setting: str, name: str, saved: Any, value: Any, why: str = "") -> None:
    """Raise unless a setting of a training has the value that it had in the training whose weights it takes.

    Args:
        setting: the user's input, such as `model.weights=RUN`, for the error.
        name: name of the setting.
        saved: its value in the training that wrote the weights.
        value: its value in the training that is to begin with them.
        why: on what condition both must be equal, for the error.

    Raises:
        UserError: names both values, and what to type.
    """
    if (saved or None) != (value or None):
        raise UserError(
            f"{setting}: its {name} is {saved}, and that of this training {value}{why}: "
            f"set {name}={saved}, or leave the weights out"
        )


def with_implied(model: dict[str, Any]) -> dict[str, Any]:
    """Return `model` of a frozen config with what its published weights imply: timm's tag, and options."""
    name, weights = model["name"], model.get("weights")
    options = {**implied_options(name, weights), **(model.get("options") or {})}
    return {**model, "name": tagged_name(name, weights), "options": options}


def image_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Return what `model.preprocessing` of a frozen config says of the pixels, apart from the crop."""
    values = model.get("preprocessing") or {}
    return {key: values[key] for key in _PIXELS if key in values}


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoints of a run: best, last, previous, then those of single epochs."""
    folder = run_folder / CHECKPOINTS
    named = [folder / name for name in (BEST, LAST, PREVIOUS)]
    return [*(path for path in named if path.exists()), *epoch_checkpoints(folder)]


def epoch_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of single epochs in `folder`, oldest epoch first."""
    numbered = [(path.stem.removeprefix("epoch-"), path) for path in folder.glob("epoch-*.ckpt")]
    return [path for _, path in sorted((int(n), path) for n, path in numbered if n.isdigit())]


def link_or_copy(source: Path, target: Path) -> None:
    """Make a second name for a checkpoint, or a copy on another file system, which appears whole.

    Raises:
        FileNotFoundError: the source does not exist.
        FileExistsError: the target does.
    """
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        with source.open("rb") as file, atomic_write(target) as copy:
            shutil.copyfileobj(file, copy)
