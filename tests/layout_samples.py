"""Small folders with the layouts of published datasets, as they unpack, and of collections at home."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Text = str | bytes


@dataclass
class Sample:
    """One layout: its files, the settings that it needs, and what must be found in it."""

    images: list[str]  # patterns for `expand`
    classes: str  # separated by |
    counts: tuple[int, int, int]  # train, val, test
    files: dict[str, Text] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # fields of Dataset
    skipped: dict[str, int] = field(default_factory=dict)  # a part of what is expected
    warning: str = ""  # a part of one


def expand(pattern: str) -> list[str]:
    """Return the paths of a pattern: `{a,b}` are alternatives, `{1..3}` numbers."""
    parts = []
    for number, part in enumerate(re.split(r"\{([^}]*)\}", pattern)):
        if number % 2 == 0:
            parts.append([part])
        elif match := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            parts.append([str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2]) + 1)])
        else:
            parts.append(part.split(","))
    return ["".join(choice) for choice in itertools.product(*parts)]


@functools.cache
def image_bytes(ending: str, colour: int) -> bytes:
    """Return a small image in the format of an ending."""
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "ppm": "PPM", "pgm": "PPM"}.get(
        ending, ending.upper()
    )
    Image.new("L" if ending == "pgm" else "RGB", (9, 7), colour).save(buffer, kind)
    return buffer.getvalue()


def write_sample(root: Path, sample: Sample) -> Path:
    """Write a sample's folder."""
    paths = [path for pattern in sample.images for path in expand(pattern)]
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(path.rpartition(".")[2].lower(), number % 256))
    for path, content in sample.files.items():
        file = root / path
        if path.endswith("/"):
            file.mkdir(parents=True, exist_ok=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def lines(*patterns: str) -> str:
    """Return the paths of patterns, one per line."""
    return "".join(f"{path}\n" for pattern in patterns for path in expand(pattern))


def mat(**variables: Any) -> bytes:
    """Return a MATLAB file."""
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def cells(*values: Any) -> Any:
    """Return a column of MATLAB cells."""
    import numpy as np

    column = np.empty((len(values), 1), object)
    for number, value in enumerate(values):
        column[number, 0] = value
    return column


def cars(*rows: tuple[str, int]) -> bytes:
    """Return annotations of Stanford Cars."""
    import numpy as np

    annotations = np.empty((1, len(rows)), [("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
    for number, (name, label) in enumerate(rows):
        annotations[0, number] = (1, label, name)
    return mat(annotations=annotations)


def imagenette() -> Sample:
    return Sample(
        ["imagenette2-160/{train,val}/{n01440764,n02102040}/{1..3}.JPEG"],
        "n01440764|n02102040",
        (6, 6, 0),
        {"imagenette2-160/noisy_imagenette.csv": "path,noisy_labels_0\ntrain/n01440764/1.JPEG,n0\n"},
    )


def cifar_10_folders() -> Sample:
    return Sample(
        ["cifar10/{train,test}/{airplane,bird}/{0001..0002}.png"],
        "airplane|bird",
        (4, 4, 0),
        {"cifar10/labels.txt": "airplane\nbird\n"},
        warning="test is used as val",
    )


def cifar_100_folders() -> Sample:
    return Sample(
        ["{train,test}/fish/{ray,shark}/{1..2}.png", "{train,test}/trees/{maple,oak}/{1..2}.png"],
        "maple|oak|ray|shark",
        (8, 8, 0),
        settings={"labels": "folder:2"},
    )


def cifar_10_kaggle() -> Sample:
    return Sample(
        ["train/{1..8}.png", "test/{1..8}.png"],
        "cat|dog",
        (6, 2, 0),
        {
            "trainLabels.csv": "id,label\n"
            + "".join(f"{n},{'cat' if n % 2 else 'dog'}\n" for n in range(1, 9)),
            "sampleSubmission.csv": "id,label\n1,cat\n2,cat\n",
        },
        {"val_fraction": 0.25},
        {"test image without a class": 8},
    )


def mnist_folders() -> Sample:
    return Sample(
        ["mnist_png/{training,testing}/{0..10}/{1..2}.png"],
        "0|1|2|3|4|5|6|7|8|9|10",
        (22, 22, 0),
    )


def tiny_imagenet() -> Sample:
    return Sample(
        [
            "tiny-imagenet-200/train/{n01443537,n01629819}/images/{n01_0,n01_1}.JPEG",
            "tiny-imagenet-200/val/images/val_{0..3}.JPEG",
            "tiny-imagenet-200/test/images/test_{0..3}.JPEG",
        ],
        "n01443537|n01629819",
        (4, 4, 0),
        {
            "tiny-imagenet-200/wnids.txt": "n01443537\nn01629819\n",
            "tiny-imagenet-200/words.txt": "n01443537\tgoldfish, Carassius auratus\nn01629819\tsalamander\n",
            "tiny-imagenet-200/train/n01443537/n01443537_boxes.txt": "n01_0.JPEG\t0\t10\t63\t58\n",
            "tiny-imagenet-200/val/val_annotations.txt": "".join(
                f"val_{n}.JPEG\t{('n01443537', 'n01629819')[n % 2]}\t0\t32\t44\t62\n" for n in range(4)
            ),
        },
        skipped={"test image without a class": 4},
    )


def imagenet_100_kaggle() -> Sample:
    return Sample(
        [
            "train.X1/{n01,n02}/{1..2}.JPEG",
            "train.X2/{n03,n04}/{1..2}.JPEG",
            "val.X/{n01,n02,n03,n04}/9.JPEG",
        ],
        "n01|n02|n03|n04",
        (8, 4, 0),
        {"Labels.json": '{"n01": "fish", "n02": "shark"}'},
    )


def imagenet_v2() -> Sample:
    return Sample(
        ["imagenetv2-matched-frequency-format-val/{0..11}/{a,b,c,d}.jpeg"],
        "0|1|2|3|4|5|6|7|8|9|10|11",
        (36, 12, 0),
        settings={"val_fraction": 0.25},
    )


def imagenet_r() -> Sample:
    return Sample(
        ["imagenet-r/{n01,n02}/{art,sketch}_{0..3}.jpg"],
        "n01|n02",
        (14, 2, 0),
        {"imagenet-r/README.txt": "n01 fish\nn02 shark\n"},
        {"val_fraction": 0.1},
        {"not an image (.txt)": 1},
    )


def cub_200() -> Sample:
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    images = [f"{name}/{name[4:]}_{n}.jpg" for name in names for n in range(4)]
    return Sample(
        ["CUB_200_2011/images/" + path for path in images] + ["CUB_200_2011/segmentations/a/x.png"],
        "|".join(names),
        (4, 4, 0),
        {
            "CUB_200_2011/images.txt": "".join(f"{n} {path}\n" for n, path in enumerate(images, 1)),
            "CUB_200_2011/image_class_labels.txt": "".join(f"{n} {1 + (n > 4)}\n" for n in range(1, 9)),
            "CUB_200_2011/train_test_split.txt": "".join(f"{n} {n % 2}\n" for n in range(1, 9)),
            "CUB_200_2011/classes.txt": "".join(f"{n} {name}\n" for n, name in enumerate(names, 1)),
            "CUB_200_2011/bounding_boxes.txt": "1 60.0 27.0 325.0 304.0\n",
            "attributes.txt": "1 has_bill_shape::curved_(up_or_down)\n",
        },
        skipped={"mask or preview": 1},
    )


def stanford_dogs() -> Sample:
    breeds = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    train = [f"{breed}/{breed[:9]}_{n}.jpg" for breed in breeds for n in range(3)]
    test = [f"{breed}/{breed[:9]}_{n}.jpg" for breed in breeds for n in (3, 4)]
    return Sample(
        [f"Images/{path}" for path in train + test],
        "|".join(breeds),
        (6, 4, 0),
        {
            "Annotation/n02085620-Chihuahua/n02085620_0": "<annotation/>",
            "lists/train_list.mat": mat(file_list=cells(*train), labels=[[1]] * 3 + [[2]] * 3),
            "lists/test_list.mat": mat(file_list=cells(*test), labels=[[1]] * 2 + [[2]] * 2),
            "lists/file_list.mat": mat(file_list=cells(*train, *test), labels=[[1]] * 10),
        },
    )


def stanford_cars() -> Sample:
    names = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")
    return Sample(
        ["cars_train/{00001..00004}.jpg", "cars_test/{00001..00004}.jpg"],
        "|".join(names),
        (4, 4, 0),
        {
            "devkit/cars_train_annos.mat": cars(*((f"{n:05d}.jpg", 1 + n % 2) for n in range(1, 5))),
            "devkit/cars_test_annos.mat": mat(annotations=[[1]]),
            "devkit/cars_meta.mat": mat(class_names=cells(*names)),
            "cars_test_annos_withlabels.mat": cars(*((f"{n:05d}.jpg", 1 + n % 2) for n in range(1, 5))),
        },
    )


def oxford_pets() -> Sample:
    breeds = {"Abyssinian": "1 1 1", "american_bulldog": "2 2 1", "great_pyrenees": "3 2 2"}
    return Sample(
        [
            "images/{Abyssinian,american_bulldog,great_pyrenees}_{1..4}.jpg",
            "annotations/trimaps/{Abyssinian,american_bulldog,great_pyrenees}_{1..4}.png",
        ],
        "Abyssinian|american_bulldog|great_pyrenees",
        (6, 6, 0),
        {
            "annotations/list.txt": "#Image CLASS-ID SPECIES BREED ID\n"
            + "".join(f"{name}_{n} {label}\n" for name, label in breeds.items() for n in range(1, 5)),
            "annotations/trainval.txt": "".join(
                f"{name}_{n} {label}\n" for name, label in breeds.items() for n in (1, 2)
            ),
            "annotations/test.txt": "".join(
                f"{name}_{n} {label}\n" for name, label in breeds.items() for n in (3, 4)
            ),
            "annotations/README": "Oxford-IIIT Pet",
        },
        skipped={"mask or preview": 12},
    )


def flowers_102() -> Sample:
    return Sample(
        ["jpg/image_{00001..00009}.jpg"],
        "1|2|10",
        (3, 3, 3),
        {
            "imagelabels.mat": mat(labels=[[1, 2, 10] * 3]),
            "setid.mat": mat(trnid=[[1, 2, 3]], valid=[[4, 5, 6]], tstid=[[7, 8, 9]]),
        },
    )


def food_101() -> Sample:
    return Sample(
        ["food-101/images/{apple_pie,waffles}/{1..5}.jpg"],
        "apple_pie|waffles",
        (6, 4, 0),
        {
            "food-101/meta/train.txt": lines("{apple_pie,waffles}/{1..3}"),
            "food-101/meta/test.txt": lines("{apple_pie,waffles}/{4..5}"),
            "food-101/meta/train.json": json.dumps(
                {c: expand(c + "/{1..3}") for c in ("apple_pie", "waffles")}
            ),
            "food-101/meta/test.json": json.dumps(
                {c: expand(c + "/{4..5}") for c in ("apple_pie", "waffles")}
            ),
            "food-101/meta/classes.txt": "apple_pie\nwaffles\n",
            "food-101/meta/labels.txt": "Apple pie\nWaffles\n",
            "food-101/README.txt": "Food-101",
        },
    )


def caltech_101() -> Sample:
    return Sample(
        ["caltech-101/101_ObjectCategories/{BACKGROUND_Google,accordion}/image_{0001..0004}.jpg"],
        "BACKGROUND_Google|accordion",
        (6, 2, 0),
        {"caltech-101/Annotations/accordion/annotation_0001.mat": b"MATLAB"},
        {"val_fraction": 0.2},
    )


def caltech_256() -> Sample:
    return Sample(
        [
            "256_ObjectCategories/{001.ak47,198.spider,257.clutter}/x_{1..4}.jpg",
            "256_ObjectCategories/056.dog/greg/vision309/{1..2}.jpg",
        ],
        "001.ak47|056.dog|198.spider|257.clutter",
        (10, 4, 0),
        {"256_ObjectCategories/198.spider/RENAME2": "mv"},
        {"val_fraction": 0.2},
    )


def dtd() -> Sample:
    return Sample(
        ["dtd/images/{banded,zigzagged}/{banded,zigzagged}_{0001..0003}.jpg"],
        "banded|zigzagged",
        (2, 2, 2),
        {
            **{
                f"dtd/labels/{split}{fold}.txt": lines(
                    f"{{banded,zigzagged}}/banded_000{1 + (place + fold) % 3}.jpg"
                )
                for fold in (1, 2)
                for place, split in enumerate(("train", "val", "test"))
            },
            "dtd/imdb/imdb.mat": b"MATLAB",
        },
        {"splits": {split: f"dtd/labels/{split}1.txt" for split in ("train", "val", "test")}},
    )


def eurosat() -> Sample:
    return Sample(
        ["2750/{AnnualCrop,SeaLake}/{AnnualCrop,SeaLake}_{1..4}.jpg"],
        "AnnualCrop|SeaLake",
        (14, 2, 0),
        settings={"val_fraction": 0.1},
    )


def eurosat_lists() -> Sample:
    return Sample(
        ["ds/images/remote_sensing/2750/{AnnualCrop,SeaLake}/tile_{1..4}.tif"],
        "AnnualCrop|SeaLake",
        (4, 2, 2),
        {
            "ds/eurosat-train.txt": lines("{AnnualCrop,SeaLake}/tile_{1..2}.tif"),
            "ds/eurosat-val.txt": lines("{AnnualCrop,SeaLake}/tile_3.tif"),
            "ds/eurosat-test.txt": lines("{AnnualCrop,SeaLake}/tile_4.tif"),
        },
    )


def places_365() -> Sample:
    return Sample(
        [
            "data_large/a/{airfield,alley}/{00000001..00000002}.jpg",
            "data_large/b/barn/{00000001..00000002}.jpg",
            "val_large/Places365_val_{00000001..00000003}.jpg",
            "test_large/Places365_test_{00000001..00000003}.jpg",
        ],
        "airfield|alley|barn",
        (6, 3, 0),
        {
            "categories_places365.txt": "/a/airfield 0\n/a/alley 1\n/b/barn 2\n",
            "places365_train_standard.txt": "".join(
                f"/{name}/0000000{n}.jpg {label}\n"
                for label, name in enumerate(("a/airfield", "a/alley", "b/barn"))
                for n in (1, 2)
            ),
            "places365_val.txt": "".join(f"Places365_val_0000000{n + 1}.jpg {n}\n" for n in range(3)),
            "places365_test.txt": lines("Places365_test_{00000001..00000003}.jpg"),
        },
        {"splits": {"train": "places365_train_standard.txt", "val": "places365_val.txt"}},
    )


def imagenet_kaggle() -> Sample:
    names = [f"ILSVRC2012_val_{n:08d}" for n in range(1, 13)]
    return Sample(
        [
            "ILSVRC/Data/CLS-LOC/train/{n01440764,n01443537}/{n0_1,n0_2}.JPEG",
            "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{00000001..00000012}.JPEG",
            "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_{00000001..00000003}.JPEG",
        ],
        "n01440764|n01443537",
        (4, 12, 0),
        {
            "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish\n",
            "LOC_sample_submission.csv": "ImageId,PredictionString\nILSVRC2012_test_00000001,n01440764\n",
            "LOC_val_solution.csv": "ImageId,PredictionString\n"
            + "".join(
                f"{name},{('n01440764', 'n01443537')[n % 2]} 8 1 9 2 \n" for n, name in enumerate(names)
            ),
            "ILSVRC/ImageSets/CLS-LOC/val.txt": "".join(f"{name} {n}\n" for n, name in enumerate(names, 1)),
            "ILSVRC/Annotations/CLS-LOC/train/n01440764/n0_1.xml": "<annotation/>",
        },
        skipped={"test image without a class": 3},
    )


def herbarium_2022() -> Sample:
    numbers = range(8)
    metadata = {
        "annotations": [{"genus_id": 1, "category_id": n % 2, "image_id": f"00{n}"} for n in numbers],
        "images": [{"image_id": f"00{n}", "file_name": f"000/0{n % 2}/{n}.jpg"} for n in numbers],
        "categories": [{"category_id": n, "scientificName": f"Abies {n}"} for n in range(2)],
    }
    return Sample(
        [
            "train_images/000/00/{0,2,4,6}.jpg",
            "train_images/000/01/{1,3,5,7}.jpg",
            "test_images/000/{8..9}.jpg",
        ],
        "00|01",
        (6, 2, 0),
        {"train_metadata.json": json.dumps(metadata)},
        {"val_fraction": 0.25},
    )


def rock_paper_scissors() -> Sample:
    return Sample(
        ["rps/{rock,paper}/{1..4}.png", "rps-test-set/{rock,paper}/{5..6}.png"],
        "paper|rock",
        (8, 4, 0),
        settings={"splits": {"train": "rps"}},
    )


def places_365_small() -> Sample:
    return Sample(
        ["places365_standard/{train,val}/{airfield,barn}/{1..2}.jpg"],
        "airfield|barn",
        (4, 4, 0),
        {
            "places365_standard/train.txt": lines("train/{airfield,barn}/{1..2}.jpg"),
            "places365_standard/val.txt": lines("val/{airfield,barn}/{1..2}.jpg"),
        },
    )


def inaturalist_2018() -> Sample:
    def annotations(first: int) -> str:
        numbers = range(first, first + 4)
        return json.dumps(
            {
                "images": [
                    {"id": n, "file_name": f"train_val2018/{('Aves/3', 'Plantae/7')[n % 2]}/{n}.jpg"}
                    for n in numbers
                ],
                "annotations": [{"id": n, "image_id": n, "category_id": n % 2} for n in numbers],
                "categories": [{"id": 0, "name": "Parus major"}, {"id": 1, "name": "Quercus alba"}],
            }
        )

    return Sample(
        ["train_val2018/Aves/3/{0,2,4,6}.jpg", "train_val2018/Plantae/7/{1,3,5,7}.jpg"],
        "Parus major|Quercus alba",
        (4, 4, 0),
        {"train2018.json": annotations(0), "val2018.json": annotations(4)},
    )


def inaturalist_2021() -> Sample:
    return Sample(
        ["{train,val}/{00000_Animalia_Aves,00001_Plantae_Rosa}/{1..2}.jpg", "public_test/{1..3}.jpg"],
        "00000_Animalia_Aves|00001_Plantae_Rosa",
        (4, 4, 0),
        {"train.json": "{}"},
        skipped={"test image without a class": 3},
    )


def sun_397() -> Sample:
    names = ("a/abbey", "a/apartment_building/outdoor", "b/bar", "c/church/indoor")
    return Sample(
        [f"SUN397/{name}/sun_{n}.jpg" for name in names for n in range(4)],
        "abbey|apartment_building/outdoor|bar|church/indoor",
        (8, 8, 0),
        {
            "SUN397/ClassName.txt": "".join(f"/{name}\n" for name in names),
            "Partitions/Training_01.txt": "".join(f"/{name}/sun_{n}.jpg\n" for name in names for n in (0, 1)),
            "Partitions/Testing_01.txt": "".join(f"/{name}/sun_{n}.jpg\n" for name in names for n in (2, 3)),
        },
    )


def gtsrb() -> Sample:
    return Sample(
        [
            "GTSRB/Final_Training/Images/{00000,00014}/00000_{00000..00002}.ppm",
            "GTSRB/Final_Test/Images/{00000..00003}.ppm",
        ],
        "00000|00014",
        (6, 4, 0),
        {
            "GTSRB/Final_Training/Images/00000/GT-00000.csv": "Filename;ClassId\n00000_00000.ppm;0\n",
            "GTSRB/Readme.txt": "GTSRB",
            "GT-final_test.csv": "Filename;Width;Height;Roi.X1;Roi.Y1;ClassId\n"
            + "".join(f"{n:05d}.ppm;53;54;6;5;{14 * (n % 2)}\n" for n in range(4)),
        },
    )


def gtsrb_kaggle() -> Sample:
    return Sample(
        ["Train/{0,14}/{1..3}.png", "Test/{00000..00003}.png", "Meta/{0,14}.png"],
        "0|14",
        (6, 4, 0),
        {
            "Test.csv": "Width,Height,Roi.X1,ClassId,Path\n"
            + "".join(f"53,54,6,{14 * (n % 2)},Test/{n:05d}.png\n" for n in range(4)),
            "Train.csv": "Width,Height,Roi.X1,ClassId,Path\n27,26,5,0,Train/0/1.png\n",
            "Meta.csv": "Path,ClassId,ShapeId\nMeta/0.png,0,1\nMeta/14.png,14,0\n",
        },
        skipped={"beside the splits and classes": 2},
    )


def fgvc_aircraft() -> Sample:
    variants = ("707-320", "Boeing 717", "F/A-18")
    return Sample(
        ["fgvc-aircraft-2013b/data/images/{1034001..1034009}.jpg"],
        "707-320|Boeing 717|F/A-18",
        (3, 3, 3),
        {
            **{
                f"fgvc-aircraft-2013b/data/images_{kind}_{split}.txt": "".join(
                    f"{1034001 + 3 * place + n} {names[n]}\n" for n in range(3)
                )
                for kind, names in (
                    ("variant", variants),
                    ("manufacturer", ("Boeing", "Boeing", "McDonnell Douglas")),
                )
                for place, split in enumerate(("train", "val", "test"))
            },
            "fgvc-aircraft-2013b/data/images_train.txt": lines("{1034001..1034003}"),
            "fgvc-aircraft-2013b/data/variants.txt": "\n".join(variants),
        },
        {"splits": {s: f"fgvc-aircraft-2013b/data/images_variant_{s}.txt" for s in ("train", "val", "test")}},
    )


def hugging_face_folders() -> Sample:
    return Sample(
        ["data/{train,validation,test}/{cat,dog}/{1..2}.webp"],
        "cat|dog",
        (4, 4, 4),
        {"README.md": "---\nlicense: mit\n---\n"},
    )


def hugging_face_metadata() -> Sample:
    table = "file_name,label\n0001.png,cat\n0002.png,dog\n"
    return Sample(
        ["{train,test}/{0001..0002}.png"],
        "cat|dog",
        (2, 2, 0),
        {"train/metadata.csv": table, "test/metadata.csv": table},
    )


def hugging_face_jsonl() -> Sample:
    rows = [{"file_name": f"images/{n}.png", "label": "cat" if n % 2 else "dog"} for n in range(1, 9)]
    return Sample(
        ["images/{1..8}.png"],
        "cat|dog",
        (6, 2, 0),
        {"metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows)},
        {"val_fraction": 0.25},
    )


def kaggle_images_and_csv() -> Sample:
    return Sample(
        ["train_images/{1..8}.jpg", "test_images/{9..10}.jpg"],
        "0|1|2|3",
        (4, 4, 0),
        {
            "train.csv": "image_id,label\n" + "".join(f"{n}.jpg,{n % 4}\n" for n in range(1, 9)),
            "sample_submission.csv": "image_id,label\n9.jpg,4\n10.jpg,4\n",
            "label_num_to_disease_map.json": '{"0": "blight", "1": "streak"}',
        },
        {"val_fraction": 0.5},
    )


def kaggle_one_folder() -> Sample:
    return Sample(
        ["images/{Train,Test}_{0..3}.jpg"],
        "healthy|rust",
        (2, 2, 0),
        {
            "train.csv": "image_id,healthy,rust\nTrain_0,1,0\nTrain_1,0,1\nTrain_2,1,0\nTrain_3,0,1\n",
            "test.csv": "image_id\nTest_0\nTest_1\nTest_2\nTest_3\n",
            "sample_submission.csv": "image_id,healthy,rust\nTest_0,0.5,0.5\n",
        },
        {"val_fraction": 0.5},
        {"test image without a class": 4},
    )


def dog_breed_kaggle() -> Sample:
    return Sample(
        ["train/{a1,b2,c3,d4}.jpg", "test/{e5,f6}.jpg"],
        "beagle|pug",
        (2, 2, 0),
        {"labels.csv": "id,breed\na1,beagle\nb2,pug\nc3,beagle\nd4,pug\n"},
        {"val_fraction": 0.5},
    )


def dogs_and_cats() -> Sample:
    return Sample(
        ["train/{cat,dog}.{0..4}.jpg", "test1/{1..2}.jpg"],
        "cat|dog",
        (8, 2, 0),
        settings={"labels": "filename", "val_fraction": 0.2},
    )


def ham_10000() -> Sample:
    return Sample(
        [
            "HAM10000_images_part_1/ISIC_{0024306..0024309}.jpg",
            "HAM10000_images_part_2/ISIC_{0024310..0024313}.jpg",
        ],
        "bkl|nv",
        (6, 2, 0),
        {
            "HAM10000_metadata.csv": "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
            + "".join(
                f"HAM_1,ISIC_00243{n:02d},{('nv', 'bkl')[n % 2]},histo,80.0,male,scalp\n"
                for n in range(6, 14)
            ),
            "hmnist_28_28_L.csv": "pixel0000,pixel0001,label\n169,171,2\n",
        },
        {"val_fraction": 0.25},
    )


def plant_village() -> Sample:
    return Sample(
        ["plantvillage dataset/{color,grayscale,segmented}/{Apple___Apple_scab,Tomato___healthy}/{1..4}.JPG"],
        "Apple___Apple_scab|Tomato___healthy",
        (6, 2, 0),
        settings={"splits": {"train": "plantvillage dataset/color"}, "val_fraction": 0.2},
    )


def chest_xray() -> Sample:
    return Sample(
        [
            "chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/{1..2}.jpeg",
            "chest_xray/chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/{1..2}.jpeg",
        ],
        "NORMAL|PNEUMONIA",
        (4, 4, 4),
        {
            "chest_xray/__MACOSX/._chest_xray": "x",
            "chest_xray/train/.DS_Store": "x",
            "chest_xray/val/NORMAL/Thumbs.db": "x",
            "chest_xray/val/NORMAL/._1.jpeg": "x",
        },
        skipped={"file of the system": 3, "folder of the system": 1, "beside the splits and classes": 12},
    )


def covid_radiography() -> Sample:
    return Sample(
        ["COVID-19_Radiography_Dataset/{COVID,Normal,Viral Pneumonia}/{images,masks}/{1..5}.png"],
        "COVID|Normal|Viral Pneumonia",
        (12, 3, 0),
        {
            "COVID-19_Radiography_Dataset/COVID.metadata.xlsx": b"PK",
            "COVID-19_Radiography_Dataset/README.md.txt": "COVID-19",
        },
        {"val_fraction": 0.2},
        {"mask or preview": 15, "not an image (.xlsx)": 1},
    )


def intel_scenes() -> Sample:
    return Sample(
        [
            "seg_train/seg_train/{buildings,sea}/{1..2}.jpg",
            "seg_test/seg_test/{buildings,sea}/{1..2}.jpg",
            "seg_pred/seg_pred/{3..5}.jpg",
        ],
        "buildings|sea",
        (4, 4, 0),
        skipped={"beside the splits and classes": 3},
    )


def birds_kaggle() -> Sample:
    return Sample(
        ["{train,valid,test}/{ABBOTTS BABBLER,AZURE JAY}/{001..002}.jpg", "images to predict/1.jpg"],
        "ABBOTTS BABBLER|AZURE JAY",
        (4, 4, 4),
        {"birds.csv": "class id,filepaths,labels,data set\n0.0,train/AZURE JAY/001.jpg,AZURE JAY,train\n"},
        skipped={"beside the splits and classes": 1},
    )


def breast_ultrasound() -> Sample:
    return Sample(
        [
            "Dataset_BUSI_with_GT/{benign,normal}/{benign,normal} ({1..3}).png",
            "Dataset_BUSI_with_GT/{benign,normal}/{benign,normal} ({1..3})_mask.png",
        ],
        "benign|normal",
        (10, 2, 0),
        settings={"val_fraction": 0.2},
        skipped={"mask or preview": 12},
    )


def indoor_67() -> Sample:
    return Sample(
        ["Images/{airport_inside,bakery}/{a,b,c,d}.jpg"],
        "airport_inside|bakery",
        (6, 2, 0),
        {
            "TrainImages.txt": lines("{airport_inside,bakery}/{a,b,c}.jpg"),
            "TestImages.txt": lines("{airport_inside,bakery}/d.jpg"),
        },
    )


def table_with_splits() -> Sample:
    return Sample(
        ["photos/{1..6}.tiff"],
        "ein Hund|eine Katze",
        (2, 2, 2),
        {
            "meta.csv": "Datei;Klasse;split\n"
            + "".join(
                f"{n}.tiff;{('ein Hund', 'eine Katze')[n % 2]};{('train', 'valid', 'test')[(n - 1) // 2]}\n"
                for n in range(1, 7)
            )
        },
    )


def classes_with_splits() -> Sample:
    return Sample(["{bottle,cable}/{train,test}/{1..2}.png"], "bottle|cable", (4, 4, 0))


def odd_names() -> Sample:
    names = ["10 Pfund", "2 Pfund", "a,b=c", "café", "日本語", "Ж'ж", "[red]"]
    return Sample(
        [f"{split}/{name}/{n}.gif" for name in names for n in (1, 2) for split in ("train", "val")],
        "2 Pfund|10 Pfund|[red]|a,b=c|café|Ж'ж|日本語",
        (14, 14, 0),
        {"train/desktop.ini": "x", ".ipynb_checkpoints/a.png": "x", "train/2 Pfund/notes.txt": "mine"},
        skipped={"file of the system": 1, "folder of the system": 1, "not an image (.txt)": 1},
    )


def one_photo_folder() -> Sample:
    return Sample(
        ["{hammer,pliers}/{IMG_1,IMG_2}.jpg", "hammer/IMG_3.bmp"],
        "hammer|pliers",
        (3, 2, 0),
        {"hammer/IMG_4.HEIC": "x"},
        {"val_fraction": 0.3},
        warning="1 .heic files are skipped",
    )


def train_is_a_class() -> Sample:
    return Sample(
        ["{bus,plane,train}/{1..4}.jpg"], "bus|plane|train", (9, 3, 0), settings={"val_fraction": 0.25}
    )


def nested_classes() -> Sample:
    return Sample(
        ["{train,val}/{oak,pine}/{spring,summer}/{1..2}.jpg"],
        "oak|pine",
        (8, 8, 0),
        settings={"labels": "folder:1"},
    )


def double_folders() -> Sample:
    return Sample(
        ["pets/cats/cats/{1..4}.jpg", "pets/dogs/dogs/{1..4}.jpg"],
        "cats|dogs",
        (6, 2, 0),
        settings={"val_fraction": 0.25},
    )


def listed_holdout() -> Sample:
    return Sample(
        ["images/{a,b}/{1..4}.jpg"],
        "a|b",
        (4, 2, 2),
        {"val_list.txt": lines("{a,b}/3.jpg"), "test_list.txt": lines("{a,b}/4.jpg")},
    )


SAMPLES: dict[str, Callable[[], Sample]] = {
    build.__name__: build
    for build in (
        *(imagenette, cifar_10_folders, cifar_100_folders, cifar_10_kaggle, mnist_folders, tiny_imagenet),
        *(imagenet_100_kaggle, imagenet_v2, imagenet_r, cub_200, stanford_dogs, stanford_cars, oxford_pets),
        *(flowers_102, food_101, caltech_101, caltech_256, dtd, eurosat, eurosat_lists, places_365),
        *(places_365_small, inaturalist_2018, inaturalist_2021, sun_397, gtsrb, gtsrb_kaggle, fgvc_aircraft),
        *(hugging_face_folders, hugging_face_metadata, hugging_face_jsonl, kaggle_images_and_csv),
        *(kaggle_one_folder, dog_breed_kaggle, dogs_and_cats, ham_10000, plant_village, chest_xray),
        *(covid_radiography, intel_scenes, birds_kaggle, breast_ultrasound, indoor_67, table_with_splits),
        *(classes_with_splits, odd_names, one_photo_folder, train_is_a_class, nested_classes, double_folders),
        *(listed_holdout, imagenet_kaggle, herbarium_2022, rock_paper_scissors),
    )
}
