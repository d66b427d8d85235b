"""The model card of an export, README.md: data, recipe, accuracy, classes and preprocessing."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterable
from typing import Any

import yaml

from hpc_imagenet import __version__
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import Manifest
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import escape_name
from hpc_imagenet.training.export.export_formats import FORMATS
from hpc_imagenet.training.export.loader_script import NAME as SCRIPT
from hpc_imagenet.training.export.plain_network import PlainNetwork
from hpc_imagenet.training.trained import TrainedModel

FILE = "README.md"


def model_card(
    trained: TrainedModel,
    name: str,
    plain: PlainNetwork | None,
    evaluations: Iterable[dict[str, Any]] = (),
) -> str:
    """Return the model card as Markdown.

    Args:
        trained: the network.
        name: name of the format.
        plain: code of the network, if the format has weights alone.
        evaluations: results of evaluations: datastore, split, images, top1 and top5 (0 to 1), and how the
            images were evaluated otherwise than in the training (`difference`).
    """
    config, identity = trained.config, trained.identity
    manifest = _manifest(trained)
    data = manifest.name if manifest else versions.parse_reference(config.datastore.name)[0]
    parts = [_front_matter(trained, data, plain)] if name == "hf" else []
    parts += [f"# {_text(config.model.name)} trained on {_text(data)}", _use(name, plain)]
    parts += ["## Accuracy", _accuracy(trained, evaluations)]
    parts += ["## Data", _data(trained, data, manifest, identity)]
    parts += ["## Preprocessing", f"RGB, 0 to 1; {trained.preprocessing}.\n\n`{SCRIPT}` does this."]
    parts += ["## Training", _training(trained, identity)]
    parts += ["## Classes", _classes(trained)]
    return "\n\n".join(parts) + "\n"


def _front_matter(trained: TrainedModel, data: str, plain: PlainNetwork | None) -> str:
    """Return what the Hugging Face hub reads."""
    library = "timm" if plain and plain.in_timm else "pytorch"
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-classification"}
    values["tags"] = ["image-classification", library]
    if "top1" in trained.metrics:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data, "split": "val"},
            "metrics": [{"type": "accuracy", "value": round(trained.metrics["top1"], 4)}],
        }
        values["model-index"] = [{"name": trained.config.model.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _use(name: str, plain: PlainNetwork | None) -> str:
    file = FORMATS[name].file
    lines = [f"`{file}` is the network, `{SCRIPT}` loads it and classifies images:"]
    lines += [f"```sh\npython {SCRIPT} IMAGE\n```"]
    if plain and plain.changes:
        lines += [
            f"Its layers differ from those of the network in {_text(plain.library)}, as `{SCRIPT}` shows."
            " There its weights would mean something else."
        ]
    elif plain and plain.in_timm and name == "hf":
        lines += ["timm loads the folder, or its copy on the hub (`hf-hub:OWNER/NAME`):"]
        lines += ['```python\ntimm.create_model("local-dir:FOLDER", pretrained=True)\n```']
    return "\n\n".join(lines)


def _accuracy(trained: TrainedModel, evaluations: Iterable[dict[str, Any]]) -> str:
    rows = [("val, in training", trained.metrics)] if "top1" in trained.metrics else []
    for result in evaluations:
        name = f"{result['split']} of {result['datastore']}"
        rows.append((", ".join(filter(None, [name, result.get("difference")])), result))
    if not rows:
        return "Not measured: the checkpoint was saved within an epoch."
    table = ["| images | top-1 | top-5 |", "|---|---|---|"]
    table += [f"| {_text(name)} | {row['top1']:.2%} | {row['top5']:.2%} |" for name, row in rows]
    mean = "logits are the mean over an image and its mirror image"
    differs = any("mirrored" in str(row.get("difference")) for _, row in rows)
    if trained.config.recipe.val_flip:
        others = ", but in rows that are not mirrored" if differs else ""
        table += ["", f"{mean.capitalize()} (`recipe.val_flip`){others}."]
    elif differs:
        table += ["", f"Mirrored: {mean}."]
    return "\n".join(table)


def _data(trained: TrainedModel, name: str, manifest: Manifest | None, identity: dict[str, Any]) -> str:
    datastore = trained.config.datastore
    version = f", version {datastore.version}" if datastore.version else ""
    lines = [f"- {_text(name)}{version}: {len(trained.classes):,} classes"]
    if manifest:
        lines += [f"- {split}: {part.images:,} images" for split, part in manifest.splits.items()]
    return "\n".join([*lines, f"- content {_text(str(identity.get('data')))}"])


def _training(trained: TrainedModel, identity: dict[str, Any]) -> str:
    config = trained.config
    parameters = sum(weight.numel() for weight in trained.network.parameters())
    settings = {"model": config.model.identity(), "recipe": config.recipe.identity(), "seed": config.seed}
    weights = " These are the averaged (EMA) weights." if config.recipe.ema is not None else ""
    code = " ".join(str(value) for value in (identity.get("code") or {}).values()) or __version__
    return (
        f"{parameters:,} parameters after {trained.step:,} steps.{weights} Trained with hpc_imagenet "
        f"{_text(code)}.\n\n"
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```"
    )


def _classes(trained: TrainedModel) -> str:
    rows = ["| label | id | name |", "|---|---|---|"]
    rows += [
        f"| {label} | {_text(entry.wnid)} | {_text(', '.join(entry.names))} |"
        for label, entry in enumerate(trained.classes)
    ]
    return "\n".join(rows)


def _manifest(trained: TrainedModel) -> Manifest | None:
    """Return the manifest of the training's datastore, if it can be read without a network."""
    datastore = trained.config.datastore
    if not versions.is_remote(datastore.url):
        with contextlib.suppress(UserError, OSError):
            return versions.open_version(datastore).manifest
    return None


def _text(text: str) -> str:
    """Return text that Markdown shows as written, on one line."""
    shown = html.escape(escape_name(text), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in shown)
