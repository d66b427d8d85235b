from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hpc_imagenet.config.compose import CONF, VERSION_BASE, compose, register, with_overrides
from hpc_imagenet.config.names.backbones import BACKBONES
from hpc_imagenet.config.schema import Config, cluster_for, cluster_from, from_dict
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.plan import make_plan

pytestmark = pytest.mark.slow

GROUPS = ("cluster", "dataset", "datastore", "model", "recipe", "stage")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
CHOICES.remove(("cluster", "auto"))  # replaced by another file; see test_slurm.py


def one(*overrides: str) -> Config:
    (config,) = compose(overrides)
    return config


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_conf_file_composes_and_is_short(group: str, choice: str) -> None:
    required = {
        "ilsvrc": ["dataset.name=x", "dataset.source=/x"],
        "images": ["dataset.name=x", "dataset.source=/x"],
        "s3": ["datastore.url=s3://bucket/x"],
        "ssh": ["datastore.url=host:/x"],
    }.get(choice, [])
    plus = "+" if group == "stage" else ""
    config = one(f"{plus}{group}={choice}", *required)
    names = {"model": config.model.name, "dataset": config.dataset.name, "stage": config.stage.name}
    assert names.get(group, choice) in (choice, "x")
    assert len((CONF / group / f"{choice}.yaml").read_text().splitlines()) <= 35


@pytest.mark.parametrize("name", ["densenet121", "regnet_y_400mf", "swin_t", "vgg11_bn"])
def test_backbone_without_a_conf_file_can_be_selected(name: str) -> None:
    assert name in BACKBONES
    assert not (CONF / "model" / f"{name}.yaml").exists()
    assert one(f"model={name}").model.name == name


def test_frozen_config_round_trip() -> None:
    config = one("+stage=pipeline", "dataset=digits", "cluster=slurm", "+model.options.dropout=0.1")
    assert from_dict(yaml.safe_load(yaml.safe_dump(asdict(config)))) == config


def test_dataset_selects_its_recipe_unless_the_user_does() -> None:
    assert one("dataset=digits").recipe == one("recipe=demo").recipe != one().recipe
    assert one("dataset=digits", "recipe=standard90").recipe == one().recipe
    assert one("recipe=standard90", "dataset=digits").recipe == one().recipe


@settings(max_examples=4, deadline=None)
@given(
    models=st.lists(st.sampled_from(["resnet18", "resnet50", "vgg11"]), min_size=1, max_size=2, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    rates=st.lists(st.sampled_from([0.1, 0.5, 1.0]), min_size=1, max_size=2, unique=True),
    digits=st.booleans(),
)
def test_sweep_equals_single_hydra_compositions(
    models: list[str], seeds: list[int], rates: list[float], digits: bool
) -> None:
    dataset = "digits" if digits else "imagenet"
    swept = compose(
        [
            "cluster=local",
            f"dataset={dataset}",
            f"model={','.join(models)}",
            f"seed={','.join(map(str, seeds))}",
            f"recipe.learning_rate={','.join(map(str, rates))}",
        ],
        multirun=True,
    )
    register()
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        single = [
            hydra_compose(
                "config",
                overrides=[
                    "cluster=local",
                    f"dataset={dataset}",
                    f"model={m}",
                    f"seed={s}",
                    f"recipe.learning_rate={r}",
                ],
            )
            for m in models
            for s in seeds
            for r in rates
        ]
    assert len(swept) == len(single)
    for ours, theirs in zip(swept, single, strict=True):
        expected = OmegaConf.to_container(theirs, resolve=True)
        assert isinstance(expected, dict)
        for part in ("model", "recipe", "seed", "loader", "process", "cluster"):
            assert asdict(ours)[part] == expected[part]


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["model=resnet81"], ["model=resnet81 is unknown", "resnet18"]),
        (["dataset=imagnet"], ["dataset=imagnet is unknown", "imagenet"]),
        (["+stage=trian"], ["stage=trian is unknown", "train"]),
        (["modle=resnet18"], ["modle is an unknown setting", "model"]),
        (["recipe.epoch=3"], ["recipe.epoch is an unknown setting", "recipe.epochs"]),
        (["+foo=1"], ["foo is an unknown setting"]),
        (["+recipe.epoch=1"], ["recipe.epoch is an unknown setting"]),
        (["~seed"], ["seed is not set"]),
        (["seed=abc"], ["seed:", "abc", "Integer"]),
        (["seed=-1"], ["seed=-1 is not between 0 and 4294967295"]),
        (["seed=[1"], ["cannot parse seed=[1"]),
        (["model=resnet18,resnet50"], ["is a sweep", "-m"]),
        (["dataset=ilsvrc"], ["dataset.name is not set"]),
        (["process.layout=folder"], ["process.layout=folder is unknown", "folders"]),
        (["model.stem=tiny"], ["model.stem=tiny is unknown", "small"]),
        (["cluster.time=inf"], ["cluster.time=inf is not a time: minutes, MM:SS"]),
        (["cluster.time=nan"], ["cluster.time=nan is not a time: minutes, MM:SS"]),
        (
            ["dataset.source=http://[x"],
            ["dataset.source is not a valid URL: brackets are for an IPv6 address"],
        ),
        (["recipe.epochs=null"], ["recipe.epochs is null: remove it"]),
        (["recipe.flip=1.5"], ["recipe.flip=1.5", "between 0 and 1"]),
        (["recipe.val_resize=8"], ["recipe.val_resize=8 is too small: at least 224"]),
        (["train.checkpoint_every_minutes=0"], ["train.checkpoint_every_minutes"]),
        (["cluster.gpus_per_node=-1"], ["cluster.gpus_per_node=-1"]),
        (["+cluster.stage.train.nodes=0"], ["cluster.stage.train.nodes=0 is too small: at least 1"]),
        (
            ["+cluster.stage.train.executor=foreground"],
            ["cluster.stage.train.executor=foreground", "cluster.executor"],
        ),
        (["recipe.precision=bf16"], ["recipe.precision=bf16 is unknown", "bf16-mixed"]),
        (["+cluster.stage.trian.time=3"], ["cluster.stage=trian is unknown"]),
        (["cluster.stage.train.time=3"], ["write +cluster.stage.train.time=VALUE"]),
        (["+cluster.stage.train.tim=3"], ["cluster.stage.train.tim is an unknown setting"]),
        (["cluster.sbatch={gres: x}"], ["cluster.sbatch takes new keys", "+cluster.sbatch={"]),
        (["workspace="], ["workspace is empty"]),
        (["dataset=ilsvrc", "dataset.name=x", "dataset.source=''"], ["dataset.source is empty"]),
        (
            ["dataset=ilsvrc", "dataset.name=x", "dataset.source='http://u:pw@[bad/x'"],
            ["dataset.source is not a valid URL: brackets are for an IPv6 address"],
        ),
        (["cluster.sbatch.reservation=x"], ["write +cluster.sbatch.reservation=VALUE"]),
        (["dataset=digits", "dataset.orient=true"], ["dataset.orient is for labelled images: set dataset="]),
        (["dataset=digits", "dataset.split_seed=1"], ["dataset.split_seed is for labelled images"]),
        (["dataset=digits", "dataset.empty_classes=skip"], ["dataset.empty_classes is for labelled "]),
    ],
)
def test_invalid_override_is_one_line_that_names_the_setting(
    overrides: list[str], fragments: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    line = str(caught.value)
    assert "\n" not in line
    for fragment in fragments:
        assert fragment in line


def test_one_invalid_combination_rejects_the_whole_sweep() -> None:
    with pytest.raises(UserError, match="seed=-1"):
        compose([f"seed={','.join(map(str, range(39)))},-1"], multirun=True)


@pytest.mark.parametrize("line", ["seed=range(0)", "seed=range(3,1)", "model=glob(nothing*)"])
def test_a_sweep_without_a_value_is_refused(line: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(line)} is a sweep without a value"):
        compose([line, "recipe.epochs=1,2"], multirun=True)


def test_stage_with_and_without_plus() -> None:
    assert one("stage=upload") == one("+stage=upload")


def test_relative_paths_are_relative_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = one("dataset=ilsvrc", "dataset.name=x", "dataset.source=in", "workspace=w")
    assert config.workspace == str(tmp_path / "w")
    assert config.dataset.source == str(tmp_path / "in")
    assert config.datastore.url == str(tmp_path / "w" / "datastores")
    for url in ("me@host:/data", "host:/data", "s3://bucket/prefix"):
        assert one(f"datastore.url={url}").datastore.url == url
    images = ("cluster.container=~/x.sif", "+cluster.stage.process.container=./y.sif")
    cluster = one("cluster=slurm", *images).cluster
    assert cluster.container == str(Path.home() / "x.sif")
    assert cluster.stage["process"]["container"] == str(tmp_path / "y.sif")
    assert one("cluster=slurm", "cluster.container=x").cluster.container == "x"  # a name in a registry


@pytest.mark.parametrize("setting", ["workspace", "dataset.source", "datastore.url", "model.weights"])
def test_the_home_of_an_unknown_user_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match=r"^~nosuchuser/x: ~nosuchuser is no user's home folder here"):
        one("dataset=digits", f"{setting}='~nosuchuser/x'")


def test_config_dir_adds_groups(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("executor: slurm\npartition: gpu\n")
    (config,) = compose(["cluster=mine"], config_dir=str(tmp_path))
    assert config.cluster.partition == "gpu"
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "demo.yaml").write_text("epochs: 1\n")
    with pytest.raises(UserError, match=r"recipe/demo.yaml has the same name as a file of conf/"):
        compose([], config_dir=str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        compose([], config_dir=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "recipe/mine",
            "defaults: [standard90, _self_]\nepoch: 3",
            "recipe.epoch is an unknown setting; did you",
        ),
        (
            "cluster/mine",
            "defaults: [slurm, _self_]\nnodes: two",
            "cluster.nodes: Value 'two' of type 'str' could",
        ),
        (
            "cluster/mine",
            "defaults: [slurm, _self_]\nsbatch:",
            "cluster.sbatch is null: remove it, or give it a ",
        ),
        ("recipe/mine", "epochs:", "recipe.epochs is null: remove it, or give it a value"),
        ("cluster/mine", "defaults: [slum, _self_]", "cluster=slum is unknown"),
    ],
)
def test_an_error_in_a_file_is_one_line_that_names_it(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / f"{file}.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        compose([file.replace("/", "=")], config_dir=str(tmp_path))
    assert str(caught.value).startswith(f"{file}.yaml: {message}")


@pytest.mark.parametrize("name", ["ä (1),b", "[x]={y}", 'it\'s "new"', "c:\\", "#1 %20"])
def test_config_dir_with_special_characters(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "cluster").mkdir(parents=True)
    (tmp_path / name / "cluster" / "mine.yaml").write_text("executor: slurm\npartition: gpu\n")
    configs = compose(["cluster=mine", "model=resnet18,resnet50"], True, config_dir=str(tmp_path / name))
    assert [config.cluster.partition for config in configs] == ["gpu", "gpu"]


def test_cluster_for_a_stage_overrides_general_settings() -> None:
    config = one("cluster=slurm", "+cluster.stage.train.time=60")
    assert cluster_for(config, "train").time == 60
    assert cluster_for(config, "train").gpus_per_node == 1
    assert cluster_for(config, "download").gpus_per_node == 0
    assert cluster_for(config, "download").time == config.cluster.time


def test_cluster_of_a_frozen_config_with_few_settings() -> None:
    frozen = {"cluster": {"executor": "slurm", "stage": {"train": {"time": 60}}}}
    assert cluster_from(frozen, "train").time == 60
    assert cluster_from({"cluster": {"executor": "local"}}, "train").executor == "local"
    with pytest.raises(UserError, match=r"cluster\.stage\.train\.tim is an unknown setting"):
        cluster_from({"cluster": {"executor": "slurm", "stage": {"train": {"tim": 60}}}}, "train")


def test_resumed_session_without_gpus_uses_the_clusters_gpus() -> None:
    overrides = ("+stage=session", "cluster=slurm", "+cluster.stage.session.time=9")
    (job,) = make_plan([one(*overrides, "session.gpus=4", "session.time=60")], lambda _: None)
    assert (job.cluster.gpus_per_node, job.cluster.time) == (4, 62)
    (resumed,) = make_plan([with_overrides(from_dict(job.frozen()), ["session.gpus=null"])], lambda _: None)
    assert (resumed.run_id, resumed.cluster.gpus_per_node, resumed.cluster.time) == (job.run_id, 1, 62)


def test_frozen_config_may_have_settings_that_new_commands_refuse() -> None:
    config = one("dataset=digits")
    config.dataset.orient, config.dataset.split_seed, config.dataset.empty_classes = True, 1, "skip"
    assert with_overrides(config, ["session.gpus=1"]).dataset == config.dataset
