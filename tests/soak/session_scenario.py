"""What is disturbed of a session: Jupyter Lab on this machine, in which a file is saved."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from command_line import eventually
from scenarios import Scenario

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import Run
from hpc_imagenet.session.connection import TOKEN, load_connection_info, read_token
from hpc_imagenet.session.server import TOP

SAVED = "saved.txt"
TEXT = "line\n" * 1000


class Session(Scenario):
    """One session; its server and its folder in /tmp must go with it."""

    turns, disturbances = 2, 3

    @property
    def run(self) -> Run:
        """The run of the session."""
        return Run(self.state / "runs" / "abc-session")

    def work(self) -> None:
        """Serve Jupyter; a user, who is a thread, saves a file and shuts it down."""
        from hpc_imagenet.stages.work import session

        config = compose(["+stage=session", "dataset=digits", f"workspace={self.state}"])[0]
        self.run.folder.mkdir(parents=True, exist_ok=True)
        attempt = self.run.new_attempt()
        threading.Thread(target=self._use, args=(attempt,), daemon=True).start()
        session.run(config, self.run, DistEnv())

    def _use(self, attempt: Attempt) -> None:
        while (info := load_connection_info(attempt)) is None:
            time.sleep(0.05)
        self._request(
            info.port, "PUT", f"contents/{SAVED}", {"type": "file", "format": "text", "content": TEXT}
        )
        self._request(info.port, "POST", "shutdown", {})

    def _request(self, port: int, method: str, path: str, body: dict[str, str]) -> None:
        headers = {"Authorization": f"token {read_token(self.run.folder)}"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/{path}", json.dumps(body).encode(), headers, method=method
        )
        with urllib.request.urlopen(request, timeout=60):
            pass

    def check(self) -> None:
        """The token must be private, and the connection details readable."""
        token = self.run.folder / TOKEN
        assert not token.exists() or token.stat().st_mode & 0o77 == 0, oct(token.stat().st_mode)
        for attempt in self.run.attempts():
            load_connection_info(attempt)

    def result(self) -> Any:
        """Return the files of the user, when everything else has gone."""
        eventually(lambda: not self._folders())
        notebooks = self.run.folder / "notebooks"
        kept = {
            str(path.relative_to(notebooks)): path.read_bytes()
            for path in sorted(notebooks.rglob("*"))
            if path.is_file()
        }
        return kept, (self.run.folder / TOKEN).exists()

    def _folders(self) -> list[Path]:
        """Return the folders in /tmp of the session's servers."""
        configurations = TOP.glob("hpc_imagenet-session-*/server.py")
        return [path.parent for path in configurations if str(self.run.folder) in path.read_text()]
