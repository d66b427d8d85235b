"""Trainings that begin with the weights of a run: which ones, under which id, and what is refused."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from command_line import Cli

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from tiny_training import tiny_config, write_store

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.launch.plan import make_plan
from hpc_imagenet.launch.validate import version_finder
from hpc_imagenet.launch.warm_start import find_weights, keep_weights
from hpc_imagenet.runs.checkpoints import INITIAL, fingerprint
from hpc_imagenet.runs.job import Job
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.search.study_files import StudyFiles
from hpc_imagenet.training.models.networks import build_network
from hpc_imagenet.training.models.optim import build_optimizer, load_optimizer_state
from hpc_imagenet.training.models.preprocessing import preprocessing

pytestmark = pytest.mark.slow

FIXED = ("datastore.name=digits", "model=squeezenet1_1", "recipe=demo", "recipe.global_batch=8")
# Without warmup, after which the average of the weights differs from them.
SOURCE = (*FIXED, "cluster=foreground", "recipe.epochs=2", "recipe.ema=0.9", "recipe.warmup_epochs=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cli, Run]:
    """A workspace with a finished training."""
    cli = Cli(tmp_path_factory.mktemp("warm") / "workspace")
    write_store(cli.workspace / "datastores" / "digits" / "v1", {"train": 40, "val": 13})
    cli(*SOURCE)
    (run,) = RunStore(cli.workspace).all()
    return cli, run


def planned(cli: Cli, *words: str) -> list[str]:
    """Return the ids of the runs that a dry run prints."""
    printed = cli(*FIXED, "cluster=local", *words, "dry_run=true").stdout
    return re.findall(r"^(\S+) would be submitted", printed, re.MULTILINE)


def weights(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def test_a_training_begins_with_the_weights_of_a_run(trained: tuple[Cli, Run]) -> None:
    cli, source = trained
    still = ("recipe.learning_rate=0", "recipe.epochs=1", "seed=1", "cluster=foreground")
    best = source.folder / "checkpoints" / "best.ckpt"
    for words, prefix in (((), "ema_model."), (("recipe.keep_optimizer=true",), "model.")):
        printed = cli(*FIXED, *still, f"model.weights={source.id}", *words).stdout
        (name,) = re.findall(r"^submitted +(\S+)", printed, re.MULTILINE)
        run = RunStore(cli.workspace).run(name)
        assert (run.folder / INITIAL).samefile(best)
        began, ended = weights(best, prefix), weights(run.folder / "checkpoints" / "last.ckpt", "model.")
        assert began.keys() == ended.keys()
        assert all(torch.equal(began[key], ended[key]) for key in began)
        model = run.config().model
        assert (model.weights_run, model.weights_hash) == (source.id, fingerprint(best))


def test_the_source_and_its_content_are_in_the_signature(trained: tuple[Cli, Run]) -> None:
    cli, source = trained
    (without,) = planned(cli, "seed=2")
    (first,) = planned(cli, "seed=2", f"model.weights={source.id}")
    assert first != without
    assert planned(cli, "seed=2", f"model.weights={source.folder}") == [first]
    assert planned(cli, "seed=2", f"model.weights={source.id.partition('-')[0]}") == [first]
    assert planned(cli, "seed=2", f"model.weights={source.folder}/checkpoints/best.ckpt") != [first]
    best = source.folder / "checkpoints" / "best.ckpt"
    before = best.read_bytes()
    try:
        content = torch.load(best, weights_only=True)
        next(iter(content["state_dict"].values())).add_(1)
        best.unlink()  # it is a hard link
        torch.save(content, best)
        assert planned(cli, "seed=2", f"model.weights={source.id}") != [first]
    finally:
        best.unlink()
        best.write_bytes(before)
    assert planned(cli, "seed=2", f"model.weights={source.id}") == [first]


def test_a_sweep_of_recipes_begins_with_one_run(trained: tuple[Cli, Run]) -> None:
    cli, source = trained
    words = ("-m", f"model.weights={source.id}", "recipe.epochs=3,4", "recipe.learning_rate=0.1,0.2")
    assert len(set(planned(cli, *words))) == 4


def test_trials_of_a_search_begin_with_one_run(trained: tuple[Cli, Run]) -> None:
    cli, source = trained
    words = (
        f"model.weights={source.id}",
        "recipe.epochs=1",
        "seed=5,6",
        "search.name=warm",
        "search.trials=2",
    )
    cli("+search=tpe", *FIXED, *words, "search.parallel=1", "cluster=foreground")
    store = RunStore(cli.workspace)
    (worker,) = [row["run"] for row in cli.jobs() if row["stage"] == "search"]
    records = StudyFiles(store, "warm").records()
    assert [record.state for record in records] == ["finished", "finished"]
    for record in records:
        trial = store.run(record.run)
        assert (trial.folder / INITIAL).samefile(store.run(worker).folder / INITIAL)
        ordinary = planned(cli, *words[:2], f"seed={record.values['seed']}")
        assert ordinary == []  # the same run, which is finished
        assert trial.config().model.weights_run == source.id
    line = cli.refused("+search=tpe", "model=squeezenet1_1,resnet18", *FIXED[:1], *FIXED[2:], *words[:2])
    assert "its model.name is squeezenet1_1, and that of this training resnet18" in line
    line = cli.refused("+search=tpe", *FIXED, *words[:2], "recipe.blurpool=false,true")
    assert "its recipe.blurpool is False, and that of this training True: set recipe.blurpool=False" in line


def test_files_keep_their_signature() -> None:
    (config,) = compose(["dataset=digits", "cluster=local", "model.weights=/some/file.pth"])
    assert config.model.identity()["weights"] == "/some/file.pth"
    assert "weights_hash" not in config.model.identity()


def job(cli: Cli, source: Run, *words: str) -> Job:
    (config,) = compose(
        [*FIXED, "cluster=local", f"workspace={cli.workspace}", f"model.weights={source.id}", *words]
    )
    (made,) = make_plan([find_weights(config, RunStore(cli.workspace))], version_finder())
    return made


def test_a_source_that_trains_on_changes_nothing(trained: tuple[Cli, Run], tmp_path: Path) -> None:
    cli, source = trained
    copied = RunStore(tmp_path).run(source.id)
    shutil.copytree(source.folder, copied.folder)
    made, run = job(cli, source, "seed=3"), RunStore(tmp_path).run("new")
    own = replace(made.config.model, weights=str(copied.folder / "checkpoints" / "best.ckpt"))
    made = replace(made, config=replace(made.config, model=own))
    keep_weights(made, run)
    shutil.copy(copied.folder / "checkpoints" / "previous.ckpt", tmp_path / "other.ckpt")
    (tmp_path / "other.ckpt").replace(copied.folder / "checkpoints" / "best.ckpt")  # as training does
    keep_weights(made, run)  # a second attempt
    assert fingerprint(run.folder / INITIAL) == made.config.model.weights_hash
    late = RunStore(tmp_path).run("late")
    with pytest.raises(
        UserError, match=rf"model.weights={source.id}: it has just written another checkpoint"
    ):
        keep_weights(made, late)
    assert not late.folder.exists()


def test_sources_that_do_not_fit_are_refused(trained: tuple[Cli, Run]) -> None:
    cli, source = trained
    weights = f"model.weights={source.id}"
    local = (*FIXED, "cluster=local")
    line = cli.refused(*local[:1], "model=resnet18", *local[2:], weights)
    assert f"{weights}: its model.name is squeezenet1_1, and that of this training resnet18" in line
    keep = "recipe.keep_optimizer=true"
    line = cli.refused(*local, weights, keep, "recipe.optimizer=adamw")
    assert "its recipe.optimizer is sgd, and that of this training adamw, with recipe.keep_optimizer" in line
    assert "set model.weights=RUN" in cli.refused(*local, keep)
    assert "no such file, and no run nothing" in cli.refused(*local, "model.weights=nothing")
    assert "no such file" in cli.refused(*local, "model.weights=no/such/file")
    (checkpoints := source.folder / "checkpoints").rename(source.folder / "away")
    try:
        assert f"{source.id} has no checkpoint" in cli.refused(*local, weights)
    finally:
        (source.folder / "away").rename(checkpoints)


def begun_with(store: RunStore, run_id: str, config: Config | None = None, **model: Any) -> Run:
    """Return a training as submitted, with a checkpoint."""
    config = config or tiny_config()
    config.model = replace(config.model, **model)
    run = store.create(run_id, asdict(config), {"stage": "train"})
    (run.folder / "checkpoints").mkdir()
    torch.save({}, run.folder / "checkpoints" / "best.ckpt")
    return run


@pytest.mark.parametrize(
    ("name", "weights", "changed"),
    [
        ("timm/vit_base_patch16_224", "mae", {"name": "timm/vit_base_patch16_224.mae"}),
        ("googlenet", "IMAGENET1K_V1", {"options": {"transform_input": True}}),
        ("resnet18", "IMAGENET1K_V1", {}),
    ],
)
def test_images_are_normalised_as_for_the_published_weights_of_the_run(
    name: str, weights: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    """Also by a run that begins with the weights of one that has begun so."""
    store, config = RunStore(tmp_path), tiny_config()
    source = begun_with(store, "aaaaaaaa-first", name=name, weights=weights)
    for number in range(2):
        config.model = replace(config.model, name=name, weights=source.id)
        found = find_weights(config, store)
        assert {key: getattr(found.model, key) for key in changed} == changed
        assert preprocessing(found) == preprocessing(source.config())
        source = begun_with(store, f"bbbbbbb{number}-next", **asdict(found.model))
    config.model = replace(config.model, **{"name": name, "weights": source.id, **changed})
    assert find_weights(config, store).model == replace(found.model, weights_run=source.id, weights=ANY)


def test_a_network_for_other_published_weights_is_refused(tmp_path: Path) -> None:
    store, config = RunStore(tmp_path), tiny_config()
    source = begun_with(store, "aaaaaaaa-vit", name="timm/vit_base_patch16_224", weights="mae")
    config.model = replace(config.model, name="timm/vit_base_patch16_224.dino", weights=source.id)
    line = (
        "its model.name is timm/vit_base_patch16_224.mae, and that of this training .*dino: set model.name=t"
    )
    with pytest.raises(UserError, match=line):
        find_weights(config, store)
    source = begun_with(store, "bbbbbbbb-googlenet", name="googlenet", weights="IMAGENET1K_V1")
    off = {"transform_input": False}
    config.model = replace(config.model, name="googlenet", weights=source.id, options=off)
    with pytest.raises(UserError, match=r"its model.options is \{'transform_input': True\}, and that of"):
        find_weights(config, store)


@pytest.mark.parametrize(
    ("source", "changed", "message"),
    [
        ({"blurpool": True}, {}, "its recipe.blurpool is True, .* False: set recipe.blurpool=True"),
        ({}, {"blurpool": True}, "its recipe.blurpool is False, .* True: set recipe.blurpool=False"),
        ({}, {"size": 128}, "its model.stem is small, and that .* standard: set model.stem=small"),
        ({"size": 128}, {}, "its model.stem is standard, and that .* small: set model.stem=standard"),
    ],
)
def test_settings_that_change_the_network_and_no_shape_are_compared(
    source: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = begun_with(RunStore(tmp_path), "aaaaaaaa-first", tiny_config(**source))
    config = tiny_config(**changed)
    config.model = replace(config.model, weights=run.id)
    with pytest.raises(UserError, match=f"^model.weights={run.id}: {message}, or leave the weights out$"):
        find_weights(config, RunStore(tmp_path))


def test_stems_of_two_words_may_be_the_same_network(tmp_path: Path) -> None:
    run, config = begun_with(RunStore(tmp_path), "aaaaaaaa-first"), tiny_config(size=128)
    config.model = replace(config.model, weights=run.id, stem="small")
    assert find_weights(config, RunStore(tmp_path)).model.stem == "small"


@pytest.mark.parametrize("name", ["timm/swinv2_tiny_window8_256", "own:Network"])
def test_networks_that_may_have_one_stem_are_not_compared_by_stem(name: str, tmp_path: Path) -> None:
    run = begun_with(RunStore(tmp_path), "aaaaaaaa-first", name=name)
    config = tiny_config(size=256)
    config.model = replace(config.model, name=name, weights=run.id)
    assert find_weights(config, RunStore(tmp_path)).model.weights_run == run.id


def test_images_are_normalised_as_those_of_the_run(tmp_path: Path) -> None:
    own = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "crop_pct": 0.9}
    run, config = begun_with(RunStore(tmp_path), "aaaaaaaa-first", preprocessing=own), tiny_config()
    config.model = replace(config.model, weights=run.id)
    kept = {key: value for key, value in own.items() if key != "crop_pct"}  # the recipe has the crop
    assert find_weights(config, RunStore(tmp_path)).model.preprocessing == kept
    config.model.preprocessing = {"mean": [0.1, 0.2, 0.3]}
    assert find_weights(config, RunStore(tmp_path)).model.preprocessing == {**kept, "mean": [0.1, 0.2, 0.3]}


def test_a_file_in_the_folder_of_a_run_is_as_its_run(tmp_path: Path) -> None:
    store, config = RunStore(tmp_path), tiny_config()
    source = begun_with(store, "aaaaaaaa-vit", name="timm/vit_base_patch16_224", weights="mae")
    file = str(source.folder / "checkpoints" / "best.ckpt")
    config.model = replace(config.model, name="timm/vit_base_patch16_224", weights=file)
    found = find_weights(config, store)
    assert (found.model.name, found.model.weights) == ("timm/vit_base_patch16_224.mae", file)
    assert found.model.weights_run is None
    assert preprocessing(found) == preprocessing(source.config())
    config.model.name = "timm/vit_base_patch16_224.dino"
    with pytest.raises(UserError, match=rf"^model.weights={file}: its model.name is .*mae, and that of this"):
        find_weights(config, store)
    (source.folder / "config.yaml").unlink()  # as in a copy of the folder
    assert find_weights(config, store) is config
    shutil.copy(file, moved := tmp_path / "best.ckpt")
    config.model.weights = str(moved)
    assert find_weights(config, store) is config  # its own config is compared when it is loaded


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_state_of_the_optimizer_is_kept_and_its_rates_are_not(tmp_path: Path, optimizer: str) -> None:
    path = tmp_path / "last.ckpt"
    config = tiny_config(optimizer=optimizer)
    network = build_network(config, 10, fresh=True)
    source = build_optimizer(network, config.recipe)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    source.step()
    torch.save({"optimizer_states": [source.state_dict()]}, path)
    config.recipe.learning_rate *= 3
    warm = build_optimizer(network, config.recipe)
    load_optimizer_state(warm, path)
    name = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    for parameter in network.parameters():
        assert torch.equal(warm.state[parameter][name], source.state[parameter][name])
    assert [g["lr"] for g in warm.param_groups] == [3 * g["lr"] for g in source.param_groups]
    for other, message in (
        (build_network(config, 7, fresh=True), r"is \(10, 512, 1, 1\), and the weight \(7, 512, 1, 1\)"),
        (torch.nn.Linear(2, 3), "other weights are trained"),
    ):
        with pytest.raises(UserError, match=rf"keep_optimizer=true: .*{message}.*keep_optimizer=false"):
            load_optimizer_state(build_optimizer(other, config.recipe), path)
