"""The data of the page: which datastore it shows with which run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import record_run
from sample_dataset import write_coloured

from hpc_imagenet.report.html.data_summary import DatastoreKey, datastore_names
from hpc_imagenet.report.html.page_data import collect
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.store import RunStore


def trained(store: RunStore, number: int, top1: tuple[float, float] = (0.5, 1), **datastore: Any) -> str:
    """Record a training on a datastore; `top1`: of its two classes. Return its id."""
    run = record_run(store, number, FINISHED, result={"top1": 0.5})
    values = {"stage": {"name": "train"}, "datastore": {"name": "tiny", **datastore}}
    (run.folder / "config.yaml").write_text(json.dumps(values))
    rows = f"0,n00000001,red,4,{top1[0]}\n1,n00000002,green,4,{top1[1]}\n"
    (run.folder / "val_classes.csv").write_text(f"label,id,names,images,top1\n{rows}")
    return run.id


@pytest.mark.slow
def test_datastores_of_one_name_and_version_but_of_different_content(tmp_path: Path) -> None:
    store, images = RunStore(tmp_path / "workspace"), {}
    for number, (url, content) in enumerate(((tmp_path / "a", "c1"), (tmp_path / "b", "c2")), 1):
        write_coloured(url / "tiny/v1", 2 * number)
        path = url / "tiny/v1/manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "content": content}))
        run = trained(store, number, url=str(url), version=1, content=content)
        images[run] = 2 * number
    data = collect(store)
    assert sorted(data["datastores"]) == ["tiny@v1 of content c1", "tiny@v1 of content c2"]
    for row in data["runs"]:
        assert data["datastores"][row["datastore"]]["images"]["val"] == images[row["run"]]
        assert row["classes"]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, None])
def test_the_run_of_a_pipeline_shares_a_datastore_with_later_runs(
    tmp_path: Path, version: int | None
) -> None:
    store = RunStore(tmp_path / "workspace")
    write_coloured(tmp_path / "tiny/v1", 8)
    trained(store, 1, (0.5, 1), url=str(tmp_path), content="0")  # of a pipeline: before there was a version
    trained(store, 2, (1, 0.5), url=str(tmp_path), content="0", version=version)
    data = collect(store)
    assert [row["datastore"] for row in data["runs"]] == ["tiny@v1"] * 2
    assert list(data["datastores"]) == ["tiny@v1"]
    assert sorted(data["datastores"]["tiny@v1"]["thumbnails"]) == [0, 1]


@pytest.mark.parametrize("copy", ["/x/", "/scratch/x", "s3://bucket"])
def test_copies_of_one_content_are_one_datastore(tmp_path: Path, copy: str) -> None:
    store = RunStore(tmp_path / "workspace")
    for number, url in enumerate(("/x", copy), 1):
        trained(store, number, url=url, version=1, content="c1")
    data = collect(store, with_images=False)
    assert [row["datastore"] for row in data["runs"]] == ["tiny@v1"] * 2
    assert list(data["datastores"]) == ["tiny@v1"]


def test_names_of_datastores() -> None:
    plain = DatastoreKey("a", "/x", None, None)
    unread = DatastoreKey("a", None, None, "c0")
    first, second = (DatastoreKey("b", None, "1", content) for content in ("c1", "c2"))
    third, fourth = (DatastoreKey("b", url, "1", None) for url in ("/x", "/y"))
    names = datastore_names({key: key.version for key in (plain, unread, first, second, third, fourth)})
    assert list(names.values()) == [
        *("a", "a (c0)"),
        *("b@v1 of content c1", "b@v1 of content c2", "b@v1 at /x", "b@v1 at /y"),
    ]
