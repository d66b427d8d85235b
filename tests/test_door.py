"""The door as a user meets it: what it prints, refuses, leaves running; and that it stays light."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from door import Door, eventually

from hpc_imagenet.cli.main import main
from hpc_imagenet.launch import local_queue
from hpc_imagenet.runs.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ("dataset=digits", "cluster=local")
QUICK = ("recipe.epochs=1", "model=mobilenet_v3_small")


def test_submitting_a_sweep_imports_nothing_heavy(door: Door) -> None:
    look = (
        "import sys; from hpc_imagenet.cli.main import run\n"
        "run(['-m', '+stage=pipeline', 'dataset=digits', 'cluster=local', 'model=resnet18,resnet50'])\n"
        "heavy = {'torch', 'torchvision', 'pytorch_lightning', 'sklearn', 'scipy', 'boto3', 'sh'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], env=door.env, cwd=door.cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("submitted") == 5


def test_help_is_one_screen_and_names_everything(door: Door) -> None:
    lines = door.process("--help").stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    for word in ("jobs", "logs", "cancel", "retry", "report", "dry_run", "wait", "pipeline", "cluster="):
        assert word in "\n".join(lines)
    assert "--json" in door("jobs", "--help").stdout


def test_a_refusal_of_the_process_is_one_line_and_exit_code_2(door: Door) -> None:
    done = door.process("model=resnet81", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: model=resnet81 is unknown; near: resnet18")
    assert done.stderr.count("\n") == 1


def test_a_workspace_without_runs_is_no_error(door: Door) -> None:
    assert json.loads(door("jobs", "--json").stdout) == []
    assert json.loads(door("report", "--json").stdout) == []
    assert "no runs" in door("jobs").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model=resnet81",), ("model=resnet81 is unknown", "resnet18")),
        (("model.name=resnet81", *DIGITS), ("model.name=resnet81", "resnet18")),
        (("modle=resnet18",), ("modle is an unknown setting", "model")),
        (DIGITS, ("no datastore digits", "+stage=pipeline")),
        (("+stage=upload", *DIGITS), ("+stage=process",)),
        (("+stage=process", *DIGITS), ("+stage=download",)),
        (("-m", "seed=0,1", "workspace=a,b"), ("workspace cannot be swept",)),
        (("jbos",), ("jbos is no command, option or SETTING=VALUE", "jobs")),
        (("--wait",), ("--wait is no command, option or SETTING=VALUE",)),
        (("--config-dir=", *DIGITS), ("--config-dir: which folder",)),
        (
            ("+stage=pipeline", *DIGITS, "cluster.gpus_per_node=4", "cluster.tasks_per_node=1"),
            ("one task a GPU",),
        ),
        (("logs", "nothing"), ("no runs in",)),
        (("jobs", "--jsno"), ("--jsno",)),
        (("jobs", "workspace="), ("workspace is empty",)),
        (("+stage=pipeline", *DIGITS, "datastore.name=a/b"), ("datastore.name=a/b",)),
        (("+stage=pipeline", *DIGITS, "+cluster.stage.train.tasks_per_node=3"), ("recipe.global_batch=",)),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    door: Door, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    line = door.refused(*words)
    for word in says:
        assert word in line


@pytest.mark.parametrize(
    "words",
    [
        ("jobs", "workspace=/nowhere"),
        ("--cfg", "job"),
        ("--cfg", "job", "dataset=digits"),
        ("dataset=digits", "--cfg", "job"),
        ("--info", "config"),
        ("--hydra-help",),
        ("--version",),
    ],
)
def test_questions_are_answered_and_write_nothing(door: Door, words: tuple[str, ...]) -> None:
    assert door(*words).stdout.strip()
    assert sorted(path.name for path in door.cwd.iterdir()) == []


def test_completion_is_hydras(door: Door) -> None:
    door.env |= {"COMP_LINE": "hpc-imagenet model=resnet1", "COMP_POINT": "26"}
    words = door.process("-sc", "query=bash").stdout.split()
    assert {"model=resnet18", "model=resnet101", "model=resnet152"} <= set(words)


def test_a_workspace_that_cannot_be_written(door: Door, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = door.refused("+stage=download", *DIGITS, f"workspace={tmp_path}/file/below")
    assert "cannot be written" in line
    assert f"workspace={tmp_path}/file/below" in line


def test_a_folder_of_somebody_else_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs" / "runs").mkdir(parents=True)
    (tmp_path / "theirs").chmod(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)  # whom modes mean something to
    try:
        with pytest.raises(SystemExit) as caught:
            main(["jobs", f"workspace={tmp_path}/theirs"])
    finally:
        os.seteuid(before)
        (tmp_path / "theirs").chmod(0o700)
    assert caught.value.code == 2
    assert re.search(rf"^error: {tmp_path}.*: you may not read or write here", capsys.readouterr().err)


def test_dry_run_says_what_would_be_and_writes_nothing(door: Door) -> None:
    done = door("-m", "+stage=pipeline", *DIGITS, "model=resnet18,resnet50", "dry_run=true")
    assert done.stdout.count("would be submitted") == 5
    assert list(door.cwd.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Door:
    """A workspace in which the whole pipeline has run, with one epoch."""
    door = Door(tmp_path_factory.mktemp("finished") / "workspace")
    door("+stage=pipeline", *DIGITS, *QUICK, "wait=true")
    return door


@pytest.mark.slow
def test_a_pipeline_ends_on_the_leaderboard(finished: Door) -> None:
    assert finished.states() == ["finished"] * 4
    (row,) = json.loads(finished("report", "--json").stdout)
    assert row["model"] == "mobilenet_v3_small"
    assert row["state"] == "finished"
    assert 0 < row["top1"] <= 1
    assert row["images_per_second"] > 0
    assert Path(row["dir"]).is_dir()
    assert "mobilenet_v3_small" in finished("report").stdout
    assert finished("logs", row["run"]).stdout.strip()


@pytest.mark.slow
def test_what_is_finished_is_skipped_and_what_is_gone_is_made_again(finished: Door) -> None:
    words = ("+stage=pipeline", *DIGITS, *QUICK)
    assert finished(*words).stdout.count("already finished") == 4
    (finished.workspace / "archives" / "digits" / "ILSVRC2012_img_val.tar").unlink()
    done = finished(*words, "wait=true")
    assert done.stdout.count("already finished") == 3
    assert "submitted  " in done.stdout
    assert finished.states() == ["finished"] * 4


@pytest.mark.slow
def test_a_version_that_exists_with_other_content_is_refused(finished: Door) -> None:
    other = ("+stage=pipeline", *DIGITS, *QUICK, "dataset.revision=other", "datastore.name=digits@v1")
    line = finished.refused(*other)
    assert "digits@v1 exists" in line
    assert "datastore.name=digits" in line


@pytest.mark.slow
def test_a_wrong_md5_fails_in_one_line_and_stops_what_follows(finished: Door) -> None:
    wrong = ("dataset.name=wrong", "dataset.revision=", "dataset.archives.val.md5=" + "0" * 32)
    done = finished("+stage=pipeline", *DIGITS, *QUICK, *wrong, "wait=true", code=1)
    rows = finished.jobs()[-4:]
    assert [row["state"] for row in rows] == ["failed", "cancelled", "cancelled", "cancelled"]
    assert "0" * 32 in rows[0]["reason"]
    assert "\n" not in rows[0]["reason"]
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(finished.workspace.glob("datasets/wrong/manifest.json"))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_asking_again_goes_on(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], check=False)
    if mount.returncode:
        pytest.skip("a small disk cannot be mounted here (not root)")
    door = Door(small / "workspace")
    words = ("+stage=pipeline", *DIGITS, *QUICK)
    try:
        door(*words, "wait=true", code=1)
        rows = door.jobs()
        assert [row["state"] for row in rows] == ["finished", "finished", "finished", "failed"]
        assert "no space left" in rows[-1]["reason"]
        assert not list(door.workspace.rglob("*.ckpt"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        door(*words, "wait=true")
    finally:
        door.close()
        subprocess.run(["umount", "-l", str(small)], check=False)


@pytest.mark.slow
def test_any_stage_killed_at_any_moment_is_finished_by_asking_again(finished: Door, tmp_path: Path) -> None:
    seed = random.randrange(10_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    door = Door(tmp_path / "workspace")
    words = ("+stage=pipeline", *DIGITS, *QUICK)
    try:
        for _ in range(8):
            killed = []
            door(*words)
            eventually(lambda: "running" in door.states() or set(door.states()) == {"finished"})
            # Most of a short job's life is Python's start; the kill lands anywhere in it.
            time.sleep(chance.uniform(0, 4))
            for run in RunStore(door.workspace).all():
                attempt = run.attempt
                if attempt and "pid" in attempt.started and not attempt.outcome:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        psutil.Process(attempt.started["pid"]).kill()
                        killed.append(attempt)
            # Who has started it lives a moment longer, and who asks meanwhile is told that it runs.
            eventually(lambda killed=killed: not any(map(local_queue.is_alive, killed)))
        door(*words, "wait=true")
        rows = door.jobs()
        assert {row["state"] for row in rows} == {"finished"}
        undisturbed = {row["run"]: row["top1"] for row in finished.jobs()}
        assert rows[-1]["top1"] == undisturbed[rows[-1]["run"]]
    finally:
        door.close()


@pytest.mark.slow
def test_the_wheel_brings_conf_and_runs_from_any_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (tmp_path / "away").mkdir()
    (tmp_path / "mine" / "cluster").mkdir(parents=True)
    (tmp_path / "mine" / "cluster" / "mine.yaml").write_text("executor: local\n")
    look = (
        "import hpc_imagenet.config.compose as c; print(c.CONF); "
        "from hpc_imagenet.cli.main import main; main()"
    )
    words = [
        "+stage=pipeline",
        "dataset=digits",
        "dry_run=true",
        "--config-dir",
        str(tmp_path / "mine"),
        "cluster=mine",
    ]
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", look, *words],
        cwd=tmp_path / "away",
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site / "hpc_imagenet" / "conf"))
    assert done.stdout.count("would be submitted") == 4
