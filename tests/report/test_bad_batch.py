"""The images of a step whose loss was not finite, on the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from recorded_runs import record_run

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.attempt import FAILED
from hpc_imagenet.runs.bad_batch import read_bad_batch, write_bad_batch
from hpc_imagenet.runs.store import Run, RunStore

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
from tiny_training import write_store

REASON = "recipe.learning_rate=9: the loss at step 7 (epoch 2) is not finite: lower the rate"


@pytest.fixture
def diverged(cli: Cli) -> Run:
    """A training that ended by a NaN at a step of 30 images."""
    folder = cli.workspace / "datastores" / "digits" / "v1"
    write_store(folder, {"train": 40, "val": 4})
    split = DatasetReader(folder).open_split("train")
    run = record_run(RunStore(cli.workspace), 1, FAILED, REASON)
    store = {"name": "digits", "url": str(cli.workspace / "datastores"), "version": 1}
    (run.folder / "config.yaml").write_text(json.dumps({"stage": {"name": "train"}, "datastore": store}))
    write_bad_batch(run.folder, [(split.name(i), i) for i in reversed(range(10, 40))])
    return run


def shown(cli: Cli, *options: str) -> dict[str, Any] | None:
    cli("report", "--html", "page.html", *options)
    found = re.search(r'id="page-data">(.*?)</script>', (cli.cwd / "page.html").read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])["runs"][0].get("bad_batch")


@pytest.mark.slow
def test_images_are_shown_by_name(cli: Cli, diverged: Run) -> None:
    found = shown(cli)
    assert found
    names = [name for name, _ in read_bad_batch(diverged.folder)]
    assert [name for name, _ in found["images"]] == names[:24]
    assert (found["total"], found["note"]) == (30, "")
    uris = [uri for _, uri in found["images"]]
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in uris)
    assert len(set(uris)) > 10


def test_names_remain_where_images_cannot_be_read(cli: Cli, diverged: Run) -> None:
    found = shown(cli, "--no-images")
    assert found
    assert {uri for _, uri in found["images"]} == {""}
    (cli.workspace / "datastores" / "digits" / "v1").rename(cli.workspace / "gone")
    found = shown(cli)
    assert found
    assert "no datastore digits" in found["note"]
    assert len(found["images"]) == 24


def test_another_image_at_that_position_is_not_shown(cli: Cli, diverged: Run) -> None:
    write_bad_batch(diverged.folder, [("</script>\x1b.JPEG", 3), ("x", 10**9)])
    found = shown(cli)
    assert found
    assert found["images"] == [["</script>\x1b.JPEG", ""], ["x", ""]]


def test_damaged_and_outdated_files(cli: Cli, diverged: Run) -> None:
    (diverged.folder / "bad_batch.txt").write_bytes(b"half\n\xff\t2\n\t4\nx\t-1\nlast\t5")
    assert read_bad_batch(diverged.folder) == [("\ufffd", 2), ("last", 5)]
    (diverged.folder / "bad_batch.txt").unlink()
    found = shown(cli)
    assert found
    assert found["images"] == []
    again = diverged.new_attempt()
    again.submit("local", host="elsewhere")
    again.start()
    again.end("finished", result={"top1": 0.5})
    assert shown(cli) is None
