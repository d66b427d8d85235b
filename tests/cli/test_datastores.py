"""The `datastores` command: list, show, verify, delete and prune."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path

import pytest
from command_line import Cli, Gate, eventually
from recorded_runs import create_run
from sample_dataset import make_dataset

from hpc_imagenet.cli import datastores
from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Config, Datastore
from hpc_imagenet.datastore import versions
from hpc_imagenet.runs.store import Run, RunStore
from hpc_imagenet.stages.work import upload


@pytest.fixture
def url(cli: Cli) -> str:
    """The URL of a datastore folder with digits@v1."""
    make_dataset(cli.workspace)
    run = Run(cli.cwd / "upload")
    run.folder.mkdir()
    url = str(cli.workspace / "datastores")
    upload.run(
        Config(workspace=str(cli.workspace), dataset=Dataset("digits"), datastore=Datastore("digits", url)),
        run,
        DistEnv(),
    )
    return url


def start_upload(url: str, content: str, days: float) -> None:
    """Create a partial upload that is `days` old."""
    claim = versions.claim_version(
        versions.open_backend(url), Datastore("digits", url), content, {"run": "abc", "host": "n1"}
    )
    then = time.time() - days * 86400
    os.utime(Path(url) / claim.path / "upload.json", (then, then))


def test_list_and_show_versions(cli: Cli, url: str) -> None:
    start_upload(url, "other", days=1)
    table = cli("datastores").stdout
    assert "digits@v1  complete" in table
    assert "digits@v2  partial" in table
    first, second = json.loads(cli("datastores", "list", "--json").stdout)
    assert (first["version"], first["state"], first["images"], first["used_by"]) == (1, "complete", 36, [])
    assert (second["version"], second["state"], second["by"]) == (2, "partial", "abc on n1")
    shown = cli("datastores", "show", "digits@v1").stdout
    assert '"train": 24' in shown
    assert "digits@v2" not in shown
    (row,) = json.loads(cli("datastores", "show", "digits@v1", "--json").stdout)
    assert row["provenance"]["upload"]["version"] == 1
    assert cli("datastores", "verify", "digits").stdout.startswith("digits@v1 is intact")


def test_empty_datastore_is_not_an_error(cli: Cli, tmp_path: Path) -> None:
    assert "no datastores in" in cli("datastores", f"datastore.url={tmp_path}/none").stdout
    assert json.loads(cli("datastores", "--json", f"datastore.url={tmp_path}/none").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "list, show NAME, verify"),
        (["show", "birds"], "no datastore birds in "),
        (["verify", "digts"], "no datastore digts in .*digits"),
        (["verify", "digits@v7"], "datastore digits@v7 does not exist; complete: v1"),
        (["delete", "digits"], "delete needs one version, such as digits@v1"),
        (["delete", "digits@v7", "--yes"], "no digits@v7 in "),
        (["delete", "digits@v1"], "cannot confirm without a terminal, add --yes"),
        (["fetch", "a b", "x"], "is not NAME or NAME@vN"),
        (["list", "datastore.url=ftp://x/y"], "unknown scheme"),
        (["list", "datastore.url=ftp://me:secret@host/x"], "unknown scheme"),
        (
            ["delete", "digits@v1", "datastore.url=a", "datastore.url=b"],
            "a setting is given twice: write it once",
        ),
        (["list", "datastore.url=s3://key:secret@bucket/x"], "without credentials"),
        (["list", "datastore.url=me:secret@host:/x"], "a password, a port"),
    ],
)
def test_invalid_arguments_print_one_line(cli: Cli, url: str, arguments: list[str], message: str) -> None:
    line = cli.refused("datastores", *arguments)
    assert re.search(message, line)
    assert "secret" not in line
    assert versions.complete_versions(url, "digits") == [1]


def test_prune_removes_stale_partial_uploads(cli: Cli, url: str) -> None:
    start_upload(url, "old", days=8)
    start_upload(url, "young", days=6)
    assert cli("datastores", "prune", "--yes").stdout == "removed  digits@v2\n"
    assert [row["version"] for row in json.loads(cli("datastores", "--json").stdout)] == [1, 3]
    assert "nothing to prune" in cli("datastores", "prune").stdout
    assert cli("datastores", "prune", "--yes", "--days=5").stdout == "removed  digits@v3\n"
    assert json.loads(cli("datastores", "prune", "--json").stdout) == []
    deleted = json.loads(cli("datastores", "delete", "digits@v1", "--yes", "--json").stdout)
    assert deleted == [{"name": "digits", "version": 1, "state": "deleted"}]
    claim = versions.claim_version(versions.open_backend(url), Datastore("digits", url), "new", {})
    assert claim.number == 4  # version numbers are never reused


def test_prune_keeps_a_running_upload(cli: Cli, url: str) -> None:
    start_upload(url, "old", days=8)
    backend = versions.open_backend(url)
    with backend.lock(f"digits/v2/{versions.LOCK}", lambda: None):
        os.utime(Path(url) / "digits/v2" / versions.LOCK, (0, 0))
        assert "digits@v2: an upload to it is running" in cli.refused("datastores", "prune", "--yes")
    assert (Path(url) / "digits/v2/upload.json").exists()


def test_prune_finishes_an_interrupted_delete(cli: Cli, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(versions.open_backend(url)), "delete_all", interrupt)
        cli("datastores", "delete", "digits@v1", "--yes", code=None)
    assert versions.complete_versions(url, "digits") == []
    assert "digits@v1  deleted" in cli("datastores").stdout
    cli("datastores", "prune", "--yes")
    assert "no datastores in" in cli("datastores").stdout
    assert [path.name for path in (Path(url) / "digits/v1").iterdir()] == [versions.DELETED]


@pytest.mark.slow
def test_workers_of_a_search_price_jobs_and_sessions_use_what_they_read(cli: Cli, url: str) -> None:
    store = RunStore(cli.workspace)
    training = create_run(store, "model=resnet18", f"datastore.url={url}", "datastore.version=1")
    frozen, expected = training.frozen(), [training.id]
    for stage in ("search", "price", "session"):
        config = {**frozen, "session": {**frozen["session"], "datastore": "digits"}}
        expected.append(store.create(f"00000000-{stage}", config, {"stage": stage}).id)
    store.create("00000000-without", frozen, {"stage": "session"})
    store.create("00000000-upload", frozen, {"stage": "upload"})
    (row,) = json.loads(cli("datastores", "--json").stdout)
    assert sorted(row["used_by"]) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "readable"),
    [
        ("", "nonsense: {}\n", True),
        ("seed:", "new_setting: 1\nseed:", True),
        ("  version: 1\n", "  version: [1]\n", False),
        ("datastore:", "- datastore:", False),
    ],
)
def test_an_active_run_of_another_checkout_or_with_a_damaged_config_ends_no_command(
    cli: Cli, url: str, before: str, after: str, readable: bool
) -> None:
    words = (f"datastore.url={url}", "datastore.version=1")
    run = create_run(RunStore(cli.workspace), "model=resnet18", *words)
    path = run.folder / "config.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    for words in (("list",), ("show", "digits")):
        done = cli("datastores", *words, "--json")
        assert json.loads(done.stdout)[0]["used_by"] == ([run.id] if readable else [])
        assert (f"cannot be read: {run.id} of " in done.stderr) != readable
    if readable:
        assert "is in use by" in cli.refused("datastores", "delete", "digits@v1", "--yes")
    else:
        done = cli("datastores", "delete", "digits@v1", code=2)
        assert re.search(
            rf"{run.id} of .*\nerror: .*cannot confirm without a terminal, add --yes", done.stderr
        )
        cli("datastores", "delete", "digits@v1", "--yes")
    assert versions.complete_versions(url, "digits") == ([1] if readable else [])


def test_end_of_input_is_no_confirmation(cli: Cli, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())  # Ctrl-D
    cli("datastores", "delete", "digits@v1", code=1)
    assert versions.complete_versions(url, "digits") == [1]


@pytest.mark.slow
def test_delete_of_a_version_used_by_a_queued_training_is_an_error(
    cli: Cli, url: str, gate: tuple[Gate, str]
) -> None:
    queue_gate, server = gate
    cli("+stage=download", "dataset=ilsvrc", "dataset.name=a", f"dataset.source={server}/a", "cluster=local")
    eventually(lambda: queue_gate.waiting == ["a"])  # the queue runs one job at a time
    cli("dataset=digits", "model=resnet18", "recipe.global_batch=8", "cluster=local")
    (run,) = [name for name in cli.runs() if name.endswith("resnet18")]
    (row,) = json.loads(cli("datastores", "--json").stdout)
    assert row["used_by"] == [run]
    line = cli.refused("datastores", "delete", "digits@v1", "--yes")
    assert f"digits@v1 is in use by {run}: cancel them, or wait until they have ended" in line
    assert versions.complete_versions(url, "digits") == [1]
    # The same folder through a symbolic link.
    link = cli.workspace.parent / "link"
    link.symlink_to(url)
    assert datastores.used_by(RunStore(cli.workspace), versions.open_backend(str(link))) == {
        "digits@v1": [run]
    }
    cli("cancel", run)
    assert cli("datastores", "delete", "digits@v1", "--yes").stdout == "deleted  digits@v1\n"
    assert versions.complete_versions(url, "digits") == []
