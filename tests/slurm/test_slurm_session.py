"""A session on a real Slurm: a browser runs its notebook through a tunnel, and other users have no access."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from command_line import eventually
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from lab import LAB, Lab, LabDoor
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from servers import SSHD, keys_for_ssh

ROOT = Path(__file__).resolve().parents[2]
SESSION = (
    "+stage=session",
    "dataset=digits",
    "session.datastore=digits",
    "session.name=ana",
    "cluster.login=there",
)


@pytest.fixture(autouse=True)
def _reset_lab_afterwards() -> None:
    """Override: `workspace` resets the lab here, since the last tests share a workspace and its session."""


@contextlib.contextmanager
def workspace(lab: Lab) -> Iterator[LabDoor]:
    """Create a workspace that other users can read."""
    folder = Path(tempfile.mkdtemp(prefix="session-"))
    folder.chmod(0o755)
    cli = LabDoor(folder / "workspace", lab)
    yield cli
    cli.close()
    lab.reset()
    shutil.rmtree(folder)


@pytest.fixture
def session(lab: Lab) -> Iterator[LabDoor]:
    with workspace(lab) as cli:
        yield cli


@pytest.fixture(scope="module")
def shared(site: LabDoor, lab: Lab) -> Iterator[LabDoor]:
    """A session that listens at its node's address, since the node has no sshd."""
    with workspace(lab) as cli:
        submit_session(cli, site)
        yield cli


def submit_session(cli: LabDoor, site: LabDoor, *settings: str) -> Path:
    """Submit a session and return its run folder."""
    cli(*SESSION, f"datastore.url={site.workspace}/datastores", *settings)
    return Path(cli.jobs()[0]["dir"])


def parse_connect(output: str) -> dict[str, str]:
    """Return the lines that connect prints, by their first word: shell, tunnel, browser …"""
    return dict(re.findall(r"^  (\S+) +(.*)$", output, re.MULTILINE))


class Tunnel:
    """The tunnel command that connect prints, run on a machine that reaches only the login node."""

    def __init__(self, config: Path, line: str) -> None:
        words = line.split()
        assert words[:3] == ["ssh", "-N", "-L"]
        self.port = int(words[3].partition(":")[0])
        self.process = subprocess.Popen(
            ["ssh", "-F", str(config), "-o", "ExitOnForwardFailure=yes", *words[1:]]
        )
        eventually(self.is_open)

    def is_open(self) -> bool:
        assert self.process.poll() is None, "the tunnel has ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def client(lab: Lab, folder: Path) -> Path:
    """Return the ~/.ssh/config of a client machine: keys, and a login node with the name `there`."""
    if SSHD is None:
        pytest.skip("sshd is missing: apt-get install openssh-server")
    # This machine has no route into the lab, so sshd runs over a pipe.
    inside = f"{LAB} --dir {lab.folder} login {SSHD} -i -f {folder}/sshd_config"
    keys_for_ssh(folder, "", f" ProxyCommand {inside}\n")
    config = folder / "ssh_config"
    keys = [
        line for line in config.read_text().splitlines() if not line.startswith(("Host", " ProxyCommand"))
    ]
    config.write_text("\n".join([config.read_text(), "Host n*", *keys, ""]))
    return config


def get(url: str, token: str) -> Any:
    """Return the JSON at `url`, or the HTTP status of an error."""
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code


def test_session_is_reached_by_ssh_and_again_after_a_preemption(
    session: LabDoor, site: LabDoor, lab: Lab, tmp_path: Path
) -> None:
    """Started by the template; by a tunnel to its socket, as VSCode does, and once more after a requeue."""
    if os.geteuid() != 0:
        pytest.skip("only root may listen at a node's port 22")
    config = client(lab, tmp_path)
    lab.sbatch(f"exec {SSHD} -D -f {tmp_path}/sshd_config", "--partition=high", "--nodelist=n1", "--mem=100")
    listens = ("bash", "-c", "true < /dev/tcp/n1/22")
    eventually(lambda: lab.login(*listens, code=None).returncode == 0)
    options = ("--gpus-per-node=0", "--cpus-per-task=2", "--mem=1G", "--time=10", "--signal=USR2@30")
    where = ("--partition=low", "--nodelist=n1", "--output=out")
    settings = (*SESSION[1:], f"datastore.url={site.workspace}/datastores")
    done = subprocess.run(
        ["sbatch", "--parsable", *where, *options, ROOT / "slurm/session.sbatch", *settings],
        env={**session.env, "PATH": f"{Path(sys.executable).parent}:{session.env['PATH']}"},
        cwd=session.cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    job = done.stdout.strip()
    eventually(lambda: bool(session.runs()), 120)
    eventually(lambda: session.states() == ["running"], 120)
    tokens = []
    for start in range(2):
        shown = session("connect", "ana").stdout
        ways = parse_connect(shown)
        assert ways["shell"] == f"srun --overlap --jobid {job} --pty bash"
        assert re.fullmatch(
            r"ssh -N -L \d+:/tmp/hpc_imagenet-session-\w+/jupyter -J \S+@there \S+@n1", ways["tunnel"]
        )
        # The allocation ends before session.time, and the session ends a little earlier.
        assert re.match(r"this session ends in [678] minutes", ways["warning"])
        base, _, token = ways["browser"].partition("/lab?token=")
        tokens.append(token)
        tunnel = Tunnel(config, ways["tunnel"])
        try:
            names = {entry["name"] for entry in get(f"{base}/api/contents", token)["content"]}
            assert get(f"{base}/api/contents", tokens[0][::-1]) == 403
            if start:
                assert get(f"{base}/api/contents", tokens[0]) == 403
        finally:
            tunnel.close()
        assert names >= {"prototype.ipynb", "datastore"} | ({"mine.txt"} if start else set())
        assert ("Slurm has restarted it once" in shown) == bool(start)
        assert session.jobs()[0]["requeued"] == start
        if not start:
            use_ssh(config, ways)
            # All CPUs of the node but the session's two, so that the session is preempted.
            lab.sbatch("sleep 1", "--partition=high", "--nodelist=n1", "--cpus-per-task=6", "--mem=100")
            eventually(lambda: lab.job(job)["Restarts"] == "1", 120)
    assert len(set(tokens)) == 2
    assert "token=" not in (session.cwd / "out").read_text()
    session("pause", "ana")


def use_ssh(config: Path, ways: dict[str, str]) -> None:
    """Open a shell on the node with the printed lines for ~/.ssh/config, as VSCode does."""
    line = re.fullmatch(
        r"Host (\S+), with ProxyJump (\S+) and User (\S+): once, for VSCode", ways["~/.ssh/config"]
    )
    assert line
    with config.open("a") as file:
        file.write("Host {}\n ProxyJump {}\n User {}\n".format(*line.groups()))
    *_, host, folder = ways["VSCode"].split()
    assert ways["VSCode"] == f"code --remote {host} {folder}"
    shell = subprocess.run(
        ["ssh", "-T", "-F", config, host.removeprefix("ssh-remote+"), "bash"],
        input=f"hostname; cd {folder} && ls; echo kept > mine.txt",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert shell.stdout.split()[0] == "n1"
    assert "prototype.ipynb" in shell.stdout


def test_connect_to_a_queued_session_prints_reason_and_expected_start(
    session: LabDoor, site: LabDoor, lab: Lab
) -> None:
    lab.sbatch("sleep 600", "--nodes=4", "--exclusive", "--time=5")
    submit_session(session, site)
    command = [sys.executable, "-m", "hpc_imagenet", "connect", "session-ana"]
    with subprocess.Popen(
        command, env=session.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as connect:
        assert connect.stderr
        line = connect.stderr.readline()
        while "expects it to start" not in line:
            assert line.startswith("queued"), line
            line = connect.stderr.readline()
        assert re.match(r"queued: \w+; Slurm expects it to start at \d{4}-\d\d-\d\d \d\d:\d\d", line)
        session("pause", "session-ana")
        assert connect.wait(60) == 2
        assert "paused" in connect.stderr.read()


OTHER_USER = """
import contextlib, json, os, socket, ssl, sys, urllib.error, urllib.request
run, attempt = sys.argv[1:]
record = json.load(open(f"{attempt}/session.json"))  # it contains no secret
got = {"uid": os.getuid(), "host": socket.gethostname()}
def folders():
    for each in os.listdir("/tmp"):
        with contextlib.suppress(FileNotFoundError):  # of another session, which has just ended
            if each.startswith("hpc_imagenet-") and os.stat(f"/tmp/{each}").st_uid != os.getuid():
                os.listdir(f"/tmp/{each}")
for name in ("token", "folders"):
    try:
        got[name] = open(f"{run}/token").read() if name == "token" else folders()
    except OSError as error:
        got[name] = type(error).__name__
context = ssl._create_unverified_context()
for path in ("/api/contents", "/api/kernels", "/files/prototype.ipynb", "/terminals/websocket/1"):
    try:
        url = f"https://localhost:{record['port']}{path}"
        answer = urllib.request.urlopen(url, context=context, timeout=20)
        got[path] = "login" if "/login" in answer.url else answer.status
    except urllib.error.HTTPError as error:
        got[path] = error.code
with open("/proc/net/tcp") as table:
    rows = [line.split() for line in table.readlines()[1:]]
got["listens"] = [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A"]
print(json.dumps(got))
"""


def test_another_user_of_the_node_has_no_access(shared: LabDoor, lab: Lab) -> None:
    if os.geteuid() != 0 or not Path("/usr/bin/python3").exists():
        pytest.skip("only root can act as another user")
    folder = Path(shared.jobs()[0]["dir"])
    ways = parse_connect(shared("connect", "ana").stdout)
    job = ways["shell"].split()[3]
    command = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
        OTHER_USER,
    )
    step = ("srun", "--overlap", f"--jobid={job}", "--chdir=/")
    got = json.loads(lab.login(*step, *command, str(folder), str(folder / "attempts/1")).stdout)
    port = int(ways["browser"].split("/")[2].partition(":")[2])
    assert got["uid"] == 65534
    assert got["host"] == json.loads((folder / "attempts/1/session.json").read_text())["host"]
    assert port in got.pop("listens")
    assert got["token"] == got["folders"] == "PermissionError"
    assert got["/api/contents"] == got["/api/kernels"] == got["/terminals/websocket/1"] == 403
    assert got["/files/prototype.ipynb"] in ("login", 403)


def shorten(path: Path) -> None:
    """Shorten a notebook: seconds of training, and a sweep of one epoch with a cluster file of the user."""
    own = path.parent / "my-conf/cluster/own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [lab, _self_]\n")
    text = path.read_text()
    for long, short in (
        ('CLUSTER = \\"auto\\"', 'CLUSTER = \\"own\\"'),
        ("CONFIG_DIR = None", f'CONFIG_DIR = \\"{own.parents[1]}\\"'),
        ("seconds=10", "seconds=1"),
        ("MINUTES = 1", "MINUTES = 0.03"),
        ("model=resnet18,mobilenet_v3_small", "model=mobilenet_v3_small"),
        ('\\"seed=0\\"', '\\"seed=0\\", \\"recipe.epochs=1\\"'),
    ):
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    path.write_text(text)


def click(page: Chrome, selector: str, text: str = "") -> bool:
    """Click the first displayed match; False if there is none, which happens while Lab loads."""
    with contextlib.suppress(WebDriverException):
        for element in page.find_elements(By.CSS_SELECTOR, selector):
            if element.is_displayed() and text in element.text:
                element.click()
                return True
    return False


def run_all(page: Chrome) -> bool:
    """Click Run All; False if its menu was only opened or closed, so call it again."""
    item = "[data-command='runmenu:run-all']:not(.lm-mod-disabled)"
    return click(page, item) or (click(page, ".lm-MenuBar-itemLabel", "Run") and click(page, item))


def outputs(page: Chrome, selector: str, attribute: str) -> list[Any]:
    """Return an attribute of all matching outputs in one script, since they change meanwhile."""
    script = "return [...document.querySelectorAll(arguments[0])].map(each => each[arguments[1]])"
    found: list[Any] = page.execute_script(script, f".jp-OutputArea-output{selector}", attribute)
    return found


def output_text(page: Chrome) -> str:
    return "\n".join(outputs(page, "", "innerText"))


def connected(page: Chrome) -> bool:
    """Whether the notebook is connected to its kernel; if run earlier, Lab prompts for a kernel."""
    script = "return fetch('/api/kernels').then(answer => answer.json())"
    return [each["connections"] for each in page.execute_script(script)] == [1]


def test_browser_runs_the_notebook_through_a_tunnel(shared: LabDoor, lab: Lab, tmp_path: Path) -> None:
    folder = Path(shared.jobs()[0]["dir"])
    ways = parse_connect(shared("connect", "ana").stdout)
    shorten(folder / "notebooks/prototype.ipynb")
    tunnel = Tunnel(client(lab, tmp_path), ways["tunnel"])
    try:
        shown = ssl.get_server_certificate(("localhost", tunnel.port))
        certificate = x509.load_pem_x509_certificate(shown.encode())
        assert ways["certificate"].endswith(certificate.fingerprint(hashes.SHA256()).hex(":").upper())
        key = certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        pinned = base64.b64encode(hashlib.sha256(key).digest()).decode()
        with chromium(tmp_path / "page.png", f"--ignore-certificate-errors-spki-list={pinned}") as page:
            page.get(ways["browser"][:-8])  # without the last eight digits of the token
            assert page.find_elements(By.CSS_SELECTOR, "input[type=password]")
            assert not page.find_elements(By.CSS_SELECTOR, "#jp-top-panel, .jp-LabShell")
            page.get(ways["browser"].replace("/lab?", "/lab/tree/prototype.ipynb?"))
            eventually(lambda: connected(page), 120)
            eventually(lambda: run_all(page), 120)
            # The last cell prints the state of the sweep, which the notebook has submitted.
            done = r"mobilenet_v3_small\s+finished\s+\d+\.\d+%"
            eventually(lambda: bool(re.search(done, output_text(page))), 240)
            text = output_text(page)
            eventually(lambda: min(outputs(page, " img", "naturalWidth"), default=0) > 100)
            assert not outputs(page, "[data-mime-type='application/vnd.jupyter.error']", "innerText")
        assert "train: 1,437 images of 10 classes" in text
        assert "images/s with" in text
        assert "top-1" in text
    finally:
        tunnel.close()
    # The session keeps running without the tunnel, and the sweep is a normal run.
    time.sleep(1)
    states = {row["stage"]: row["state"] for row in shared.jobs()}
    assert states == {"session": "running", "train": "finished"}
    token = (folder / "token").read_text()
    assert token not in shared("logs", "session-ana").stdout
    assert token not in shared("jobs", "--json").stdout
    assert token not in (folder / "config.yaml").read_text()
    assert shared("pause", "session-ana").stdout.startswith("paused")
    eventually(lambda: not lab.slurm("squeue", "--noheader"), 60)
    assert shared.jobs()[0]["reason"] == "paused: resume restarts it"
