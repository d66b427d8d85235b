"""The plan against the world: what is refused before anything is sent, and how often a place is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sample_dataset import make_dataset

from hpc_imagenet import check
from hpc_imagenet.compose import compose
from hpc_imagenet.config import Config, Dataset, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError
from hpc_imagenet.plan import plan
from hpc_imagenet.runs import Record, Run
from hpc_imagenet.stages import upload
from hpc_imagenet.world import World

DIGITS = ("dataset=digits", "cluster=local")


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    """A folder with digits@v1 and digits@v2, of different images."""
    store = Datastore("digits", str(tmp_path / "stores"))
    for seed in ("1", "2"):
        make_dataset(tmp_path / seed)
        run = Run(tmp_path / f"upload-{seed}")
        run.folder.mkdir()
        path = tmp_path / seed / "datasets" / "digits" / "manifest.json"
        path.write_text(path.read_text().replace('"content": "', f'"content": "{seed}'))
        upload.run(
            Config(workspace=str(tmp_path / seed), dataset=Dataset("digits"), datastore=store), run, World()
        )
    return store


def test_a_sweep_over_versions_finds_each(store: Datastore) -> None:
    found = check.finder()
    both = [found(replace(store, version=number)) for number in (1, 2)]
    assert [one and one.version for one in both] == [1, 2]
    assert len({one and one.content for one in both}) == 2


def test_a_sweep_asks_a_place_once(store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = versions.open_version, []

    def counted(datastore: Datastore) -> versions.Version:
        asked.append(datastore.version)
        return real(datastore)

    monkeypatch.setattr(versions, "open_version", counted)
    words = [*DIGITS, f"datastore.url={store.url}", "seed=range(20)", "recipe.global_batch=4,8"]
    sweep = plan(compose(words, multirun=True), check.finder())
    check.jobs(sweep, Record(tmp_path / "runs"))
    assert len(sweep) == 40
    assert len(asked) == 1 + 2  # by the finder; for each batch, whether there are images enough
    words[-1] = "recipe.global_batch=8,64"
    sweep = plan(compose(words, multirun=True), check.finder())
    with pytest.raises(UserError, match=r"recipe.global_batch=64 is more than the 24 images of train"):
        check.jobs(sweep, Record(tmp_path / "runs"))


def test_a_place_that_the_trainings_of_a_pipeline_cannot_read(tmp_path: Path) -> None:
    words = ["+stage=pipeline", *DIGITS, "datastore.url=host:/data", "model=resnet18,resnet50"]
    sweep = plan(compose(words, multirun=True), lambda store: None)
    with pytest.raises(UserError, match=r"host:/data: give cluster.scratch"):
        check.jobs(sweep, Record(tmp_path / "runs"))
    readable = plan(compose([*words, "cluster.scratch=/scratch"], multirun=True), lambda store: None)
    check.jobs(readable, Record(tmp_path / "runs"))
