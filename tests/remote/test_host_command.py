"""Commands that are typed on a laptop and carried out on a host behind a real sshd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from command_line import Gate, eventually
from laptop import ROOT, Laptop, Terminal, running_host

from hpc_imagenet.launch.executor import code_version

pytestmark = pytest.mark.slow

DOWNLOAD = ("+stage=download", "dataset=digits")
FAR_END = "hpc_imagenet.cli.far_end"
ODD = 'it\'s a "name" $HOME `id` \\ * ! ü\n;'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """A laptop, and a host with a finished download."""
    folder = tmp_path_factory.mktemp("shared")
    with running_host(folder / "home"):
        laptop = Laptop(folder / "laptop", folder / "home")
        laptop.process(*DOWNLOAD, "wait=true")
        yield laptop
        laptop.close()


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    with running_host(tmp_path / "home"):
        laptop = Laptop(tmp_path / "laptop", tmp_path / "home")
        yield laptop
        laptop.close()


def wait_for_line(stream: IO[str] | None, text: str) -> None:
    assert stream is not None
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"no line with {text}")


def test_commands_are_carried_out_on_the_host_with_one_login(tmp_path: Path) -> None:
    with running_host(tmp_path / "home") as log:
        laptop = Laptop(tmp_path / "laptop", tmp_path / "home")
        try:
            done = laptop.process(*DOWNLOAD, "wait=true")
            lines = done.stdout.splitlines()
            assert lines[0] == f"cluster: local · workspace: {laptop.there}/workspace"
            (run,) = laptop.runs()
            assert lines[1].split()[:2] == ["submitted", run]
            assert lines[-1].startswith("finished")
            assert done.stderr.splitlines() == [
                "there: sending code",
                "there: sending config",
                "there: installing the packages of constraints.txt, once; this takes minutes",
            ]
            assert [row["run"] for row in laptop.jobs()] == [run]
            assert not laptop.workspace.exists(), "something was written on the laptop"
            again = laptop.process(*DOWNLOAD)
            assert "already finished" in again.stdout
            assert again.stderr == ""
            install, uninstall = laptop.installed()
            assert "-c code/" in install
            assert uninstall.endswith("hpc-imagenet")
            assert log.read_text().count("Accepted publickey") == 1
            # The record names the code, which is kept.
            code = json.loads(
                (laptop.there / "workspace/runs" / run / "attempts/1/submitted.json").read_text()
            )["code"]
            assert code["commit"] == code_version()["commit"]
            assert (Path(code["folder"]) / "hpc_imagenet/cli/main.py").is_file()
            assert not (Path(code["folder"]) / "tests").exists()
        finally:
            laptop.close()


def test_arguments_output_and_exit_codes_are_those_of_the_host(shared: Laptop) -> None:
    done = shared.process("logs", ODD, code=2)
    assert done.stdout == ""
    error = (
        f"error: no run {ODD} in {shared.there}/workspace/runs: list them with python -m hpc_imagenet jobs"
    )
    assert done.stderr == " ".join(error.split()) + "\n"
    assert shared.process("nonsense", code=2).stderr.startswith("error: nonsense is not a command")
    assert "already finished" in shared.process("cancel", "download").stdout
    assert "no trainings in" in shared.process("report").stdout
    assert "this submission has only download" in shared.process("price", *DOWNLOAD, code=2).stderr
    assert "no datastores in" in shared.process("datastores").stdout
    # This machine instead of the host; help needs neither.
    assert shared.process("jobs", "cluster=local").stdout == f"no runs in {shared.workspace}/runs\n"
    assert "--follow" in shared.process("logs", "--help").stdout


def test_settings_of_the_laptop_are_sent(shared: Laptop, tmp_path: Path) -> None:
    (tmp_path / "mine/dataset").mkdir(parents=True)
    (tmp_path / "mine/dataset/birds.yaml").write_text(
        "defaults: [ilsvrc, _self_]\nname: birds\nsource: /birds\n"
    )
    (shared.cwd / "hpc_imagenet.yaml").write_text("download.retries: 3\n")
    (shared.cwd / "conf/recipe").mkdir(parents=True)
    (shared.cwd / "conf/recipe/short.yaml").write_text("defaults: [demo, _self_]\nepochs: 7\n")
    on_host = shared.home / ".config/hpc_imagenet"
    on_host.mkdir(parents=True)
    (on_host / "hpc_imagenet.yaml").write_text("download.retries: 4\ndownload.timeout: 5\n")
    try:
        words = ("--config-dir", str(tmp_path / "mine"), "dataset=birds", "recipe=short", "--cfg", "job")
        shown = shared.process(*words).stdout
    finally:
        shutil.rmtree(shared.cwd / "conf")
        (shared.cwd / "hpc_imagenet.yaml").unlink()
        shutil.rmtree(on_host)
    for line in ("  source: /birds", "  epochs: 7", "  retries: 3", "  timeout: 5.0", "  host: there"):
        assert line in shown.splitlines()


def test_local_paths_are_refused_and_files_are_sent(shared: Laptop) -> None:
    (shared.cwd / "archives").mkdir()
    words = ("+stage=download", "dataset=ilsvrc", "dataset.name=birds", "dry_run=true")
    refused = shared.process(*words, "dataset.source=archives", code=2).stderr
    assert refused == (
        "error: dataset.source=archives is on this machine, and there has no such path: copy it with "
        f"rsync -a archives there:{shared.there}/ and set dataset.source=archives, or give the path it has "
        "there\n"
    )
    (shared.there / "archives").mkdir()
    shared.process(*words, "dataset.source=archives")
    login = shared.cwd / "cookies.txt"
    login.write_text("secret")
    login.chmod(0o600)
    shown = shared.process("--cfg", "job", *words, "download.login=cookies.txt").stdout
    (sent,) = shared.there.glob("files/*/cookies.txt")
    assert f"  login: {sent.relative_to(shared.there)}" in shown.splitlines()
    assert (sent.read_text(), sent.stat().st_mode & 0o777) == ("secret", 0o600)
    shown = shared.process("--cfg", "job", "workspace=there:/somewhere", "datastore.url=there:/data").stdout
    assert "workspace: /somewhere" in shown.splitlines()
    assert "  url: /data" in shown.splitlines()


def test_changed_code_is_sent_beside_the_code_that_jobs_use(laptop: Laptop, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("hpc_imagenet", "conf"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, checkout)
    (checkout / ".gitignore").write_text("ignored.py\n__pycache__\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    laptop.env["PYTHONPATH"] = str(checkout)
    laptop.process("jobs")
    module = checkout / "hpc_imagenet/__init__.py"
    module.write_text(f"{module.read_text()}# changed\n")
    (checkout / "hpc_imagenet/new.py").write_text("")
    (checkout / "hpc_imagenet/ignored.py").write_text("")
    assert laptop.process("jobs").stderr == "there: sending code\n"
    assert laptop.process("jobs").stderr == ""
    old, new = sorted((path for path in laptop.there.glob("code/*")), key=lambda p: p.stat().st_mtime)
    assert (new / "hpc_imagenet/new.py").exists()
    assert not (new / "hpc_imagenet/ignored.py").exists()
    assert "+# changed" in (new / "difference.patch").read_text()
    assert json.loads((new / "code.json").read_text())["commit"].endswith("-dirty")
    assert not (old / "difference.patch").exists()
    assert (old / "pyproject.toml").samefile(new / "pyproject.toml")
    assert len(laptop.installed()) == 2, "the environment was made again for the same constraints.txt"


def test_a_failed_installation_is_continued(laptop: Laptop) -> None:
    laptop.make_python("echo 'ERROR: No space' >&2; exit 1")
    done = laptop.process("jobs", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: cluster.host=there:")
    assert "ERROR: No space" in done.stderr
    assert not list(laptop.there.glob("venv/*/.made"))
    laptop.make_python()
    laptop.process("jobs")
    laptop.store(f"{laptop.host.replace('/python', '/nothing')}cluster: local\n")
    next(laptop.there.glob("venv/*/.made")).unlink()
    assert (
        "is not Python 3.10 to 3.13 there: set cluster.host_python" in laptop.process("jobs", code=2).stderr
    )


def test_a_host_that_cannot_be_reached(shared: Laptop) -> None:
    done = shared.process("jobs", "cluster.host=nowhere.invalid", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: cluster.host=nowhere.invalid: ssh cannot connect")
    assert "must be user@host" in shared.process("jobs", "cluster.host=a:b", code=2).stderr


@pytest.mark.parametrize("on_terminal", [False, True])
def test_an_interrupt_ends_the_view_and_not_the_job(
    shared: Laptop, gate: tuple[Gate, str], on_terminal: bool
) -> None:
    url, name = gate[1], f"gated{on_terminal}".lower()
    source = (f"dataset.source={url}/{name}", f"dataset.name={name}", "dataset=ilsvrc", "+stage=download")
    shared.process(*source)
    eventually(lambda: gate[0].waiting == [name])
    shared.write_log(f"download-{name}", "a line of the job")
    view = ("logs", f"download-{name}", "-f")
    if on_terminal:
        terminal = Terminal(shared, *view)
        terminal.read_until("a line of the job")
        terminal.type("\x03")
        code, shown = terminal.wait(), terminal.output
    else:
        process = shared.start(*view)
        wait_for_line(process.stdout, "a line of the job")
        process.send_signal(signal.SIGINT)
        shown, code = process.communicate()[1], process.returncode
    assert code == 130
    assert "interrupted: submitted jobs keep running" in shown
    assert "Connection to" not in shown
    assert shared.processes(FAR_END) == []
    assert [row["state"] for row in shared.jobs() if name in row["run"]] == ["running"]
    assert "cancelled" in shared.process("cancel", f"download-{name}").stdout


def test_a_terminal_gets_a_table_with_colours(shared: Laptop) -> None:
    terminal = Terminal(shared, "jobs")
    assert terminal.wait() == 0
    assert "\x1b[1mid " in terminal.output  # the bold heading of a terminal
    assert "finished" in terminal.output
    assert "closed" not in terminal.output


@pytest.mark.parametrize("own", ["", " ControlMaster auto\n ControlPath SOCKETS/hpc-%C\n"])
def test_a_login_prompts_once(laptop: Laptop, own: str) -> None:
    """A key with a passphrase, in place of a second factor.

    Args:
        own: lines of ~/.ssh/config: a connection that is shared, and ends with the login.
    """
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "passphrase", "-f", laptop.home / "user"], check=True)
    config = laptop.home / "ssh_config"
    config.write_text(
        config.read_text().replace("BatchMode yes", "BatchMode no") + own.replace("SOCKETS", laptop.sockets)
    )
    laptop.env.pop("SSH_AUTH_SOCK", None)
    terminal = Terminal(laptop, "jobs")
    terminal.read_until("Enter passphrase")
    terminal.type("passphrase\n")
    assert terminal.wait() == 0
    assert "no runs in" in terminal.output
    terminal = Terminal(laptop, "jobs")
    assert terminal.wait() == 0
    assert terminal.output.startswith("no runs in")
    assert laptop.process("jobs").stderr == ""
    laptop.disconnect()
    assert "ssh cannot connect" in laptop.process("jobs", code=2).stderr


def test_an_ended_view_leaves_no_process_on_the_host(shared: Laptop, gate: tuple[Gate, str]) -> None:
    source = (f"dataset.source={gate[1]}/ended", "dataset.name=ended", "dataset=ilsvrc", "+stage=download")
    process = shared.start(*source, "wait=true")
    wait_for_line(process.stdout, "submitted")
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert shared.processes(FAR_END) == []
    # Without a signal, as after a lost connection, it goes on for a time: it could be a submission.
    process = shared.start(*source, "wait=true", stderr=subprocess.DEVNULL)
    wait_for_line(process.stdout, "running")
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    (alone,) = shared.processes(FAR_END)
    encoded = alone.cmdline()[-1]
    alone.kill()
    code = f"from hpc_imagenet.cli import far_end; far_end.ALONE = 0.5; far_end.run_sent('{encoded}')"
    far = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=shared.there,
        env={**shared.env, "HOME": str(shared.home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    far.communicate(timeout=60)  # closes standard input
    assert far.returncode == 130
    assert [row["state"] for row in shared.jobs() if "ended" in row["run"]] == ["running"]
    shared.process("cancel", "download-ended")


def test_without_a_host_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from hpc_imagenet.cli.main import run; run(['jobs']);"
        "sys.exit(any(name.startswith('hpc_imagenet.remote') for name in sys.modules))"
    )
    env = {**os.environ, "HPC_IMAGENET_WORKSPACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
