"""Run the Jupyter server process: configuration, start, activity and shutdown.

The server reads its token from a file, so that no secret is in its arguments, its environment or its output.
The files of one start are in a folder of mode 700 on the node: configuration, certificate, and the Unix
sockets of the kernels. Jupyter's default for kernels is TCP ports, where every user of the node could read
the output of the cells.
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
from hpc_imagenet.io.ownership import check_own
from hpc_imagenet.io.tempdir import NodeTempDir
from hpc_imagenet.session.connection import TOKEN, new_certificate, new_token

TOP = Path("/tmp")  # not $TMPDIR: the path of a Unix socket has at most 107 bytes
_START_TIMEOUT = 120.0  # s; on a cold network file system Python's imports are slow
_RESPONSE_TIMEOUT = 10.0  # s
_KILL_AFTER = 10.0  # s between SIGTERM and SIGKILL
# Prefixes of the job's variables: a kernel that trains or submits jobs must not act as a task of this job.
_JOB_VARIABLES = ("SLURM", "SRUN_", "SBATCH_", "SUBMITIT_", "PMI", "HPC_IMAGENET_CPUS")
_NEWS = "@jupyterlab/apputils-extension:announcements"  # extension that offers to fetch news
_PORTS = 10_000, 20_000  # first port and number of ports: below the kernel's ephemeral ports


class JupyterServer:
    """A Jupyter Lab server for one folder.

    Args:
        run_folder: folder with the token and the files kept between starts.
        notebooks: root folder of Jupyter.
        listen: `session.listen`, resolved: loopback, socket or address.
        port: TCP port; None: a free one.
        hours: validity of the certificate, h.

    Attributes:
        port: TCP port; of a server on a Unix socket, the local port of the tunnel.
        socket: path of the Unix socket, if `listen` is socket.
        fingerprint: SHA-256 fingerprint of the certificate, if `listen` is address.

    Raises:
        UserError: `port` is in use, or no port is free.
    """

    def __init__(
        self, run_folder: Path, notebooks: Path, listen: str, port: int | None, hours: float
    ) -> None:
        self.run_folder, self.notebooks, self.listen = run_folder, notebooks, listen
        host = "" if listen == "address" else "127.0.0.1"
        if port and listen != "socket":
            _check_port_free(port, host)
        self.port = port or _free_port(host)
        self._temporary = NodeTempDir("session", TOP)
        self.folder = self._temporary.folder
        self.socket = str(self.folder / "jupyter") if listen == "socket" else None
        self.fingerprint: str | None = None
        self._token = new_token(run_folder)
        self._tls: ssl.SSLContext | None = None
        settings: dict[str, Any] = {
            "ServerApp.root_dir": str(notebooks),
            "ServerApp.open_browser": False,
            "ServerApp.default_url": "/lab",
            "ServerApp.allow_root": os.geteuid() == 0,
            "ServerApp.port_retries": 0 if port else 50,
            "ServerApp.terminado_settings": {"shell_command": [os.environ.get("SHELL") or "/bin/bash"]},
            "KernelManager.transport": "ipc",
            "NotebookNotary.db_file": ":memory:",  # SQLite fails on network file systems
            "LabApp.news_url": None,  # nodes have no internet, and need no updates
            "LabApp.extension_manager": "readonly",
            "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        }
        if self.socket:
            settings |= {"ServerApp.sock": self.socket, "ServerApp.sock_mode": "0600"}
        else:
            settings |= {"ServerApp.ip": "127.0.0.1", "ServerApp.port": self.port}
        if listen == "address":
            certificate, key, self.fingerprint = new_certificate(self.folder, hours)
            settings |= {
                "ServerApp.ip": "0.0.0.0",
                "ServerApp.certfile": str(certificate),
                "ServerApp.keyfile": str(key),
                "ServerApp.allow_remote_access": False,  # browsers connect to localhost, through a tunnel
            }
            self._tls = ssl.create_default_context(cafile=str(certificate))
        self._process: subprocess.Popen[bytes] | None = None
        self._child_pipe, self._parent_pipe = os.pipe()  # closed when this process dies
        (self.folder / "server.py").write_text(_configuration(settings, run_folder / TOKEN, self._child_pipe))

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the server and wait until it responds.

        Args:
            environment: environment variables in addition to those of this process.

        Raises:
            UserError: the server ended or did not respond in time; its output is in the log.
        """
        persistent = self.run_folder / "jupyter"
        if persistent.exists():  # Jupyter executes the files in it that end with .py
            for path in (persistent, *persistent.rglob("*")):
                check_own(path, self.run_folder, "the session is not started")
        env = {k: v for k, v in os.environ.items() if not k.startswith(_JOB_VARIABLES) or k == "SLURM_CONF"}
        page_config = persistent / "config" / "labconfig" / "page_config.json"
        if not page_config.exists():
            page_config.parent.mkdir(parents=True, exist_ok=True)
            write_json(page_config, {"disabledExtensions": {_NEWS: True}})
        env |= {
            "JUPYTER_CONFIG_DIR": str(persistent / "config"),
            "JUPYTER_DATA_DIR": str(persistent / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.folder / "runtime"),
            "IPYTHONDIR": str(self.folder / "ipython"),  # its history is an SQLite file
            **environment,
        }
        for name in ("JUPYTER_TOKEN", "JUPYTER_TOKEN_FILE", "JUPYTER_PORT", "JUPYTER_PREFER_ENV_PATH"):
            env.pop(name, None)
        command = [sys.executable, "-m", "jupyter_server", "--config", str(self.folder / "server.py")]
        self._process = subprocess.Popen(
            command, env=env, cwd=self.notebooks, stdin=subprocess.DEVNULL, pass_fds=[self._child_pipe]
        )
        os.close(self._child_pipe)
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._responds():
            if self._process.poll() is not None:
                raise UserError(
                    f"Jupyter failed to start (exit code {self._process.returncode}): "
                    "see its output in the log"
                )
            if time.monotonic() > deadline:
                raise UserError(
                    f"Jupyter did not respond within {_START_TIMEOUT:.0f} s: see its output in the log"
                )
            time.sleep(0.1)

    def exit_code(self) -> int | None:
        """Return the exit code of the server process; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def last_activity(self) -> float | None:
        """Return the time of the last activity, s since 1970; None while a cell is running.

        Activity is a cell that ran, terminal input or output, and a saved notebook. An open browser tab is
        not: it sends requests by itself.
        """
        kernels, terminals = self.get_json("/api/kernels"), self.get_json("/api/terminals")
        if any(kernel["execution_state"] == "busy" for kernel in kernels):
            return None
        times = [_timestamp(item["last_activity"]) for item in [*kernels, *terminals]]
        return max([*times, _last_notebook_save(self.notebooks)])

    def get_json(self, path: str) -> Any:
        """Return the JSON response of a GET request to the server.

        Raises:
            OSError: the server does not respond, or its status is not 200.
        """
        connection = self._connection()
        try:
            connection.request("GET", path, headers={"Authorization": f"token {self._token}"})
            response = connection.getresponse()
            data = response.read()
            if response.status != 200:
                raise OSError(f"{path}: {response.status} {response.reason}")
            return json.loads(data)
        except http.client.HTTPException as error:
            raise OSError(f"{path}: {error!r}") from None
        finally:
            connection.close()

    def write_to_terminals(self, line: str) -> None:
        """Write a line to every terminal that is open in Jupyter."""
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
        """End the server with its kernels and terminals, and remove the files of this start."""
        if self._process is not None:
            children = []
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._process.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_KILL_AFTER)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        with contextlib.suppress(OSError):
            os.close(self._parent_pipe)
        self._temporary.close()
        (self.run_folder / TOKEN).unlink(missing_ok=True)

    def _responds(self) -> bool:
        # If another server has taken the port, it rejects this token, and Jupyter has used the next port.
        for info in (self.folder / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):
                self.port = json.loads(info.read_text())["port"] or self.port
                with contextlib.suppress(OSError):
                    self.get_json("/api/status")
                    return True
        return False

    def _connection(self) -> http.client.HTTPConnection:
        if self.socket:
            return _UnixSocketConnection(self.socket)
        if self._tls:
            return http.client.HTTPSConnection(
                "localhost", self.port, timeout=_RESPONSE_TIMEOUT, context=self._tls
            )
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_RESPONSE_TIMEOUT)


class _UnixSocketConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_RESPONSE_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_RESPONSE_TIMEOUT)
        self.sock.connect(self._path)


def _configuration(settings: Mapping[str, Any], token: Path, pipe: int) -> str:
    """Return the text of a Jupyter configuration file, which is Python code."""
    lines = [
        "from pathlib import Path",
        "from hpc_imagenet.io.signals import exit_with_parent",
        "c = get_config()",
    ]
    lines += [f"c.{name} = {value!r}" for name, value in settings.items()]
    lines += [f"c.IdentityProvider.token = Path({str(token)!r}).read_text()", f"exit_with_parent({pipe})"]
    return "\n".join(lines) + "\n"


def _free_port(host: str) -> int:
    """Return a port that is free now. If it is in use when Jupyter starts, Jupyter uses another."""
    first, count = _PORTS
    begin = int.from_bytes(os.urandom(4), "big")
    for step in range(count):
        port = first + (begin + step) % count
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    raise UserError(f"no port is free on {socket.gethostname()}: use session.listen=socket, which needs none")


def _check_port_free(port: int, host: str) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Jupyter does
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"session.port={port} on {socket.gethostname()}: {error.strerror}; "
            "use another port, or leave out session.port to use a free one"
        ) from None


def _last_notebook_save(folder: Path) -> float:
    """Return the time of the last save of any notebook below a folder, s since 1970; 0 if there is none.

    Symbolic links, which point to datasets, are not followed; hidden folders, where Jupyter stores
    checkpoints, are skipped, and times in the future, as copies may have.
    """
    newest, now = 0.0, time.time()
    for top, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.endswith(".ipynb"):
                with contextlib.suppress(OSError):  # renamed or removed meanwhile
                    saved = Path(top, name).stat().st_mtime
                    newest = max(newest, saved if saved <= now else 0.0)
    return newest


def _timestamp(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
