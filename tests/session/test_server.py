"""Jupyter's server as sessions start it: who gets in, who does not, what it tells, how it ends.

The servers are real, and started once a way of listening.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import websocket
from servers import free_port

from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.io import tempdir
from hpc_imagenet.session import credentials, watchdog
from hpc_imagenet.session.connection import WARNING
from hpc_imagenet.session.server import TOP, JupyterServer
from hpc_imagenet.session.watchdog import StopEvent, Watchdog

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(folder: Path, way: str = "loopback", port: int | None = None) -> Iterator[JupyterServer]:
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    server = JupyterServer(folder, folder / "notebooks", way, port, 1)
    try:
        server.start({})
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    port = free_port()
    with serving(tmp_path_factory.mktemp("here"), port=port) as server:
        assert server.port == port
        yield server


def connection(server: JupyterServer) -> http.client.HTTPConnection:
    """Return a connection as a browser behind a tunnel has it."""
    if server.socket:
        over = http.client.HTTPConnection("localhost")
        over.sock = socket.socket(socket.AF_UNIX)
        over.sock.connect(server.socket)
        return over
    if server.fingerprint:
        return http.client.HTTPSConnection(
            "localhost", server.port, context=ssl._create_unverified_context(), timeout=30
        )
    return http.client.HTTPConnection("localhost", server.port, timeout=30)


def ask(
    server: JupyterServer, path: str, token: str | None, method: str = "GET", body: str | None = None
) -> Any:
    """Return the JSON of an answer, or its status where that is not a good one."""
    over = connection(server)
    over.request(method, path, body, {"Authorization": f"token {token}"} if token else {})
    answer = over.getresponse()
    data = answer.read()
    over.close()
    return json.loads(data or b"null") if answer.status < 300 else answer.status


def post(server: JupyterServer, path: str, **body: Any) -> Any:
    return ask(server, path, credentials.token(server.run_folder), "POST", json.dumps(body))


def talk(server: JupyterServer, path: str) -> websocket.WebSocket:
    header = [f"Authorization: token {credentials.token(server.run_folder)}"]
    return websocket.create_connection(f"ws://127.0.0.1:{server.port}{path}", header=header, timeout=30)


def execute(server: JupyterServer, code: str) -> websocket.WebSocket:
    """Run code in a new kernel, and return what listens to it."""
    kernel = post(server, "/api/kernels", name="python3")["id"]
    over = talk(server, f"/api/kernels/{kernel}/channels")
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "version": "5.3"}
    header |= {"session": uuid.uuid4().hex, "username": "", "date": ""}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
    over.send(
        json.dumps(
            {
                "header": header,
                "parent_header": {},
                "metadata": {},
                "content": content,
                "channel": "shell",
                "buffers": [],
            }
        )
    )
    return over


def printed(over: websocket.WebSocket, text: str) -> str:
    """Return what comes from a kernel or a terminal until `text` is there."""
    said = ""
    while text not in said:
        said += str(over.recv())
    return said


def opens(server: JupyterServer) -> None:
    """Nothing but the token opens a server."""
    token = credentials.token(server.run_folder)
    assert ask(server, "/api/contents", token)["type"] == "directory"
    for wrong in (None, "wrong", token[:-1], token.upper()):
        assert ask(server, "/api/contents", wrong) == 403
        assert ask(server, "/api/terminals", wrong, "POST") == 403


def test_the_token_opens_it_and_nothing_else_does(here: JupyterServer) -> None:
    opens(here)
    assert here.fingerprint is None


def test_nobody_is_asked_about_news_which_nodes_do_not_reach(here: JupyterServer) -> None:
    over = connection(here)
    over.request("GET", "/lab", headers={"Authorization": f"token {credentials.token(here.run_folder)}"})
    page = over.getresponse().read().decode()
    over.close()
    found = re.search(r"jupyter-config-data[^>]*>(.*?)</script>", page, re.DOTALL)
    assert found
    assert "@jupyterlab/apputils-extension:announcements" in json.loads(found[1])["disabledExtensions"]


def test_at_an_address_it_has_a_certificate_and_a_port_of_its_own(
    tmp_path: Path, here: JupyterServer
) -> None:
    with serving(tmp_path, "address") as server:
        opens(server)
        over = connection(server)
        over.connect()
        shown = over.sock.getpeercert(binary_form=True)
        over.close()
        command = ["openssl", "x509", "-inform", "der", "-noout", "-fingerprint", "-sha256"]
        digest = subprocess.run(command, input=shown, capture_output=True, check=True)
        assert digest.stdout.decode().strip().endswith(f"={server.fingerprint}")
        assert server.port != here.port
        assert ask(server, "/api/status", credentials.token(here.run_folder)) == 403


def test_at_a_socket_it_is_shut_down_from_within_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "socket") as server:
        opens(server)
        assert server.fingerprint is None
        thread, _, ended = lives(server, StopEvent())
        post(server, "/api/shutdown")
        thread.join()
        folder = server.folder
        assert folder.exists()
    assert ended == ["shut down from within"]
    assert not folder.exists()
    assert not (tmp_path / credentials.TOKEN).exists()


def test_each_start_has_a_token_of_its_own_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    tokens = {credentials.new_token(tmp_path) for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) == 64 for token in tokens)
    assert (tmp_path / credentials.TOKEN).stat().st_mode & 0o777 == 0o600
    assert credentials.token(tmp_path) in tokens


def test_the_token_is_in_no_process_and_no_output_and_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hpc_imagenet.session.server import Server; "
        "f = Path(sys.argv[1]); (f / 'notebooks').mkdir(); "
        "s = Server(f, f / 'notebooks', 'loopback', None, 1); "
        "s.start({}); print(s.folder, s.port, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        lines = []
        while not (lines and lines[-1].startswith(f"{TOP}/")):
            lines.append(process.stdout.readline())
        folder, port = Path(lines[-1].split()[0]), int(lines[-1].split()[1])
        token = credentials.token(tmp_path)
        with socket.create_connection(("127.0.0.1", port)) as over:  # as a browser's first visit
            over.sendall(f"GET /lab?token={token} HTTP/1.0\r\n\r\n".encode())
            assert b"200 OK" in over.recv(4096)
        told = []
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                told += [" ".join(each.cmdline()), " ".join(each.environ().values())]
        assert folder not in tempdir.remove_stale("session", TOP)
        process.kill()
        lines += process.stdout.readlines()  # until the last of them has ended
    assert len(told) >= 4
    assert not any(token in line for line in [*told, *lines])
    written = [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_text("latin-1")]
    assert written == [tmp_path / credentials.TOKEN]  # of a killed one; the next start replaces it
    # Another session of this user may have been quicker.
    assert folder in tempdir.remove_stale("session", TOP) or not folder.exists()
    assert not folder.exists()


def test_kernels_are_reached_by_sockets_that_are_nobody_elses(here: JupyterServer) -> None:
    over = execute(here, "print(6 * 7)")
    printed(over, "42")
    over.close()
    runtime = here.folder / "runtime"
    sockets = [path for path in runtime.iterdir() if path.is_socket()]
    assert len(sockets) >= 5
    assert here.folder.stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0 and shutil.which("setpriv"):
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls", str(runtime)]
        done = subprocess.run(nobody, capture_output=True, text=True, check=False)
        assert done.returncode
        assert "Permission denied" in done.stderr


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"session\.port={port} on .*: Address already in use"):
            JupyterServer(tmp_path, tmp_path, "loopback", port, 1)
    assert not (tmp_path / credentials.TOKEN).exists()


def test_jupyter_that_breaks_down_at_once_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'jupyter_server' in sys.orig_argv: sys.exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(UserError, match="exit code 1 before it answered"), serving(tmp_path / "run"):
        pass


def lives(
    server: JupyterServer, asked: StopEvent, **more: Any
) -> tuple[threading.Thread, list[str], list[str]]:
    """Watch a server in a thread; return it, the warnings, and how it ended."""
    warned: list[str] = []
    ended: list[str] = []
    settings: dict[str, Any] = {"ends": time.time() + 3600, "idle_minutes": None, **more}

    def warn(line: str) -> None:
        warned.append(line)
        server.tell(line)

    def watch() -> None:
        try:
            ended.append(Watchdog(server, tell=lambda *_: None, warn=warn, **settings).watch(asked))
        except (Preempted, UserError) as error:
            ended.append(str(error))

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, warned, ended


def test_its_terminals_are_warned_before_it_ends(here: JupyterServer) -> None:
    terminal = post(here, "/api/terminals")["name"]
    with contextlib.closing(talk(here, f"/terminals/websocket/{terminal}")) as over:
        printed(over, '"stdout"')  # the shell is there
        asked = StopEvent()
        thread, warned, ended = lives(here, asked, ends=time.time() + WARNING + 2)
        assert "this session ends in 10 minutes" in printed(over, "takes it up again")
        asked._take(signal.SIGTERM, None)
        thread.join()
    assert len(warned) == 1
    assert ended == ["stopped by SIGTERM; its folder stays"]


def test_time_that_is_over_ends_it(here: JupyterServer) -> None:
    thread, warned, ended = lives(here, StopEvent(), ends=time.time() + 3)
    thread.join()
    assert warned
    assert ended == ["its time was over"]


def test_the_signal_of_a_time_limit_is_no_interruption(here: JupyterServer) -> None:
    for left, told in ((100, "its time was over"), (3600, "stopped by SIGUSR2; its folder stays")):
        asked = StopEvent()
        asked._take(signal.SIGUSR2, None)
        thread, _, ended = lives(here, asked, ends=time.time() + left)
        thread.join()
        assert ended == [told]


class Ended:
    """A server whose process has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def ended(self) -> int:
        return self.code


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("code", [-signal.SIGUSR2, 0])
def test_a_preemption_that_ends_jupyter_first_is_an_interruption(late: bool, code: int) -> None:
    """Slurm signals each process of the job. A session that counts as shut down is not requeued."""
    asked: Any = StopEvent()
    take = threading.Timer(0.3, asked._take, (signal.SIGUSR2, None))
    if late:
        take.start()
    else:
        asked._take(signal.SIGUSR2, None)
    server: Any = Ended(code)
    thread, _, ended = lives(server, asked)
    thread.join()
    assert ended == ["stopped by SIGUSR2; its folder stays"]


@pytest.mark.parametrize(
    ("code", "line"),
    [(0, "shut down from within"), (3, "Jupyter ended with exit code 3: its last words are in the log")],
)
def test_jupyter_that_ends_without_a_signal_ends_the_session(monkeypatch, code: int, line: str) -> None:
    monkeypatch.setattr(watchdog, "SPREADS", 0.1)
    server: Any = Ended(code)
    thread, _, ended = lives(server, StopEvent())
    thread.join()
    assert ended == [line]


def test_a_notebook_saved_in_any_folder_is_activity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tmp_path / "notebooks"
    saved = {"deep/er/mine.ipynb": 3.0, "deep/mine.py": 9.0, "deep/.ipynb_checkpoints/mine.ipynb": 9.0}
    shown.mkdir()
    for name, when in {**saved, "../elsewhere/mine.ipynb": 9.0}.items():
        (shown / name).parent.mkdir(parents=True, exist_ok=True)
        (shown / name).touch()
        os.utime(shown / name, (when, when))
    (shown / "datastore").symlink_to(tmp_path / "elsewhere")
    server = JupyterServer(tmp_path, shown, "loopback", None, 1)
    monkeypatch.setattr(server, "ask", lambda _: [])  # no kernel, no terminal
    assert server.active() == 3.0
    server.close()


def test_a_cell_that_runs_is_activity_and_an_open_tab_is_not(here: JupyterServer) -> None:
    over = execute(here, "import time; print('be' + 'gun', flush=True); time.sleep(600)")
    printed(over, "begun")
    asked = StopEvent()
    thread, _, ended = lives(here, asked, idle_minutes=0.02)
    time.sleep(2.4)  # twice as long as it may be idle
    assert not ended
    (kernel,) = [each for each in here.ask("/api/kernels") if each["execution_state"] == "busy"]
    ask(here, f"/api/kernels/{kernel['id']}/interrupt", credentials.token(here.run_folder), "POST")
    while not ended:  # a tab asks all the time
        ask(here, "/api/sessions", credentials.token(here.run_folder))
        time.sleep(0.1)
    thread.join()
    over.close()
    assert ended == ["0.02 minutes without activity"]
