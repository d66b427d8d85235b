"""The command line: output, errors, exit codes, imports, and whole pipelines."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from command_line import Cli, eventually

from hpc_imagenet.cli.main import main
from hpc_imagenet.launch import submission
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.runs.store import RunStore

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ("dataset=digits", "cluster=local")
QUICK = ("recipe.epochs=1", "model=mobilenet_v3_small")


@pytest.mark.slow
def test_submit_does_not_import_heavy_modules(cli: Cli) -> None:
    script = (
        "import sys; from hpc_imagenet.cli.main import run\n"
        "run(['-m', '+stage=pipeline', 'dataset=digits', 'cluster=local', 'model=resnet18,resnet50'])\n"
        "heavy = {'torch', 'torchvision', 'pytorch_lightning', 'sklearn', 'scipy', 'boto3', 'sh'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=cli.env,
        cwd=cli.cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("submitted") == 5


@pytest.mark.slow
def test_jobs_imports_neither_the_composition_of_configs_nor_network_clients(cli: Cli) -> None:
    script = (
        "import sys; from hpc_imagenet.cli.main import run\n"
        "run(['jobs'])\n"
        "sys.exit(repr({'hydra', 'omegaconf', 'ssl', 'hpc_imagenet.stages'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=cli.env, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "set()"


@pytest.mark.slow
def test_help_fits_on_one_screen_and_lists_commands(cli: Cli) -> None:
    lines = cli.process("--help").stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    for name in ("jobs", "logs", "cancel", "retry", "report", "dry_run", "wait", "pipeline", "cluster="):
        assert name in "\n".join(lines)
    assert "--json" in cli("jobs", "--help").stdout


@pytest.mark.slow
def test_user_error_prints_one_line_and_exits_with_2(cli: Cli) -> None:
    done = cli.process("model=resnet81", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: model=resnet81 is unknown; did you mean: resnet18")
    assert done.stderr.count("\n") == 1


def test_empty_workspace_is_not_an_error(cli: Cli) -> None:
    assert json.loads(cli("jobs", "--json").stdout) == []
    assert json.loads(cli("report", "--json").stdout) == []
    assert "no runs" in cli("jobs").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("model=resnet81",), ("model=resnet81 is unknown", "resnet18")),
        (("model.name=resnet81", *DIGITS), ("model.name=resnet81", "resnet18")),
        (("modle=resnet18",), ("modle is an unknown setting", "model")),
        (DIGITS, ("no datastore digits", "+stage=pipeline")),
        (("+stage=upload", *DIGITS), ("+stage=process",)),
        (("+stage=process", *DIGITS), ("+stage=download",)),
        (("-m", "seed=0,1", "workspace=a,b"), ("workspace cannot be swept",)),
        (("jbos",), ("jbos is not a command, option or SETTING=VALUE", "jobs")),
        (("--wait",), ("--wait is not a command, option or SETTING=VALUE",)),
        (("--config-dir=", *DIGITS), ("--config-dir is empty",)),
        (
            ("+stage=pipeline", *DIGITS, "cluster.gpus_per_node=4", "cluster.tasks_per_node=1"),
            ("one task per GPU",),
        ),
        (("logs", "nothing"), ("no runs in",)),
        (("jobs", "--jsno"), ("--jsno",)),
        (("jobs", "workspace="), ("workspace is empty",)),
        (("+stage=pipeline", *DIGITS, "datastore.name=a/b"), ("datastore.name=a/b",)),
        (("+stage=pipeline", *DIGITS, "+cluster.stage.train.tasks_per_node=3"), ("recipe.global_batch=",)),
    ],
)
def test_invalid_command_line_prints_one_line_and_submits_nothing(
    cli: Cli, arguments: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    line = cli.refused(*arguments)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
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
def test_read_only_commands_print_and_write_no_file(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli(*arguments).stdout.strip()
    assert sorted(path.name for path in cli.cwd.iterdir()) == []


@pytest.mark.parametrize("words", [("dataset=digits", "--help"), ("-m", "-h"), ("help",)])
def test_help_at_any_place(cli: Cli, words: tuple[str, ...]) -> None:
    assert cli(*words).stdout == cli("--help").stdout


@pytest.mark.slow
def test_the_printed_config_has_the_stored_network(cli: Cli) -> None:
    (cli.cwd / "hpc_imagenet.yaml").write_text("model: math:hypot\n")
    assert "  name: math:hypot\n" in cli("--cfg", "job").stdout


def test_a_current_folder_that_was_removed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path / "scratch")
    (tmp_path / "scratch").rmdir()
    with pytest.raises(SystemExit, match="2"):
        main(["jobs"])
    assert capsys.readouterr().err == "error: the current folder was removed: cd to another one\n"


@pytest.mark.slow
def test_tab_completion_by_hydra(cli: Cli) -> None:
    cli.env |= {"COMP_LINE": "hpc-imagenet model=resnet1", "COMP_POINT": "26"}
    completions = cli.process("-sc", "query=bash").stdout.split()
    assert {"model=resnet18", "model=resnet101", "model=resnet152"} <= set(completions)


@pytest.mark.slow
def test_unwritable_workspace_is_an_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = cli.refused("+stage=download", *DIGITS, f"workspace={tmp_path}/file/below")
    assert "cannot be written" in line
    assert f"workspace={tmp_path}/file/below" in line


@pytest.mark.slow
def test_other_errors_of_a_submission_name_the_file(cli: Cli, tmp_path: Path) -> None:
    error = OSError(errno.EIO, "Input/output error", str(tmp_path / "config.yaml"))
    with mock.patch.object(submission, "submit_plan", side_effect=error):
        line = cli.refused("+stage=download", *DIGITS)
    assert line == (
        f"error: workspace={cli.workspace}: Input/output error ({tmp_path}/config.yaml): fix it, then "
        "submit again"
    )


@pytest.mark.slow
def test_dry_run_prints_jobs_and_writes_no_file(cli: Cli) -> None:
    done = cli("-m", "+stage=pipeline", *DIGITS, "model=resnet18,resnet50", "dry_run=true")
    assert done.stdout.count("would be submitted") == 5
    assert list(cli.cwd.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A workspace with a finished pipeline of one epoch."""
    cli = Cli(tmp_path_factory.mktemp("finished") / "workspace")
    cli("+stage=pipeline", *DIGITS, *QUICK, "wait=true")
    return cli


@pytest.mark.slow
def test_pipeline_result_is_on_the_leaderboard(finished: Cli) -> None:
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
def test_finished_runs_are_skipped_and_missing_outputs_rebuilt(finished: Cli) -> None:
    arguments = ("+stage=pipeline", *DIGITS, *QUICK)
    assert finished(*arguments).stdout.count("already finished") == 4
    (finished.workspace / "archives" / "digits" / "ILSVRC2012_img_val.tar").unlink()
    done = finished(*arguments, "wait=true")
    assert done.stdout.count("already finished") == 3
    assert "submitted  " in done.stdout
    assert finished.states() == ["finished"] * 4


@pytest.mark.slow
def test_existing_version_with_other_content_is_an_error(finished: Cli) -> None:
    other = ("+stage=pipeline", *DIGITS, *QUICK, "dataset.revision=other", "datastore.name=digits@v1")
    line = finished.refused(*other)
    assert "digits@v1 exists" in line
    assert "datastore.name=digits" in line


@pytest.mark.slow
def test_wrong_md5_fails_the_download_and_cancels_dependent_jobs(finished: Cli) -> None:
    wrong = ("dataset.name=wrong", "dataset.revision=", "dataset.archives.val.md5=" + "0" * 32)
    done = finished("+stage=pipeline", *DIGITS, *QUICK, *wrong, "wait=true", code=1)
    rows = finished.jobs()[-4:]
    assert [row["state"] for row in rows] == ["failed", "cancelled", "cancelled", "cancelled"]
    assert "0" * 32 in rows[0]["reason"]
    assert "\n" not in rows[0]["reason"]
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(finished.workspace.glob("datasets/wrong/manifest.json"))


@pytest.mark.slow
def test_full_disk_is_a_one_line_error_and_submitting_again_resumes(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], check=False)
    if mount.returncode:
        pytest.skip("cannot mount a small disk (not root)")
    cli = Cli(small / "workspace")
    arguments = ("+stage=pipeline", *DIGITS, *QUICK)
    try:
        cli(*arguments, "wait=true", code=1)
        rows = cli.jobs()
        assert [row["state"] for row in rows] == ["finished", "finished", "finished", "failed"]
        assert "no space left" in rows[-1]["reason"]
        assert not list(cli.workspace.rglob("*.ckpt"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        cli(*arguments, "wait=true")
    finally:
        cli.close()
        subprocess.run(["umount", "-l", str(small)], check=False)


@pytest.mark.slow
def test_killed_stages_finish_when_submitted_again(finished: Cli, tmp_path: Path) -> None:
    seed = random.randrange(10_000)
    print(f"seed {seed}")
    generator = random.Random(seed)
    cli = Cli(tmp_path / "workspace")
    arguments = ("+stage=pipeline", *DIGITS, *QUICK)
    try:
        for _ in range(8):
            killed = []
            cli(*arguments)
            eventually(lambda: "running" in cli.states() or set(cli.states()) == {"finished"})
            # A short job mostly starts Python; the kill hits a random moment.
            time.sleep(generator.uniform(0, 4))
            for run in RunStore(cli.workspace).all():
                attempt = run.attempt
                if attempt and "pid" in attempt.started and not attempt.outcome:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        psutil.Process(attempt.started["pid"]).kill()
                        killed.append(attempt)
            # Its worker ends a moment later, and until then the run counts as running.
            eventually(lambda killed=killed: not any(map(local_queue.is_alive, killed)))
        cli(*arguments, "wait=true")
        rows = cli.jobs()
        assert {row["state"] for row in rows} == {"finished"}
        expected = {row["run"]: row["top1"] for row in finished.jobs()}
        assert rows[-1]["top1"] == expected[rows[-1]["run"]]
    finally:
        cli.close()


@pytest.mark.slow
def test_wheel_contains_conf_and_runs_from_any_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (tmp_path / "away").mkdir()
    (tmp_path / "mine" / "cluster").mkdir(parents=True)
    (tmp_path / "mine" / "cluster" / "mine.yaml").write_text("executor: local\n")
    script = (
        "import hpc_imagenet.config.compose as c; print(c.CONF); "
        "from hpc_imagenet.cli.main import main; main()"
    )
    arguments = [
        "+stage=pipeline",
        "dataset=digits",
        "dry_run=true",
        "--config-dir",
        str(tmp_path / "mine"),
        "cluster=mine",
    ]
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", script, *arguments],
        cwd=tmp_path / "away",
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site / "hpc_imagenet" / "conf"))
    assert done.stdout.count("would be submitted") == 4


def test_errors_stay_one_line_without_control_characters(cli: Cli) -> None:
    error = cli.refused("+stage=download", "--config-dir", "/a\x1b[31mb\nc")
    assert "--config-dir /ab c: no such folder" in error
