"""Look up the images that a table names: by path, by file name, with or without ending."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from posixpath import dirname, splitext

from hpc_imagenet.data.layouts.folder_tree import IMAGE_ENDINGS
from hpc_imagenet.data.layouts.split_names import split_of
from hpc_imagenet.errors import UserError

Rank = Callable[[str], tuple[int, ...]]


class ImageIndex:
    """Paths of images by their names.

    Args:
        paths: of the images, relative to the dataset's folder.
        root_name: name of that folder, with which paths in tables may begin.
    """

    def __init__(self, paths: Iterable[str], root_name: str) -> None:
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        self._root = f"{root_name}/"
        for path in paths:
            name = path.rpartition("/")[2]
            self._by_name.setdefault(name, []).append(path)
            self._by_stem.setdefault(splitext(name)[0], []).append(path)

    def __contains__(self, reference: str) -> bool:
        return bool(self._candidates(reference))

    def find(self, reference: str, rank: Rank, table: str) -> str | None:
        """Return the path of the image that a table's value names; None if there is none.

        Args:
            reference: a path, or the end of one, with or without ending.
            rank: rank of a folder; of several images the one in the folder of the lowest rank is meant.
            table: path of the table, for errors.

        Raises:
            UserError: two images have that rank.
        """
        found = self.nearest(reference, rank)
        if len(found) > 1:
            raise UserError(ambiguity(table, reference, found))
        return found[0] if found else None

    def nearest(self, reference: str, rank: Rank) -> list[str]:
        """Return the paths of the lowest rank that a table's value may mean, sorted; see `find`."""
        found = self._candidates(reference)
        if len(found) < 2:
            return found
        ranks = sorted((rank(dirname(path)), path) for path in found)
        return [path for each, path in ranks if each == ranks[0][0]]

    def _candidates(self, reference: str) -> list[str]:
        folders, _, name = reference.strip().replace("\\", "/").removeprefix("./").strip("/").rpartition("/")
        if not name:
            return []
        if name in self._by_name:
            found = self._by_name[name]
        else:
            ending = name.lower().endswith(IMAGE_ENDINGS)
            found = self._by_stem.get(splitext(name)[0] if ending else name, [])
        while folders and found:  # an absolute path of another machine begins with folders unknown here
            end = f"/{folders}"
            if matching := [
                path for path in found if f"/{self._root}{dirname(path)}".rstrip("/").endswith(end)
            ]:
                return matching
            folders = folders.partition("/")[2]
            if not folders:
                return []
        return found


def ambiguity(table: str, reference: str, found: Sequence[str]) -> str:
    """Return the error of a table's value that may mean several images."""
    return f"{table}: {reference} may be {found[0]} or {found[1]}; write its path"


def is_elsewhere(reference: str, path: str) -> bool:
    """Whether a table's value names a folder of val or test, but the image found for it is in one of train.

    The index leaves out the first folders of a value if it does not know them, so `test/cat/1.jpg` may have
    been found as `train/cat/1.jpg`.

    Args:
        reference: the value.
        path: of the image that was found.
    """
    named, found = (
        next(filter(None, map(split_of, reversed(dirname(each.replace("\\", "/")).split("/")))), None)
        for each in (reference, path)
    )
    return found == "train" and named in ("val", "test")


def rank_folders(table_folder: str, split: str | None) -> Rank:
    """Return the rank of a folder for `ImageIndex.find`.

    Args:
        table_folder: folder of the table.
        split: split of the table; None if it has none.
    """
    ranks: dict[str, tuple[int, ...]] = {}

    def rank(folder: str) -> tuple[int, ...]:
        if folder not in ranks:
            inside = folder == table_folder or f"{folder}/".startswith(
                f"{table_folder}/" if table_folder else ""
            )
            of_folder = next(filter(None, map(split_of, reversed(folder.split("/")))), None)
            mismatch = 0 if of_folder == split else 1 if of_folder in (None, "train") else 2
            ranks[folder] = (mismatch, not inside)
        return ranks[folder]

    return rank
