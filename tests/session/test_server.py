"""The Jupyter server of sessions: access control, activity, warnings and shutdown.

The servers are real; one is started per value of session.listen.
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
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.session import watchdog
from hpc_imagenet.session.connection import TOKEN, WARNING, new_token, read_token
from hpc_imagenet.session.server import TOP, JupyterServer

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(folder: Path, listen: str = "loopback", port: int | None = None) -> Iterator[JupyterServer]:
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    server = JupyterServer(folder, folder / "notebooks", listen, port, 1)
    try:
        server.start({})
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def loopback_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    port = free_port()
    with serving(tmp_path_factory.mktemp("loopback"), port=port) as server:
        assert server.port == port
        yield server


def connection(server: JupyterServer) -> http.client.HTTPConnection:
    """Return a connection like that of a browser through a tunnel."""
    if server.socket:
        unix = http.client.HTTPConnection("localhost")
        unix.sock = socket.socket(socket.AF_UNIX)
        unix.sock.connect(server.socket)
        return unix
    if server.fingerprint:
        return http.client.HTTPSConnection(
            "localhost", server.port, context=ssl._create_unverified_context(), timeout=30
        )
    return http.client.HTTPConnection("localhost", server.port, timeout=30)


def request(
    server: JupyterServer, path: str, token: str | None, method: str = "GET", body: str | None = None
) -> Any:
    """Return the JSON of a response, or its status if that is an error."""
    client = connection(server)
    client.request(method, path, body, {"Authorization": f"token {token}"} if token else {})
    response = client.getresponse()
    data = response.read()
    client.close()
    return json.loads(data or b"null") if response.status < 300 else response.status


def post(server: JupyterServer, path: str, **body: Any) -> Any:
    return request(server, path, read_token(server.run_folder), "POST", json.dumps(body))


def open_websocket(server: JupyterServer, path: str) -> websocket.WebSocket:
    header = [f"Authorization: token {read_token(server.run_folder)}"]
    return websocket.create_connection(f"ws://127.0.0.1:{server.port}{path}", header=header, timeout=30)


def execute(server: JupyterServer, code: str) -> websocket.WebSocket:
    """Run code in a new kernel and return the websocket of its output."""
    kernel = post(server, "/api/kernels", name="python3")["id"]
    channel = open_websocket(server, f"/api/kernels/{kernel}/channels")
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "version": "5.3"}
    header |= {"session": uuid.uuid4().hex, "username": "", "date": ""}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
    channel.send(
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
    return channel


def output_until(channel: websocket.WebSocket, text: str) -> str:
    """Return the output of a kernel or a terminal up to `text`."""
    output = ""
    while text not in output:
        output += str(channel.recv())
    return output


def check_access(server: JupyterServer) -> None:
    """Check that the server accepts its token and nothing else."""
    token = read_token(server.run_folder)
    assert request(server, "/api/contents", token)["type"] == "directory"
    for wrong in (None, "wrong", token[:-1], token.upper()):
        assert request(server, "/api/contents", wrong) == 403
        assert request(server, "/api/terminals", wrong, "POST") == 403


def test_only_the_token_gives_access(loopback_server: JupyterServer) -> None:
    check_access(loopback_server)
    assert loopback_server.fingerprint is None


def test_lab_does_not_offer_to_fetch_news(loopback_server: JupyterServer) -> None:
    browser = connection(loopback_server)
    browser.request(
        "GET", "/lab", headers={"Authorization": f"token {read_token(loopback_server.run_folder)}"}
    )
    page = browser.getresponse().read().decode()
    browser.close()
    found = re.search(r"jupyter-config-data[^>]*>(.*?)</script>", page, re.DOTALL)
    assert found
    assert "@jupyterlab/apputils-extension:announcements" in json.loads(found[1])["disabledExtensions"]


def test_address_server_has_its_own_certificate_and_port(
    tmp_path: Path, loopback_server: JupyterServer
) -> None:
    with serving(tmp_path, "address") as server:
        check_access(server)
        browser = connection(server)
        browser.connect()
        certificate = browser.sock.getpeercert(binary_form=True)
        browser.close()
        command = ["openssl", "x509", "-inform", "der", "-noout", "-fingerprint", "-sha256"]
        digest = subprocess.run(command, input=certificate, capture_output=True, check=True)
        assert digest.stdout.decode().strip().endswith(f"={server.fingerprint}")
        assert server.port != loopback_server.port
        assert request(server, "/api/status", read_token(loopback_server.run_folder)) == 403


def test_socket_server_that_is_shut_down_from_jupyter_leaves_no_files(tmp_path: Path) -> None:
    with serving(tmp_path, "socket") as server:
        check_access(server)
        assert server.fingerprint is None
        thread, _, ended = watch_in_thread(server, StopSignal())
        post(server, "/api/shutdown")
        thread.join()
        folder = server.folder
        assert folder.exists()
    assert ended == ["shut down from Jupyter"]
    assert not folder.exists()
    assert not (tmp_path / TOKEN).exists()


def test_each_start_has_a_new_token_of_mode_600(tmp_path: Path) -> None:
    tokens = {new_token(tmp_path) for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) == 64 for token in tokens)
    assert (tmp_path / TOKEN).stat().st_mode & 0o777 == 0o600
    assert read_token(tmp_path) in tokens


def test_token_is_not_exposed_and_the_server_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hpc_imagenet.session.server import JupyterServer; "
        "f = Path(sys.argv[1]); (f / 'notebooks').mkdir(); "
        "s = JupyterServer(f, f / 'notebooks', 'loopback', None, 1); "
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
            assert lines[-1], lines
        folder, port = Path(lines[-1].split()[0]), int(lines[-1].split()[1])
        token = read_token(tmp_path)
        with socket.create_connection(("127.0.0.1", port)) as browser:  # a browser's first request
            browser.sendall(f"GET /lab?token={token} HTTP/1.0\r\n\r\n".encode())
            assert b"200 OK" in browser.recv(4096)
        visible = []
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                visible += [" ".join(each.cmdline()), " ".join(each.environ().values())]
        assert folder not in tempdir.remove_stale("session", TOP)
        process.kill()
        lines += process.stdout.readlines()  # until the last process has ended
    assert len(visible) >= 4
    assert not any(token in line for line in [*visible, *lines])
    written = [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_text("latin-1")]
    assert written == [tmp_path / TOKEN]  # the next start replaces it
    # Another session of this user may have removed it first.
    assert folder in tempdir.remove_stale("session", TOP) or not folder.exists()
    assert not folder.exists()


def test_kernel_sockets_are_private_to_the_user(loopback_server: JupyterServer) -> None:
    channel = execute(loopback_server, "print(6 * 7)")
    output_until(channel, "42")
    channel.close()
    runtime = loopback_server.folder / "runtime"
    sockets = [path for path in runtime.iterdir() if path.is_socket()]
    assert len(sockets) >= 5
    assert loopback_server.folder.stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0 and shutil.which("setpriv"):
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls", str(runtime)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode
        assert "Permission denied" in done.stderr


def test_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"session\.port={port} on .*: Address already in use"):
            JupyterServer(tmp_path, tmp_path, "loopback", port, 1)
    assert not (tmp_path / TOKEN).exists()


def test_jupyter_that_fails_to_start_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'jupyter_server' in sys.orig_argv: sys.exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(UserError, match=r"failed to start \(exit code 1\)"), serving(tmp_path / "run"):
        pass


def watch_in_thread(
    server: JupyterServer, stop: StopSignal, **more: Any
) -> tuple[threading.Thread, list[str], list[str]]:
    """Run a watchdog in a thread; return the thread, the warnings, and the reasons for the end."""
    warned: list[str] = []
    ended: list[str] = []
    settings: dict[str, Any] = {"ends": time.time() + 3600, "idle_minutes": None, **more}

    def warn(line: str) -> None:
        warned.append(line)
        server.write_to_terminals(line)

    def watch() -> None:
        try:
            ended.append(watchdog.watch(server, stop, progress=lambda *_: None, warn=warn, **settings))
        except (Preempted, UserError) as error:
            ended.append(str(error))

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, warned, ended


def test_terminals_are_warned_before_the_end(loopback_server: JupyterServer) -> None:
    terminal = post(loopback_server, "/api/terminals")["name"]
    with contextlib.closing(open_websocket(loopback_server, f"/terminals/websocket/{terminal}")) as channel:
        output_until(channel, '"stdout"')  # the shell has started
        stop = StopSignal()
        thread, warned, ended = watch_in_thread(loopback_server, stop, ends=time.time() + WARNING + 2)
        assert "this session ends in 10 minutes" in output_until(channel, "resume restarts the session")
        stop._handle(signal.SIGTERM, None)
        thread.join()
    assert len(warned) == 1
    assert ended == ["stopped by SIGTERM; its notebooks are kept"]


def test_session_ends_at_its_time_limit(loopback_server: JupyterServer) -> None:
    thread, warned, ended = watch_in_thread(loopback_server, StopSignal(), ends=time.time() + 3)
    thread.join()
    assert warned
    assert ended == ["its time limit was reached"]


def test_sigusr2_near_the_time_limit_is_not_a_preemption(loopback_server: JupyterServer) -> None:
    for left, reason in (
        (100, "its time limit was reached"),
        (3600, "stopped by SIGUSR2; its notebooks are kept"),
    ):
        stop = StopSignal()
        stop._handle(signal.SIGUSR2, None)
        thread, _, ended = watch_in_thread(loopback_server, stop, ends=time.time() + left)
        thread.join()
        assert ended == [reason]


class EndedServer:
    """A server whose process has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def exit_code(self) -> int:
        return self.code


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("code", [-signal.SIGUSR2, 0])
def test_signal_that_ends_jupyter_first_counts_as_preemption(late: bool, code: int) -> None:
    """Slurm signals each process of the job. A session that counts as shut down is not requeued."""
    stop: Any = StopSignal()
    signal_later = threading.Timer(0.3, stop._handle, (signal.SIGUSR2, None))
    if late:
        signal_later.start()
    else:
        stop._handle(signal.SIGUSR2, None)
    server: Any = EndedServer(code)
    thread, _, ended = watch_in_thread(server, stop)
    thread.join()
    assert ended == ["stopped by SIGUSR2; its notebooks are kept"]


@pytest.mark.parametrize(
    ("code", "line"),
    [(0, "shut down from Jupyter"), (3, "Jupyter failed with exit code 3: see its last lines in the log")],
)
def test_jupyter_that_ends_without_a_signal_ends_the_session(code: int, line: str) -> None:
    server: Any = EndedServer(code)
    thread, _, ended = watch_in_thread(server, StopSignal(), signal_delay=0.1)
    thread.join()
    assert ended == [line]


def test_saving_a_notebook_in_any_folder_is_activity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebooks = tmp_path / "notebooks"
    saved = {"deep/er/mine.ipynb": 3.0, "deep/mine.py": 9.0, "deep/.ipynb_checkpoints/mine.ipynb": 9.0}
    saved["deep/of the future.ipynb"] = time.time() + 86_400  # it would be active until then
    notebooks.mkdir()
    for name, when in {**saved, "../elsewhere/mine.ipynb": 9.0}.items():
        (notebooks / name).parent.mkdir(parents=True, exist_ok=True)
        (notebooks / name).touch()
        os.utime(notebooks / name, (when, when))
    (notebooks / "datastore").symlink_to(tmp_path / "elsewhere")
    server = JupyterServer(tmp_path, notebooks, "loopback", None, 1)
    monkeypatch.setattr(server, "get_json", lambda _: [])  # no kernel, no terminal
    assert server.last_activity() == 3.0
    server.close()


def test_a_running_cell_is_activity_and_an_open_tab_is_not(loopback_server: JupyterServer) -> None:
    channel = execute(loopback_server, "import time; print('be' + 'gun', flush=True); time.sleep(600)")
    output_until(channel, "begun")
    stop = StopSignal()
    thread, _, ended = watch_in_thread(loopback_server, stop, idle_minutes=0.02)
    time.sleep(2.4)  # twice the idle limit
    assert not ended
    (kernel,) = [
        each for each in loopback_server.get_json("/api/kernels") if each["execution_state"] == "busy"
    ]
    request(
        loopback_server,
        f"/api/kernels/{kernel['id']}/interrupt",
        read_token(loopback_server.run_folder),
        "POST",
    )
    while not ended:  # an open tab sends requests all the time
        request(loopback_server, "/api/sessions", read_token(loopback_server.run_folder))
        time.sleep(0.1)
    thread.join()
    channel.close()
    assert ended == ["0.02 minutes without activity"]
