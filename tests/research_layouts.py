"""Layouts of datasets of research, as their archives unpack."""

from __future__ import annotations

import json

from sample_folders import Sample, cars, cells, expand, lines, mat


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


RESEARCH = (
    *(imagenette, cifar_10_folders, cifar_100_folders, mnist_folders, tiny_imagenet, imagenet_v2),
    *(imagenet_r, cub_200, stanford_dogs, stanford_cars, oxford_pets, flowers_102, food_101),
    *(caltech_101, caltech_256, dtd, eurosat, eurosat_lists, places_365, places_365_small),
    *(inaturalist_2018, inaturalist_2021, sun_397, gtsrb, fgvc_aircraft),
)
