"""Layouts of Kaggle and the Hugging Face hub, and of collections at home."""

from __future__ import annotations

import json

from sample_folders import Sample, lines


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


COLLECTED = (
    *(cifar_10_kaggle, imagenet_100_kaggle, imagenet_kaggle, herbarium_2022, rock_paper_scissors),
    *(gtsrb_kaggle, hugging_face_folders, hugging_face_metadata, hugging_face_jsonl),
    *(kaggle_images_and_csv, kaggle_one_folder, dog_breed_kaggle, dogs_and_cats, ham_10000),
    *(plant_village, chest_xray, covid_radiography, intel_scenes, birds_kaggle, breast_ultrasound),
    *(indoor_67, table_with_splits, classes_with_splits, odd_names, one_photo_folder, train_is_a_class),
    *(nested_classes, double_folders, listed_holdout),
)
