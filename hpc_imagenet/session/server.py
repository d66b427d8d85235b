"""Jupyter's server as a process: what it is told, whether it answers, what it does.

Nothing secret is in its arguments, its environment or what it prints: it reads the token from a file. What
belongs to this start lies in a folder of mode 700 on the node: its configuration, its certificate, and the
sockets by which it speaks with the kernels. By default these would be ports, where every user of the node
could listen to what the cells print.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.io.tempdir import NodeTempDir
from hpc_imagenet.session import credentials

TOP = Path("/tmp")  # not $TMPDIR: the address of a socket has at most 107 bytes
_STARTS = (
    120.0  # s that it may take to answer; on a cold network file system Python's imports take their time
)
_ANSWERS = 10.0  # s
_ENDS = 10.0  # s between SIGTERM and SIGKILL
# Of the job this process is: a kernel that trains, or sends jobs, would take itself for a task of it.
_JOBS = ("SLURM", "SRUN_", "SBATCH_", "SUBMITIT_", "PMI", "HPC_IMAGENET_CPUS")
_NEWS = "@jupyterlab/apputils-extension:announcements"  # asks whether to look for news
_PORTS = 10_000, 20_000  # the first, and how many: below those that the kernel gives away


class JupyterServer:
    """Jupyter Lab over one folder.

    Args:
        run_folder: where the token is, and what it keeps from one start to the next.
        notebooks: the folder it shows.
        way: loopback, socket or address.
        port: where it listens; None: a free one.
        hours: that it may run.

    Attributes:
        port: where it listens; with a socket, a number for the other side of a tunnel.
        socket: its path, if it listens there.
        fingerprint: of its certificate, if it has one.
    """

    def __init__(self, run_folder: Path, notebooks: Path, way: str, port: int | None, hours: float) -> None:
        self.run_folder, self.notebooks, self.way = run_folder, notebooks, way
        if port and way != "socket":
            _refuse_taken(port, "" if way == "address" else "127.0.0.1")
        self.port = port or _free_port("" if way == "address" else "127.0.0.1")
        self._temporary = NodeTempDir("session", TOP)
        self.folder = self._temporary.folder
        self.socket = str(self.folder / "jupyter") if way == "socket" else None
        self.fingerprint: str | None = None
        self._token = credentials.new_token(run_folder)
        self._tls: ssl.SSLContext | None = None
        settings: dict[str, Any] = {
            "ServerApp.root_dir": str(notebooks),
            "ServerApp.open_browser": False,
            "ServerApp.default_url": "/lab",
            "ServerApp.allow_root": os.geteuid() == 0,
            "ServerApp.port_retries": 0 if port else 50,
            "ServerApp.terminado_settings": {"shell_command": [os.environ.get("SHELL") or "/bin/bash"]},
            "KernelManager.transport": "ipc",
            "NotebookNotary.db_file": ":memory:",  # SQLite and network file systems do not agree
            "LabApp.news_url": None,  # nodes reach no news, and need no updates
            "LabApp.extension_manager": "readonly",
            "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        }
        if self.socket:
            settings |= {"ServerApp.sock": self.socket, "ServerApp.sock_mode": "0600"}
        else:
            settings |= {"ServerApp.ip": "127.0.0.1", "ServerApp.port": self.port}
        if way == "address":
            certificate, key, self.fingerprint = credentials.certificate(self.folder, hours)
            settings |= {
                "ServerApp.ip": "0.0.0.0",
                "ServerApp.certfile": str(certificate),
                "ServerApp.keyfile": str(key),
                "ServerApp.allow_remote_access": False,  # browsers come through a tunnel, so to localhost
            }
            self._tls = ssl.create_default_context(cafile=str(certificate))
        self._process: subprocess.Popen[bytes] | None = None
        self._lives, self._ends = os.pipe()
        (self.folder / "server.py").write_text(
            _configuration(settings, run_folder / credentials.TOKEN, self._lives)
        )

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it and wait until it answers.

        Args:
            environment: variables beside this process's own.

        Raises:
            UserError: it did not come to that; its own words are in the log.
        """
        kept = self.run_folder / "jupyter"
        env = {k: v for k, v in os.environ.items() if not k.startswith(_JOBS) or k == "SLURM_CONF"}
        page = kept / "config" / "labconfig" / "page_config.json"
        if not page.exists():
            page.parent.mkdir(parents=True, exist_ok=True)
            write_json(page, {"disabledExtensions": {_NEWS: True}})
        env |= {
            "JUPYTER_CONFIG_DIR": str(kept / "config"),
            "JUPYTER_DATA_DIR": str(kept / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.folder / "runtime"),
            "IPYTHONDIR": str(self.folder / "ipython"),  # its history is SQLite
            **environment,
        }
        for name in ("JUPYTER_TOKEN", "JUPYTER_TOKEN_FILE", "JUPYTER_PORT", "JUPYTER_PREFER_ENV_PATH"):
            env.pop(name, None)
        command = [sys.executable, "-m", "jupyter_server", "--config", str(self.folder / "server.py")]
        self._process = subprocess.Popen(
            command, env=env, cwd=self.notebooks, stdin=subprocess.DEVNULL, pass_fds=[self._lives]
        )
        os.close(self._lives)
        end = time.monotonic() + _STARTS
        while not self._answers():
            if self._process.poll() is not None:
                raise UserError(f"Jupyter ended with exit code {self._process.returncode} before it answered")
            if time.monotonic() > end:
                raise UserError(f"Jupyter did not answer within {_STARTS:.0f} s")
            time.sleep(0.1)

    def ended(self) -> int | None:
        """Return the exit code of its process, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def active(self) -> float | None:
        """Return when somebody last did something, s since 1970; None: right now.

        A cell that runs counts, and one that did; so do terminals and notebooks that are saved. An open tab
        does not: it asks for news by itself.
        """
        kernels, terminals = self.ask("/api/kernels"), self.ask("/api/terminals")
        if any(kernel["execution_state"] == "busy" for kernel in kernels):
            return None
        moments = [_moment(each["last_activity"]) for each in [*kernels, *terminals]]
        return max([*moments, _saved(self.notebooks)])

    def ask(self, path: str) -> Any:
        """Return the JSON of a GET.

        Raises:
            OSError: it does not answer, or not as it should.
        """
        connection = self._connection()
        try:
            connection.request("GET", path, headers={"Authorization": f"token {self._token}"})
            answer = connection.getresponse()
            data = answer.read()
            if answer.status != 200:
                raise OSError(f"{path}: {answer.status} {answer.reason}")
            return json.loads(data)
        except http.client.HTTPException as error:
            raise OSError(f"{path}: {error!r}") from None
        finally:
            connection.close()

    def tell(self, line: str) -> None:
        """Write a line into every terminal that is open in it."""
        assert self._process is not None
        terminals: set[str] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    terminals.add(child.terminal() or os.devnull)
        for terminal in terminals:
            with contextlib.suppress(OSError), open(terminal, "wb", buffering=0) as screen:  # noqa: PTH123
                screen.write(f"\r\n{line}\r\n".encode())

    def close(self) -> None:
        """End it, with its kernels and terminals, and remove what was of this start."""
        if self._process is not None:
            children = []
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._process.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_ENDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        with contextlib.suppress(OSError):
            os.close(self._ends)
        self._temporary.close()
        (self.run_folder / credentials.TOKEN).unlink(missing_ok=True)

    def _answers(self) -> bool:
        # Another server at our port would refuse our token; then Jupyter has moved on to the next.
        for known in (self.folder / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):
                self.port = json.loads(known.read_text())["port"] or self.port
                with contextlib.suppress(OSError):
                    self.ask("/api/status")
                    return True
        return False

    def _connection(self) -> http.client.HTTPConnection:
        if self.socket:
            return _OverSocket(self.socket)
        if self._tls:
            return http.client.HTTPSConnection("localhost", self.port, timeout=_ANSWERS, context=self._tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWERS)


class _OverSocket(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ANSWERS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_ANSWERS)
        self.sock.connect(self._path)


def _configuration(settings: Mapping[str, Any], token: Path, lives: int) -> str:
    """Return a configuration file of Jupyter's, which is Python."""
    lines = [
        "from pathlib import Path",
        "from hpc_imagenet.session.exit_with_parent import end_with",
        "c = get_config()",
    ]
    lines += [f"c.{name} = {value!r}" for name, value in settings.items()]
    lines += [f"c.IdentityProvider.token = Path({str(token)!r}).read_text()", f"end_with({lives})"]
    return "\n".join(lines) + "\n"


def _free_port(host: str) -> int:
    """Return a port that is free now; should it be taken until Jupyter comes, that looks further."""
    first, count = _PORTS
    begin = int.from_bytes(os.urandom(4), "big")
    for step in range(count):
        port = first + (begin + step) % count
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    raise UserError(f"no port is free on {socket.gethostname()}: session.listen=socket needs none")


def _refuse_taken(port: int, host: str) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Jupyter does
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"session.port={port} on {socket.gethostname()}: {error.strerror}; "
            "without session.port a free one is taken"
        ) from None


def _saved(folder: Path) -> float:
    """Return when a notebook in a folder or below was last saved, s since 1970; 0 without one.

    Links are not followed, which lead to datasets, nor hidden folders, in which Jupyter keeps checkpoints.
    """
    newest = 0.0
    for top, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if name.endswith(".ipynb"):
                with contextlib.suppress(OSError):  # it has another name, or is gone
                    newest = max(newest, Path(top, name).stat().st_mtime)
    return newest


def _moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
