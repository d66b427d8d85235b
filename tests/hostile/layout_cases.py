"""Hostile folders of labelled images: tables, lists, JSON, MATLAB files and names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case
from devkit_cases import CRASH
from sample_folders import Sample, cars, dataset_of, mat, write_sample

from hpc_imagenet.data.layouts.image_finder import find_images

AB = "{train,val}/{a,b}/{1..3}.jpg"


def run(
    images: list[str],
    files: dict[str, str | bytes] | None = None,
    then: Callable[[Path], object] | None = None,
    **settings: Any,
) -> Callable[[Path], str]:
    """Return the work of a case: find the images of a folder with these files."""

    def work(folder: Path) -> str:
        root = folder / "source"
        root.mkdir()
        write_sample(root, Sample(images, "", (0, 0, 0), files or {}))
        if then:
            then(root)
        found = find_images(root, dataset_of(**settings), 2)
        outside = [
            image.path
            for images in found.splits.values()
            for image in images
            if ".." in Path(image.path).parts
        ]
        assert not outside, f"images outside of the folder: {outside}"
        return f"{sum(map(len, found.splits.values()))} images of {len(found.classes)} classes"

    return work


FLAT = ["i/{1..4}.jpg"]
_JSON: dict[str, Any] = {"val_fraction": 0.5, "labels": "t.json"}
_MAT: dict[str, Any] = {"val_fraction": 0.5, "labels": "t.mat"}
_VAL: dict[str, Any] = {"val_fraction": 0.5}
_ROWS = "file,label\n" + "".join(f"i/{n}.jpg,{'ab'[n % 2]}\n" for n in range(1, 5))

_INPUTS: list[tuple[str, Callable[[Path], str], str]] = [
    ("folders, all is well", run([AB]), "ok: 12 images of 2 classes"),
    ("CSV, all is well", run(FLAT, {"t.csv": _ROWS}, **_VAL), "ok: 4 images of 2 classes"),
    ("CSV with CRLF", run(FLAT, {"t.csv": _ROWS.replace("\n", "\r\n")}, **_VAL), "ok: 4 images of 2 classes"),
    (
        "CSV with a byte order mark",
        run(FLAT, {"t.csv": "\ufeff" + _ROWS}, **_VAL),
        "ok: 4 images of 2 classes",
    ),
    ("CSV in UTF-16", run(FLAT, {"t.csv": _ROWS.encode("utf-16")}, **_VAL), "t.csv is not UTF-8"),
    (
        "CSV in Latin-1",
        run(FLAT, {"t.csv": _ROWS.replace("a\n", "é\n").encode("latin-1")}, **_VAL),
        "is not UTF-8",
    ),
    ("CSV with a NUL byte", run(FLAT, {"t.csv": _ROWS.replace("i/1", "i/\0001")}, **_VAL), ""),
    ("CSV with a field of 200 kB", run(FLAT, {"t.csv": _ROWS + f'"{"x" * 200_000}",a\n'}, **_VAL), ""),
    ("CSV with an open quote", run(FLAT, {"t.csv": _ROWS + '"i/5.jpg,a\n'}, **_VAL), ""),
    ("CSV with a path upward", run(FLAT, {"t.csv": _ROWS + "../../etc/passwd.jpg,a\n"}, **_VAL), ""),
    ("CSV with an absolute path", run(FLAT, {"t.csv": _ROWS + "/etc/passwd.jpg,a\n"}, **_VAL), ""),
    (
        "CSV with a missing image",
        run(FLAT, {"t.csv": _ROWS + "i/9.jpg,a\n"}, **_VAL),
        "t.csv lists 5 images, but 1 of them",
    ),
    ("CSV with a row too short", run(FLAT, {"t.csv": _ROWS + "i/4.jpg\n"}, **_VAL), ""),
    ("CSV with two labels of one image", run(FLAT, {"t.csv": _ROWS + "i/1.jpg,a\n"}, **_VAL), ""),
    ("CSV with an empty label", run(FLAT, {"t.csv": _ROWS.replace("1.jpg,b", "1.jpg,")}, **_VAL), ""),
    (
        "CSV with a label of escape sequences",
        run(FLAT, {"t.csv": _ROWS.replace(",b", ",\x1b[2Jb")}, **_VAL),
        "ok: 4 images",
    ),
    (
        "CSV with a label that leads upward",
        run(FLAT, {"t.csv": _ROWS.replace(",b", ",../b")}, **_VAL),
        "ok: 4 images",
    ),
    (
        "CSV with a label of 5,000 characters",
        run(FLAT, {"t.csv": _ROWS.replace(",b", "," + "b" * 5000)}, **_VAL),
        "",
    ),
    ("CSV that is empty", run(FLAT, {"t.csv": ""}, **_VAL), ""),
    ("CSV of 3,000 columns", run(FLAT, {"t.csv": ("x," * 3000 + "\n") * 5}, **_VAL), ""),
    (
        "two tables that contradict",
        run(FLAT, {"t.csv": _ROWS, "u.csv": _ROWS.replace(",a", ",c")}, **_VAL),
        "",
    ),
    (
        "JSON of an object",
        run(FLAT, {"t.json": '{"a": ["i/1.jpg", "i/3.jpg"], "b": ["i/2.jpg", "i/4.jpg"]}'}, **_JSON),
        "ok: 4",
    ),
    ("JSON that is cut", run(FLAT, {"t.json": '{"a": ["i/1.jpg"'}, **_JSON), "no line of it names an image"),
    (
        "JSON nested 100,000 deep",
        run(FLAT, {"t.json": "[" * 100_000}, **_JSON),
        "no line of it names an image",
    ),
    (
        "JSON with a number of 5,000 digits",
        run(FLAT, {"t.json": '{"i/1.jpg": ' + "9" * 5000 + "}"}, **_JSON),
        "no line of it names an image",
    ),
    (
        "JSON that is a list of lists",
        run(FLAT, {"t.json": "[[1],[2]]"}, **_JSON),
        "no line of it names an image",
    ),
    (
        "JSON as COCO without categories",
        run(FLAT, {"t.json": '{"images":[],"annotations":[],"categories":[]}'}, **_JSON),
        "no line of it names an image",
    ),
    (
        "JSON as COCO with ids that are lists",
        run(
            FLAT,
            {"t.json": '{"images":[{"id":[1],"file_name":"i/1.jpg"}],"annotations":[],"categories":[]}'},
            **_JSON,
        ),
        "no line of it names an image",
    ),
    (
        "JSON lines with a broken line",
        run(FLAT, {"t.jsonl": '{"file":"i/1.jpg","label":"a"}\n{"fi\n'}, **_VAL),
        "has one class folder only",
    ),
    (
        "MATLAB file, all is well",
        run(FLAT, {"t.mat": cars(*((f"i/{n}.jpg", n % 2) for n in range(1, 5)))}, **_MAT),
        "ok: 4 images",
    ),
    ("MATLAB file that is text", run(FLAT, {"t.mat": "hello" * 100}, **_MAT), "no line of it names an image"),
    (
        "MATLAB file that is cut",
        run(FLAT, {"t.mat": cars(("i/1.jpg", 1))[:200]}, **_MAT),
        "no line of it names an image",
    ),
    (
        "MATLAB file that crashes scipy",
        run(FLAT, {"t.mat": bytes(CRASH)}, **_MAT),
        "no line of it names an image",
    ),
    (
        "MATLAB file of 7.3",
        run(FLAT, {"t.mat": b"MATLAB 7.3 MAT-file".ljust(512)}, **_MAT),
        "no line of it names an image",
    ),
    (
        "MATLAB file with NaN for a class",
        run(FLAT, {"t.mat": mat(file_list=["i/1.jpg"], labels=[float("nan")])}, **_MAT),
        "",
    ),
    (
        "MATLAB file with lists of unequal length",
        run(FLAT, {"t.mat": mat(file_list=["i/1.jpg", "x"], labels=[1])}, **_MAT),
        "no line of it names an image",
    ),
    (
        "class folder that is a link out of the folder",
        run([AB], then=lambda root: (root / "train/c").symlink_to("/etc")),
        "",
    ),
    (
        "class folder that is a link to itself",
        run([AB], then=lambda root: (root / "train/c").symlink_to(root / "train")),
        "",
    ),
    (
        "image that is a link to nothing",
        run([AB], then=lambda root: (root / "train/a/9.jpg").symlink_to("/nowhere")),
        "",
    ),
    ("image that is a pipe", run([AB], then=lambda root: os.mkfifo(root / "train/a/9.jpg")), ""),
    ("image that is a folder", run([AB], then=lambda root: (root / "train/a/9.jpg").mkdir()), ""),
    ("image of 0 bytes", run([AB], then=lambda root: (root / "train/a/9.jpg").touch()), ""),
    (
        "class name that is not UTF-8",
        run(
            [AB],
            then=lambda root: [
                (root / split / os.fsdecode(b"\xff")).mkdir(parents=True)
                or (root / split / os.fsdecode(b"\xff") / "1.jpg").write_bytes(b"x")
                for split in ("train", "val")
            ],
        ),
        "is not UTF-8; rename it",
    ),
    ("class name with a line end", run([AB, "{train,val}/c\nd/1.jpg"]), "ok: 14 images of 3 classes"),
    ("class names that differ by case", run([AB, "{train,val}/A/1.jpg"]), "ok: 14 images of 3 classes"),
    (
        "2,000 empty class folders",
        run([AB], then=lambda root: [(root / "train" / f"x{n}").mkdir() for n in range(2000)]),
        "no training",
    ),
    ("folders 200 deep", run(["x/" * 200 + "{a,b}/1.jpg"], **_VAL), ""),
]

CASES = [Case("layout", name, work, expected) for name, work, expected in _INPUTS]
