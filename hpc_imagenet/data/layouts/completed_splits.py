"""Complete the splits of a dataset: the same classes in all of them, and a validation split."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.data.ilsvrc.labels_file import MAX_ID_BYTES, class_id
from hpc_imagenet.data.layouts.folder_tree import Folder, foreign_photos
from hpc_imagenet.data.layouts.split_names import class_keys, natural_key, same_class
from hpc_imagenet.errors import UserError

Labels = dict[str, str]  # path of an image → its class


def require_disjoint(samples: dict[str, Labels], source: str) -> None:
    """Require training images, and that no image is in two splits.

    Args:
        samples: the images of each split.
        source: the dataset's folder.

    Raises:
        UserError: there are none, or an image is in two splits.
    """
    seen: dict[str, str] = {}
    for split, labels in samples.items():
        for path in labels:
            if path in seen:
                raise UserError(
                    f"{source}/{path} is in {seen[path]} and in {split}; an image belongs to one split only"
                )
            seen[path] = split
    if not samples["train"]:
        raise UserError(f"{source} has no training images; set dataset.splits.train=FOLDER")


def match_classes(
    samples: dict[str, Labels],
    empty: Iterable[Folder],
    dataset: Dataset,
    source: str,
    skipped: Counter[str],
    warnings: list[str],
) -> list[str]:
    """Give val and test the classes of train, and return these in label order.

    Args:
        samples: the images of each split; those of val and test change.
        empty: class folders without images.
        dataset: `empty_classes` decides about classes without training images.
        source: the dataset's folder.
        skipped: reason → number of files that are left out; is extended.
        warnings: is extended.

    Raises:
        UserError: a class has no training images, its name is not valid, or there is one class only.
    """
    trained = set(samples["train"].values())
    keys = class_keys(trained)
    for name in sorted(trained):
        if any("\ud800" <= char <= "\udfff" for char in name):
            raise UserError(f"{source}: the class {name!a} is not UTF-8; rename it")
        if len(class_id(name).encode()) > MAX_ID_BYTES:
            raise UserError(
                f"{source}: the class name {name[:40]!r} … has more than {MAX_ID_BYTES} bytes; shorten it"
            )
        other = keys[unicodedata.normalize("NFC", name)]
        if other != name:
            raise UserError(
                f"{source}: {name!a} and {other!a} are the same name in Unicode; rename one class"
            )
    for split in ("val", "test"):
        samples[split] = {path: same_class(name, keys) or name for path, name in samples[split].items()}
    without = {each.name: foreign_photos(each) for each in empty}
    used = {name for labels in samples.values() for name in labels.values()}.union(without)
    if absent := sorted(used - trained, key=natural_key):
        shown = _shown(absent)
        if dataset.empty_classes == "fail":
            alike = {_letters(name): name for name in trained}
            for name in absent:
                if similar := alike.get(_letters(name)):
                    raise UserError(f"{source}: {similar} of train is {name} elsewhere; rename one of them")
            endings = " and ".join(sorted({ending for name in absent for ending in without.get(name, ())}))
            convert = f", convert the {endings} files, which Pillow does not decode" if endings else ""
            convert += f", move their folder out of {source} if it is no class" if endings else ""
            raise UserError(
                f"{source} has no training images of {shown}; add images{convert}, or set "
                "dataset.empty_classes=skip to leave these classes out of all splits"
            )
        for split, labels in samples.items():
            samples[split] = {path: name for path, name in labels.items() if name in trained}
            skipped["class without training images"] += len(labels) - len(samples[split])
        warnings.append(f"left out, as there are no training images: {shown}")
    if len(trained) < 2:
        raise UserError(f"{source} has one class only, {trained.pop()}; a model needs at least two")
    return sorted(trained, key=natural_key)


def complete_splits(samples: dict[str, Labels], dataset: Dataset, source: str, warnings: list[str]) -> None:
    """Make a validation split, if there is none: a share of train, or test.

    Args:
        samples: the images of each split; they change.
        dataset: `val_fraction`, `split_seed` and `splits` decide.
        source: the dataset's folder.
        warnings: is extended.

    Raises:
        UserError: there is none and no setting says how to make it, or there is one and a setting makes one.
    """
    if dataset.val_fraction is not None:
        if samples["val"]:
            raise UserError(
                f"{source} has {len(samples['val'])} val images already; remove dataset.val_fraction, or set "
                "dataset.splits.test to use them as test"
            )
        train = samples["train"]
        chosen = stratified_choice(train, dataset.val_fraction, dataset.split_seed)
        if not chosen:
            raise UserError(f"{source} has one image per class, so dataset.val_fraction leaves none for val")
        samples["val"] = {path: train[path] for path in train if path in chosen}
        samples["train"] = {path: name for path, name in train.items() if path not in chosen}
    elif not samples["val"]:
        if not samples["test"] or dataset.splits.get("test"):
            raise UserError(
                f"{source} has no validation images; set dataset.val_fraction=0.1 to take a share of train, "
                "or dataset.splits.val=FOLDER"
            )
        samples["val"], samples["test"] = samples["test"], {}
        warnings.append("test is used as val, as there is no val; dataset.val_fraction=0.1 keeps it as test")
    absent = set(samples["train"].values()) - set(samples["val"].values())
    if absent:
        warnings.append(f"no val images of {_shown(sorted(absent, key=natural_key))}")


def stratified_choice(labels: Labels, fraction: float, seed: int) -> set[str]:
    """Return the paths of a share of each class: at least one image, and never all.

    The choice depends on the seed, the name of each class and the names of its files: a moved folder and
    images of other classes change nothing.

    Args:
        labels: path → class.
        fraction: share of each class, 0 … 1.
        seed: seed of the choice.
    """
    members: dict[str, list[str]] = {}
    for path, name in labels.items():
        members.setdefault(name, []).append(path)
    chosen: set[str] = set()
    for name, paths in members.items():
        count = min(max(int(len(paths) * fraction + 0.5), 1), len(paths) - 1)
        chosen.update(sorted(paths, key=lambda path: (_draw(seed, name, path), path))[:count])
    return chosen


def _draw(seed: int, name: str, path: str) -> bytes:
    text = f"{seed}\0{name}\0{path.rpartition('/')[2]}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more classes" if len(names) > 3 else "")
