"""A group's workspace: what alice and bob, who share a group, see of each other, may do and may not."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Gate, eventually
from other_users import GROUP, ROOT, Person, available, ending, shared_folder
from sample_dataset import write_coloured
from sample_search import SETTINGS, SPACE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs root, to act as other users"),
]

RECORD = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from recorded_runs import record_run
from hpc_imagenet.io.ownership import owner_writes
from hpc_imagenet.launch.validate import prepare_workspace
from hpc_imagenet.runs.store import RunStore
prepare_workspace(Path(sys.argv[1]))
with owner_writes():
    store, number, result = RunStore(Path(sys.argv[1])), int(sys.argv[2]), {{"top1": 0.5}}
    record_run(store, number, sys.argv[3], result=result, label=sys.argv[4])
"""


class Group:
    """A folder that all may enter, with a workspace of the group and its users."""

    def __init__(self, folder: Path, umask: str = "007") -> None:
        self.folder, self.workspace = folder, shared_folder(folder / "lab")
        self.alice, self.bob = Person("alice", folder, umask), Person("bob", folder)
        self.eve = Person("eve", folder)
        self.here = f"workspace={self.workspace}"

    def study_folder(self, person: Person) -> Path:
        return self.workspace / f"runs/.search-{person.uid}/night"

    def study(self, person: Person) -> list[dict[str, Any]]:
        """Return the trials of a user's study, in their order."""
        found = (json.loads(path.read_text()) for path in self.study_folder(person).glob("trials/*.json"))
        return sorted(found, key=lambda each: int(each["trial"]))

    def record(self, person: Person, number: int, state: str, label: str) -> str:
        """Write the records of a training of a user; return its id."""
        done = person.python(RECORD, str(self.workspace), str(number), state, label)
        assert not done.returncode, done.stderr
        return f"{number:08x}-{label}"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="users-") as name:
        Path(name).chmod(0o755)
        with ending(Path(name)):
            yield Path(name)


@pytest.fixture
def group(folder: Path) -> Group:
    return Group(folder)


@pytest.fixture
def private(folder: Path) -> Group:
    """As `group`, and no other user may read what alice writes."""
    return Group(folder, umask="077")


def download(url: str, name: str = "photos") -> tuple[str, ...]:
    """Return the arguments of a download that waits for the test to open its server."""
    waits = ("cluster=local", "download.retries=0", "download.timeout=120")
    return (
        "+stage=download",
        "dataset=ilsvrc",
        f"dataset.name={name}",
        f"dataset.source={url}/{name}",
        *waits,
    )


def test_tables_show_the_runs_of_all_users(group: Group) -> None:
    runs = {group.record(group.alice, 1, "finished", "hers"), group.record(group.bob, 2, "failed", "his")}
    for person in (group.alice, group.bob):
        assert {row["run"] for row in person.jobs(group.workspace)} == runs
        report = person("report", "--json", group.here)
        assert {row["run"] for row in json.loads(report.stdout)} == runs
        assert not report.stderr
        person("report", "--html", str(person.home / "page.html"), group.here)
        for run in runs:
            assert run in person("show", run, group.here).stdout


def test_tables_leave_out_what_cannot_be_read_with_one_line(private: Group) -> None:
    his, hers = (private.record(p, n, "finished", p.name) for n, p in enumerate((private.bob, private.alice)))
    for words in (("jobs",), ("report",), ("report", "--html", str(private.bob.home / "page.html"))):
        done = private.bob(*words, private.here)
        assert done.stderr == (
            "left out, since you may not read them: 1 run of alice (their owner can run chmod -R g+rX "
            f"{private.workspace}/runs/RUN)\n"
        )
        assert hers not in done.stdout
    assert "1 run of alice" in private.bob("tensorboard", private.here, code=2).stderr
    assert his in private.bob("jobs", private.here, "--json").stdout
    assert {row["run"] for row in private.alice.jobs(private.workspace)} == {hers, his}
    assert f"no run {hers}" in private.bob.refused("show", hers, private.here)
    # Records that became unreadable one by one.
    records = private.workspace / "runs" / hers
    for path in (records, records / "attempts", records / "attempts/1", records / "config.yaml"):
        path.chmod(0o750)
    assert "1 run of alice" in private.bob("jobs", private.here).stderr
    assert "1 run of alice" in private.bob("report", private.here).stderr


def test_runs_of_another_user_cannot_be_changed(group: Group) -> None:
    run = group.record(group.alice, 1, "failed", "hers")
    line = group.bob.refused("retry", run, group.here)
    assert line == (
        f"error: {run} belongs to alice, and only alice can retry it: have alice retry it, or submit it in "
        "another workspace=FOLDER"
    )
    done = group.bob("retry", "--failed", group.here)
    assert done.stderr == "left out: 1 that belong to alice\n"
    folder = group.workspace / "runs" / run
    script = "import os, sys; [os.rename(sys.argv[1], sys.argv[1] + '.old')]"
    assert "PermissionError" in group.bob.python(script, str(folder)).stderr  # the sticky bit of runs/
    script = "import sys; open(sys.argv[1] + '/config.yaml', 'a')"
    assert "PermissionError" in group.bob.python(script, str(folder)).stderr


def test_one_scratch_folder_serves_all_users_of_a_node(folder: Path) -> None:
    alice, bob = Person("alice", folder, "007"), Person("bob", folder)
    script = """
        import sys
        from hpc_imagenet.datastore.node_cache.cache import NodeCache
        print(NodeCache(sys.argv[1]).folder)
    """
    local = folder / "local"
    local.mkdir()
    local.chmod(0o1777)
    for person in (alice, bob):
        done = person.python(textwrap.dedent(script), str(local / "imagenet"))
        assert done.stdout == f"{local}/imagenet/hpc_imagenet-{person.uid}\n", done.stderr
    (local / "imagenet").chmod(0o755)
    (local / "imagenet" / f"hpc_imagenet-{bob.uid}").rmdir()
    refused = bob.python(textwrap.dedent(script), str(local / "imagenet")).stderr.splitlines()[-1]
    assert re.search(
        rf"cluster\.scratch={local}/imagenet cannot be used on this node \(Permission denied\): use a "
        rf"folder that you can write to, or have its owner alice run chmod 1777 {local}/imagenet on \S+$",
        refused,
    )


def test_jobs_of_two_users(group: Group, gate: tuple[Gate, str]) -> None:
    """Running, waiting, cancelled: each user has a queue and a worker of their own."""
    held, url = gate
    alice, bob, here = group.alice, group.bob, group.here
    alice(*download(url), here)
    eventually(lambda: held.waiting == ["photos"])
    (row,) = bob.jobs(group.workspace)
    assert row["state"] == "running"
    cancelling = f"error: {row['run']} belongs to alice, and only alice can cancel it: have alice cancel it"
    assert bob.refused("cancel", row["run"], here) == cancelling
    assert bob("cancel", "--running", here).stderr == "left out: 1 that belong to alice\n"
    assert f"already running, of alice  {row['run']}" in bob(*download(url), here).stdout
    bob(*download(url, "drawings"), here)  # does not wait for alice's
    eventually(lambda: held.waiting == ["photos", "drawings"])
    alice(*download(url, "maps"), here)
    states = {row["label"]: (row["state"], row["reason"]) for row in bob.jobs(group.workspace)}
    assert states["download-maps"] == ("queued", "waits in the queue of alice")
    assert states["download-drawings"][0] == "running"
    for person in (alice, bob):
        queue = group.workspace / "runs" / f".user-{person.uid}/queue"
        (host,) = queue.iterdir()
        for path in (queue, host):
            assert path.stat().st_uid == person.uid
            assert stat.S_IMODE(path.stat().st_mode) & 0o777 == 0o700
    alice("cancel", row["run"], here)
    assert bob.refused(*download(url), here) == (
        f"error: {row['run']} belongs to alice, and only alice can continue it after it was cancelled: have "
        "alice retry it, or submit with another workspace=FOLDER"
    )


def test_a_job_that_another_user_hides_is_refused(private: Group, gate: tuple[Gate, str]) -> None:
    held, url = gate
    private.record(private.bob, 1, "finished", "his")  # he makes runs/: hers would be private
    private.alice(*download(url), private.here)
    eventually(lambda: held.waiting == ["photos"])
    row = private.alice.jobs(private.workspace)[-1]
    assert private.bob.refused(*download(url), private.here) == (
        f"error: {row['run']} belongs to alice, and you may not read it: set another workspace=FOLDER, or "
        f"have alice run chmod -R g+rX {row['dir']}"
    )


def test_sessions_belong_to_one_user(group: Group) -> None:
    script = RECORD.replace("label=sys.argv[4]", "label=sys.argv[4], stage='session'")
    done = group.alice.python(script, str(group.workspace), "1", "failed", "session-hers")
    assert not done.returncode, done.stderr
    for command in ("pause", "resume"):
        line = group.bob.refused(command, "session-hers", group.here)
        assert line.endswith(
            f"belongs to alice, and only alice can {command} it: start your own with another session.name"
        )


def test_a_dataset_of_one_user_is_used_by_the_other(group: Group) -> None:
    """From the archives to a datastore by alice; training, evaluation, export, fetch and prune by bob."""
    alice, bob, here = group.alice, group.bob, group.here
    short = ("dataset=digits", "cluster=local", "recipe.epochs=1", "model=squeezenet1_1", "wait=true", here)
    alice("+stage=pipeline", *short)
    done = bob("+stage=pipeline", *short)
    assert done.stdout.count("already finished, of alice") == 4
    training = next(row["run"] for row in bob.jobs(group.workspace) if row["stage"] == "train")
    bob("evaluate", training, here, "cluster=local", "wait=true")
    bob("export", training, str(bob.home / "network"), here)
    bob("datastores", "fetch", "digits", str(bob.home / "copy"), here)
    bob("datastores", "verify", "digits", here)
    bob("verify", "--quick", here)
    deleted = bob.refused("datastores", "delete", "digits@v1", "--yes", here)
    assert deleted == (
        "error: digits@v1 belongs to alice, and only alice can delete it: have alice delete it"
    )
    bob(*download("http://127.0.0.1:1", "photos"), here)
    bob("+stage=process", "dataset=digits", "dataset.name=smaller", "cluster=local", here, code=None)
    partial = group.workspace / "datastores/digits/v2"
    partial.mkdir()
    os.chown(partial, alice.uid, GROUP)
    os.utime(partial, (1, 1))
    assert "digits@v2 of alice" in bob("datastores", "prune", "--yes", here).stderr
    partial.rmdir()
    report = json.loads(bob("report", "--json", here).stdout)
    assert {row["stage"] for row in report} == {"train", "evaluate"}
    _check_permissions(group.workspace)


def test_a_fetch_that_one_user_began_is_completed_by_the_other(group: Group) -> None:
    copy, source = shared_folder(group.folder / "copy"), group.workspace / "datastores/tiny/v1"
    write_coloured(source, 4)
    group.alice("datastores", "fetch", "tiny", str(copy), group.here)
    for name in ("manifest.json", "val.tar"):
        (copy / "tiny/v1" / name).unlink()
    claim = copy / "tiny/v1/upload.json"
    claim.write_text('{"content": "0"}')
    os.chown(claim, group.alice.uid, GROUP)
    group.bob("datastores", "fetch", "tiny", str(copy), group.here)
    group.alice("datastores", "verify", "tiny", f"datastore.url={copy}")
    owners = {name: (copy / "tiny/v1" / name).stat().st_uid for name in ("train.tar", "val.tar")}
    assert owners == {"train.tar": group.alice.uid, "val.tar": group.bob.uid}


UPLOAD_PRIVATE = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
import os
from sample_dataset import make_dataset
from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Config, Datastore
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import upload
workspace, store = Path(sys.argv[1]), Datastore("digits", sys.argv[2])
make_dataset(workspace, content=sys.argv[3])
for path in (workspace / "archives/digits").iterdir():
    os.chown(path, -1, os.getgid() if sys.argv[4] == "600" else -1)
    path.chmod(int(sys.argv[4], 8))
(workspace / "run").mkdir(exist_ok=True)
config = Config(workspace=str(workspace), dataset=Dataset("digits"), datastore=store)
upload.run(config, Run(workspace / "run"), DistEnv())
"""


def test_a_version_that_links_to_private_archives_is_not_read_by_the_group(group: Group) -> None:
    alice, bob, here = group.alice, group.bob, group.here
    url, shared = str(group.workspace / "datastores"), shared_folder(group.folder / "alices")
    states = {}
    for number, mode in ((1, "640"), (2, "600")):
        done = alice.python(UPLOAD_PRIVATE, str(shared), url, str(number), mode)
        assert not done.returncode, done.stderr
        states[number] = done.stderr
    folder = f"{url}/digits/v2"
    fix = f"chgrp -R lab {folder} && chmod -R g+rX {folder}"
    assert not states[1]
    assert states[2].startswith(f"warning: {folder} cannot be read by its group: {folder}/shards/")
    assert states[2].endswith(f" is a hard link to an archive that only you may read: run {fix}\n")

    def listed(person: Person) -> list[str]:
        entries = json.loads(person("datastores", "list", "--json", here).stdout)
        return [entry["state"] for entry in entries]

    assert listed(alice) == ["complete", "complete"]
    assert listed(bob) == ["complete", "unreadable"]
    line = f"datastore digits@v2 cannot be read: have its owner, alice, run {fix}"
    assert bob.refused("datastores", "verify", "digits@v2", here) == f"error: {line}"
    assert (
        f"warning: {line}; until then v1 is the newest" in bob("datastores", "verify", "digits", here).stderr
    )
    (Path(folder) / "shards").chmod(0o2700)
    assert listed(bob) == ["complete", "unreadable"]
    done = alice.run("sh", "-c", fix)
    assert not done.returncode, done.stderr
    assert listed(bob) == ["complete", "complete"]
    bob("datastores", "verify", "digits@v2", here)


def _check_permissions(workspace: Path) -> None:
    """Everything belongs to the group and nothing is for others; only runs are for one user to write."""
    wrong = []
    for path in sorted(workspace.rglob("*")):
        status, parts = path.lstat(), path.relative_to(workspace).parts
        mode = stat.S_IMODE(status.st_mode)
        if status.st_gid != GROUP or mode & 0o007:
            wrong.append(f"{path}: {mode:o} {status.st_gid}")
        private = {"queue", "locks"} & set(parts) or path.name == "token"
        if not private and not mode & 0o040:
            wrong.append(f"{path}: {mode:o}, which the group cannot read")
        if len(parts) > 1 and parts[0] == "runs" and mode & 0o020:
            wrong.append(f"{path}: {mode:o}, which the group can write")
        if parts[0] != "runs" and path.is_dir() and not mode & 0o020:
            wrong.append(f"{path}: {mode:o}, which the group cannot write")
    assert not wrong, "\n".join(wrong)


def test_the_same_from_python(group: Group) -> None:
    run = group.record(group.alice, 1, "finished", "hers")
    script = "import sys, hpc_imagenet; print(hpc_imagenet.jobs(workspace=sys.argv[1]))"
    done = group.bob.run(sys.executable, "-c", script, str(group.workspace))
    assert run in done.stdout, done.stderr


def test_searches_of_two_users_with_one_name_end_without_harm(group: Group) -> None:
    """The same command by both: bob uses what alice has trained, and skips what she has spoilt."""
    alice, bob, here = group.alice, group.bob, group.here
    script = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
    script += "from sample_dataset import write_coloured; write_coloured(Path(sys.argv[2]), 24, noise=99)"
    done = alice.python(script, str(ROOT / "tests"), str(group.workspace / "datastores/tiny/v1"))
    assert not done.returncode, done.stderr
    search = ("+search=tpe", *SETTINGS, SPACE[0], "search.name=night", "cluster=foreground", here)
    alice(*search, "search.trials=2")
    hers = group.study(alice)
    assert [each["state"] for each in hers] == ["finished", "finished"]
    (outcome,) = group.workspace.glob(f"runs/{hers[1]['run']}/attempts/1/outcome.json")
    spoilt = json.loads(outcome.read_text()) | {"result": {"top1": "all", "epochs": []}}
    done = alice.python(
        "import os, sys; os.remove(sys.argv[1]); open(sys.argv[1], 'w').write(sys.argv[2])",
        str(outcome),
        json.dumps(spoilt),
    )
    assert not done.returncode, done.stderr
    files = {path: path.read_bytes() for path in group.study_folder(alice).rglob("*") if path.is_file()}
    bob(*search, "search.trials=3")
    his = group.study(bob)
    assert [each["state"] for each in his] == ["finished", "skipped", "finished"]
    assert [each["run"] for each in his[:2]] == [each["run"] for each in hers]
    assert (his[0]["reused"], his[0]["reason"]) == (True, "alice has trained it")
    assert his[1]["reason"] == "alice has the same run, without a result"
    assert (group.workspace / "runs" / his[2]["run"]).stat().st_uid == bob.uid
    assert {path: path.read_bytes() for path in files} == files
    folders = [path for path in group.study_folder(alice).rglob("*") if path.is_dir()]
    assert not [path for path in (group.study_folder(alice), *folders) if path.stat().st_mode & 0o022]
    claim = str(group.study_folder(alice) / "claims/9.0.0.json")
    assert "PermissionError" in bob.python("import sys; open(sys.argv[1], 'w')", claim).stderr
    assert len([row for row in bob.jobs(group.workspace) if row["stage"] == "train"]) == 3


def test_studies_of_two_users_with_one_name(group: Group) -> None:
    script = """
import sys
from pathlib import Path
from hpc_imagenet.io.ownership import owner_writes
from hpc_imagenet.launch.validate import prepare_workspace
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.search.study_files import StudyFiles, studies
prepare_workspace(Path(sys.argv[1]))
store = RunStore(Path(sys.argv[1]))
with owner_writes():
    StudyFiles(store, "night").create({"of": sys.argv[2]}, 4, None)
print(*(study.definition["of"] for study in studies(store)))
"""
    for person, expected in ((group.alice, "alice"), (group.bob, "alice bob"), (group.alice, "alice bob")):
        done = person.python(script, str(group.workspace), person.name)
        assert sorted(done.stdout.split()) == expected.split(), done.stderr
