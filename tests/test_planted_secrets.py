"""Secrets in the environment and in files of the user: none is written, printed or passed on.

All stages run with them on a tiny dataset: logins of HTTP and S3 servers are used, a tracker and a
notification are on, and some jobs fail. Then every file below the workspace, the home and the temporary
folder, all output, and the command lines and environments that a thread has sampled are searched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli, eventually
from servers import KEY, SECRET, bucket_client, credentials, moto

from hpc_imagenet.data.images import shard_transform
from hpc_imagenet.datastore.backends.ssh_connection import SshConnection
from hpc_imagenet.demo import digits
from hpc_imagenet.demo.http_server import serving

pytestmark = pytest.mark.slow

NEED_NONE = ("jpegtran", "rsync", "ssh", "git", "tensorboard")  # programs that need no secret
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
    "GITHUB_TOKEN",
    "HPC_IMAGENET_COOKIE",
    "SSHPASS",
)


class Planted:
    """Secrets by the place where they are kept, and a thread that samples all processes of the machine."""

    def __init__(self, cli: Cli, home: Path) -> None:
        self.values = {name: secrets.token_hex(20) for name in (*VARIABLES, "header", "netrc", "aws file")}
        self.values["notification"] = secrets.token_hex(20)
        self.files = [home / ".netrc", home / ".aws/credentials", home / "login"]
        self.output: list[str] = []
        self.hits: set[str] = set()
        (home / ".aws").mkdir(parents=True)
        texts = (
            f"machine 127.0.0.2 login me password {self.values['netrc']}\n",
            f"[other]\naws_access_key_id=A\naws_secret_access_key={self.values['aws file']}\n",
            f"Authorization: Bearer {self.values['header']}\n",
        )
        for file, text in zip(self.files, texts, strict=True):
            file.write_text(text)
            file.chmod(0o600)
        cli.env |= {name: self.values[name] for name in VARIABLES}
        cli.env |= {
            "HOME": str(home),
            "NOTIFY_URL": f"json://127.0.0.1:1/{self.values['notification']}",  # it cannot be reached
            "WANDB_MODE": "offline",
            "TMPDIR": str(home / "tmp"),
        }
        (home / "tmp").mkdir()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Look at the command lines of all processes, and at the environments of some, until the end."""
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    line = (process / "cmdline").read_bytes()
                    self._search(line, f"the command line {line[:200]!r}")
                    name = Path(os.fsdecode(line.split(b"\0")[0])).name
                    if name in NEED_NONE:
                        self._search((process / "environ").read_bytes(), f"the environment of {name}")

    def _search(self, data: bytes, place: str) -> None:
        self.hits |= {f"{name} in {place}" for name, value in self.values.items() if value.encode() in data}

    def search_files(self, *folders: Path) -> int:
        """Search all files, except where the secrets were put; return how many."""
        count = 0
        for path in (path for folder in folders for path in folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path not in self.files:
                self._search(path.read_bytes(), str(path))
                count += 1
        return count


@pytest.mark.nightly  # minutes: all stages
def test_no_secret_is_written_printed_or_passed_on(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    with moto() as endpoint, contextlib.ExitStack() as stack:
        credentials(monkeypatch, endpoint)
        bucket_client(endpoint).create_bucket(Bucket="bucket")  # type: ignore[attr-defined]
        names = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED", "AWS_ACCESS_KEY_ID")
        cli.env |= {name: os.environ[name] for name in names}
        planted = Planted(cli, home)
        digits.write_digits(tmp_path / "digits")
        url = stack.enter_context(serving(tmp_path / "digits"))
        stack.enter_context(planted.sampling())

        def run(*words: str, code: int | None = 0) -> None:
            done = cli.process(*words, code=code)
            planted.output += [done.stdout, done.stderr]

        def look(*words: str) -> None:  # within this process, which is faster
            done = cli(*words)
            planted.output += [done.stdout, done.stderr]

        common = ("cluster=local", "notify=NOTIFY_URL", "wait=true", f"download.login={home / 'login'}")
        short = ("model=squeezenet1_1", "recipe.epochs=1", "tracker=wandb", "datastore.url=s3://bucket")
        process = (
            "process.layout=shards",
            "process.normalise=true",
            f"cluster.scratch={tmp_path / 'scratch'}",
        )
        run("+stage=pipeline", "dataset=digits", f"dataset.source={url}", *common, *short, *process)
        training = next(row["run"] for row in cli.jobs() if row["stage"] == "train")
        run("evaluate", training, "cluster=local", "wait=true")
        run("export", training, str(tmp_path / "network"))
        # Failures: a server, a bucket and a datastore that do not exist.
        missing = ("dataset=ilsvrc", "dataset.name=a", "download.retries=0")
        run("+stage=download", *missing, f"dataset.source={url}/missing", *common, code=1)
        run("+stage=upload", "dataset=digits", f"dataset.source={url}", *common, *short[:-1], *process,
            "datastore.url=s3://missing", code=None)  # fmt: skip
        run("+stage=session", "cluster=local", "notify=NOTIFY_URL")
        (session,) = cli.workspace.glob("runs/*-session*")
        eventually((session / "attempts/1/session.json").exists, 120)
        run("cancel", session.name)
        for words in (("jobs", "--json"), ("report",), ("report", "--html", str(tmp_path / "page.html"))):
            look(*words)
        for row in cli.jobs():
            look("logs", row["run"])
            look("show", row["run"])
    assert KEY != planted.values["AWS_SECRET_ACCESS_KEY"] != SECRET
    assert planted.search_files(cli.workspace, home, tmp_path / "network", tmp_path / "scratch") > 60
    planted._search("\n".join([*planted.output, (tmp_path / "page.html").read_text()]).encode(), "the output")
    assert not planted.hits, "\n".join(sorted(planted.hits))


def test_converters_and_rsync_get_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs on the PATH that write down their environment."""
    for name in ("jpegtran", "rsync", "ssh"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nenv > {tmp_path}/{name}.env\nprintf reply-of-hpc_imagenet:\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name in VARIABLES:
        monkeypatch.setenv(name, "s3cr3t")
    shard_transform._jpegtran(b"")
    there = SshConnection("there:/data")
    there.run("true")
    there.rsync("sending", ["--version"])
    for name in ("jpegtran", "rsync", "ssh"):
        text = (tmp_path / f"{name}.env").read_text()
        assert f"PATH={program.parent}" in text
        assert "s3cr3t" not in text


def test_the_search_finds_what_is_there(cli: Cli, tmp_path: Path) -> None:
    planted = Planted(cli, tmp_path / "home")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text(f"x{planted.values['netrc']}x")
    command = ("sh", "-c", f"read line; : {planted.values['header']}")  # a shell that waits for its input
    with planted.sampling(), subprocess.Popen(command, stdin=subprocess.PIPE):
        eventually(lambda: any(hit.startswith("header in ") for hit in list(planted.hits)))
    planted.search_files(tmp_path / "there")
    assert {hit.partition(" in ")[0] for hit in planted.hits} == {"netrc", "header"}
