"""The lab itself: the properties of this private Slurm cluster that the other tests rely on."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command_line import eventually
from lab import LAB, NODES, Lab

BEAT = 'while true; do echo "$SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}" >> %s; sleep 0.2; done'


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for one more lab, which is shut down at the end."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    yield folder
    subprocess.run([LAB, "--dir", folder, "down"], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def processes(folder: Path, *names: str) -> list[psutil.Process]:
    """Return all processes of a lab, or only those with these names."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            texts = " ".join(process.cmdline()), process.environ().get("SLURM_CONF", "")
            candidate = process.pid != os.getpid() and (not names or process.name() in names)
            if candidate and any(str(folder) in text for text in texts):
                found.append(process)
    return found


def beats(path: Path, seconds: float = 1.0) -> set[str]:
    """Return the copies of a job that write during `seconds`, as `node restarts`."""
    before = path.stat().st_size if path.exists() else 0
    time.sleep(seconds)
    return set(path.read_bytes()[before:].decode().splitlines()) if path.exists() else set()


def test_all_nodes_answer(lab: Lab) -> None:
    assert lab.command("status").stdout.count(" idle") == len(NODES)
    names = lab.slurm("srun", "--nodes=4", "--ntasks-per-node=2", "hostname").split()
    assert sorted(names) == sorted([*NODES, *NODES])


def test_second_up_keeps_running_jobs(lab: Lab) -> None:
    job = lab.sbatch("sleep 100")
    eventually(lambda: lab.job(job)["JobState"] == "RUNNING")
    lab.command("up")
    assert lab.job(job)["JobState"] == "RUNNING"
    assert "down first" in lab.command("up", "--set", "MaxArraySize=9", code=2).stderr


def test_jobs_get_different_gpus(lab: Lab) -> None:
    show = 'echo "gpus=$CUDA_VISIBLE_DEVICES"'
    assert lab.slurm("srun", "--gpus=2", "sh", "-c", show) == "gpus=0,1"
    assert lab.slurm("srun", "sh", "-c", show) == "gpus="
    first = lab.sbatch("sleep 100", "--nodelist=n1", "--gpus-per-node=1")
    eventually(lambda: lab.job(first)["JobState"] == "RUNNING")
    assert lab.slurm("srun", "--nodelist=n1", "--gpus=1", "sh", "-c", show) == "gpus=1"


def test_arrays_are_limited_to_128_tasks(lab: Lab) -> None:
    job = lab.sbatch("true", "--array=0-99", "--hold")
    assert len(lab.slurm("squeue", "--noheader", "--array", f"--jobs={job}").splitlines()) == 100
    assert "MaxArraySize            = 128" in lab.scontrol("show", "config")
    refused = subprocess.run(
        ["sbatch", "--array=0-128", "--wrap=true"], env=lab.env, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "Invalid job array specification" in refused.stderr


def test_node_has_its_own_disk_memory_and_processes(lab: Lab, tmp_path: Path) -> None:
    mark = tmp_path.name
    lab.slurm(
        "srun", "--nodelist=n1", "touch", f"/scratch/{mark}", f"/dev/shm/{mark}", str(tmp_path / "shared")
    )
    assert (tmp_path / "shared").exists()
    assert (lab.folder / f"nodes/n1/scratch/{mark}").exists()
    for folder in ("/scratch", "/dev/shm"):
        assert mark in lab.slurm("srun", "--nodelist=n1", "ls", folder)
        assert mark not in lab.slurm("srun", "--nodelist=n2", "ls", folder)
    assert not Path(f"/dev/shm/{mark}").exists()
    programs = lab.slurm("srun", "ps", "ax", "-o", "comm=").split()
    assert "ps" in programs
    assert "slurmctld" not in programs  # it runs outside the nodes
    assert lab.slurm("srun", "--chdir=/", "pwd") == "/"


def test_nodes_reach_each_other_by_name(lab: Lab, tmp_path: Path) -> None:
    server = (
        "import pathlib, socket; s = socket.create_server((socket.gethostname(), 29500));"
        f"pathlib.Path('{tmp_path}/up').touch(); c, who = s.accept(); print(who[0], c.recv(9).decode())"
    )
    client = "import socket; socket.create_connection(('n3', 29500), 10).sendall(b'hello')"
    waiting = subprocess.Popen(
        ["srun", "--nodelist=n3", sys.executable, "-c", server],
        env=lab.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    eventually((tmp_path / "up").exists)
    lab.slurm("srun", "--nodelist=n2", sys.executable, "-c", client)
    assert waiting.communicate(timeout=30)[0] == "10.77.0.12 hello\n"


def test_jobs_reach_a_server_of_the_test(lab: Lab) -> None:
    with lab.listen() as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            with listener.accept()[0] as client:
                client.sendall(b"served")

        answer = threading.Thread(target=serve)
        answer.start()
        client = f"import socket; print(socket.create_connection(('login', {port}), 10).recv(9).decode())"
        assert lab.slurm("srun", sys.executable, "-c", client) == "served"
        answer.join()


def test_login_runs_commands_on_the_login_node(lab: Lab, tmp_path: Path) -> None:
    command = [LAB, "--dir", lab.folder, "login", "sh", "-c"]
    show = 'cat; hostname; pwd; echo "$PATH"; env | grep ^SLURM_; squeue --noheader | wc -l; exit 7'
    environment = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_NTASKS": "2", "SLURM_CONF": "/nowhere"}
    done = subprocess.run(
        [*command, show],
        input="typed\n",
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    conf = f"SLURM_CONF={lab.folder}/etc/slurm.conf"
    assert done.stdout.split() == ["typed", "login", str(tmp_path), os.environ["PATH"], conf, "0"]
    died = subprocess.run([*command, "kill -TERM $$"], check=False)
    assert died.returncode == -signal.SIGTERM
    assert lab.login("no-such-command", code=127).stderr


def test_env_makes_any_shell_a_login_node(lab: Lab) -> None:
    script = (
        f'eval "$({LAB} --dir {lab.folder} env)" && srun --nodelist=n2 hostname && echo "[$SLURM_JOB_ID]"'
    )
    environment = {**os.environ, "SLURM_JOB_ID": "5"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "n2\n[]\n", done.stderr
    # Inside an allocation, where the commands already run in the lab's network.
    assert lab.slurm("salloc", "--nodelist=n4", "srun", "hostname") == "n4"


def test_requeued_job_waits_for_its_begin_time(lab: Lab, tmp_path: Path) -> None:
    job = lab.sbatch(BEAT % (tmp_path / "beats"))
    eventually(lambda: "0" in " ".join(beats(tmp_path / "beats", 0.5)))
    lab.scontrol("requeue", job)

    def state_and_reason() -> tuple[str, str]:
        fields = lab.job(job)
        return fields["JobState"], fields["Reason"]

    eventually(lambda: state_and_reason() == ("PENDING", "BeginTime"))
    eventually(lambda: lab.job(job)["JobState"] == "RUNNING", 60)
    eventually(lambda: {b.split()[1] for b in beats(tmp_path / "beats", 0.5)} == {"1"})
    assert lab.job(job)["Restarts"] == "1"


@pytest.mark.nightly
def test_crash_kills_a_nodes_processes_and_cut_only_disconnects_it(lab: Lab, tmp_path: Path) -> None:
    crashed, cut = tmp_path / "crashed", tmp_path / "cut"
    first = lab.sbatch(BEAT % crashed, "--nodelist=n1")
    second = lab.sbatch(BEAT % cut, "--nodelist=n2")
    lost = lab.sbatch("sleep 1000", "--nodelist=n1", "--no-requeue")
    eventually(lambda: beats(crashed, 0.5) == {"n1 0"} and beats(cut, 0.5) == {"n2 0"})

    lab.crash("n1")
    lab.cut("n2")
    assert beats(crashed) == set()
    assert beats(cut) == {"n2 0"}
    lab.wait_until_down("n1")
    lab.wait_until_down("n2")
    status = lab.command("status", code=1).stdout
    assert "(crashed)" in status
    assert "(cut)" in status
    eventually(lambda: lab.job(lost)["JobState"] == "NODE_FAIL")
    eventually(lambda: lab.final_state(lost) == "NODE_FAIL")

    # The second copy starts elsewhere while the first still writes.
    lab.scontrol("update", f"jobid={second}", "reqnodelist=n3")
    eventually(lambda: beats(cut, 1) == {"n2 0", "n3 1"}, 60)

    lab.revive("n1")
    lab.reconnect("n2")
    eventually(lambda: all(not lab.node(n).startswith("down") for n in NODES), 60)
    eventually(lambda: beats(crashed, 0.5) == {"n1 1"}, 60)
    eventually(lambda: beats(cut, 0.5) == {"n3 1"}, 60)  # slurmd ends what it should not run
    assert lab.job(first)["Restarts"] == "1"
    lab.command("status")


@pytest.mark.nightly
def test_sacct_reports_how_jobs_ended(lab: Lab) -> None:
    slow = lab.sbatch("sleep 1000", "--time=1")
    low = lab.sbatch("sleep 1000", "--partition=low", "--nodelist=n4", "--exclusive", "--no-requeue")
    cancelled = lab.sbatch("sleep 1000")
    failed, good = lab.sbatch("exit 3"), lab.sbatch("true")
    eventually(lambda: lab.job(low)["JobState"] == lab.job(cancelled)["JobState"] == "RUNNING")
    lab.slurm("scancel", cancelled)
    lab.sbatch("sleep 1", "--partition=high", "--nodelist=n4", "--exclusive")
    for job, state in (
        (good, "COMPLETED"),
        (failed, "FAILED"),
        (cancelled, "CANCELLED"),
        (low, "PREEMPTED"),
        (slow, "TIMEOUT"),
    ):
        eventually(lambda job=job, state=state: lab.final_state(job) == state, 150)
    codes = lab.slurm("sacct", "--noheader", "--allocations", f"--jobs={failed}", "--format=ExitCode")
    assert codes == "3:0"


def test_up_restarts_killed_daemons(folder: Path) -> None:
    lab = Lab(folder)
    job = lab.sbatch("true", "--hold")
    for process in processes(folder, "slurmctld", "slurmdbd", "mariadbd"):
        process.kill()
    eventually(lambda: lab.command("status", code=None).stdout.count("has ended") == 3)
    lab.command("up")
    assert lab.job(job)["JobState"] == "PENDING"
    lab.scontrol("release", job)
    eventually(lambda: lab.final_state(job) == "COMPLETED", 60)


def test_two_labs_run_side_by_side(lab: Lab, folder: Path) -> None:
    other = Lab(folder, "MaxArraySize=9")
    job, other_job = lab.sbatch("sleep 1000"), other.sbatch("sleep 1000")
    assert int(other_job) == json.loads((folder / "first-job.json").read_text()) - 10_000
    eventually(lambda: lab.job(job)["JobState"] == other.job(other_job)["JobState"] == "RUNNING")
    assert len(lab.slurm("squeue", "--noheader").splitlines()) == 1
    assert "MaxArraySize            = 9" in other.scontrol("show", "config")
    other.crash("n1")
    assert lab.slurm("srun", "--nodelist=n1", "hostname") == "n1"

    session = subprocess.Popen(
        [LAB, "--dir", folder, "login", "sleep", "1000"],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup would be inherited
    )
    eventually(lambda: session.pid in [p.pid for p in processes(folder, "sleep")])
    other.command("down")
    assert session.wait(30) == -signal.SIGHUP
    eventually(lambda: processes(folder) == [])
    assert other.command("status", code=3).stdout.startswith("no lab runs")
    assert "lab is down" in subprocess.run(["squeue"], env=other.env, capture_output=True, text=True).stderr
    assert lab.job(job)["JobState"] == "RUNNING"


def test_job_ids_of_a_new_lab_do_not_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(LAB.parent)
    from files import Folder

    first, second = (Folder(tmp_path)._first_job() for _ in range(2))
    assert second - first >= 10_000


def test_files_of_a_folder_without_a_lab_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(LAB.parent)
    from files import Folder

    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run/mine").touch()
    assert subprocess.run([LAB, "--dir", tmp_path, "down"], check=False).returncode == 0
    with pytest.raises(FileExistsError, match="/run is not of a lab: choose another folder"):
        Folder(tmp_path).make()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "mine"]
    Folder(tmp_path / "lab").make()
    Folder(tmp_path / "lab").make()


def test_lab_outlives_its_terminal(folder: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(LAB, [str(LAB), "--dir", str(folder), "up"])
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while os.read(terminal, 4096):
            pass
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 2:
        pytest.skip("no lab can be started here")
    assert code == 0
    assert (
        subprocess.run([LAB, "--dir", folder, "status"], stdout=subprocess.DEVNULL, check=False).returncode
        == 0
    )


@pytest.mark.nightly
def test_lab_ends_with_its_owner_or_its_first_process(lab: Lab, folder: Path) -> None:
    owner = subprocess.Popen(["sleep", "1000"])
    up = [LAB, "--dir", folder, "up"]
    subprocess.run([*up, f"--end-with={owner.pid}"], check=True)
    assert processes(folder)
    owner.kill()
    owner.wait()
    eventually(lambda: processes(folder) == [])

    subprocess.run(up, check=True)
    (first,) = [p for p in processes(folder) if p.cmdline()[0] == "unshare"]
    first.children()[0].kill()  # as in a power failure: no orderly shutdown
    eventually(lambda: processes(folder) == [])
    subprocess.run(up, check=True)
    assert subprocess.run([LAB, "--dir", folder, "down"], check=False).returncode == 0
    eventually(lambda: processes(folder) == [])


def test_missing_packages_are_named_with_the_install_command(lab: Lab, folder: Path) -> None:
    hide = "mount --bind /dev/null /usr/sbin/slurmd && mount --bind /dev/null $(readlink -f /usr/sbin/munged)"
    script = f"{hide} && exec {LAB} --dir {folder} up"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: packages are missing: apt-get install --no-install-recommends munge slurmd\n"
    )


def test_lab_needs_no_root(lab: Lab, folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("every test of this file already runs without root")
    user = pwd.getpwnam("nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    become = [
        "setpriv",
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
        "env",
        "HOME=/tmp",
    ]
    lab_command = [*become, "/usr/bin/python3", str(LAB), "--dir", str(folder)]
    up = subprocess.run([*lab_command, "up"], capture_output=True, text=True, cwd="/", check=False)
    if up.returncode == 2 or "Permission denied" in up.stderr:
        pytest.skip(f"another user cannot start a lab: {up.stderr.strip()}")
    assert up.returncode == 0, up.stderr
    show = "hostname; id -un; grep CapEff /proc/self/status; touch /scratch/mine"
    done = subprocess.run(
        [*lab_command, "login", "srun", "--nodes=1", "sh", "-c", show],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.stdout.split() == ["n1", "nobody", "CapEff:", "0000000000000000"], done.stderr
    assert (folder / "nodes/n1/scratch/mine").stat().st_uid == user.pw_uid
    subprocess.run([*lab_command, "cut", "n1"], check=True, cwd="/")
    subprocess.run([*lab_command, "crash", "n2"], check=True, cwd="/")
    subprocess.run([*lab_command, "up"], check=True, cwd="/")  # reconnects n1 and restarts n2
    subprocess.run([*lab_command, "down"], check=True, cwd="/")
    eventually(lambda: processes(folder) == [])
