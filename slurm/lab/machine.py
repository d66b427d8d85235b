"""The lab's init: process 1 of its pid namespace, which starts every daemon and every node.

When it ends, for any reason, the kernel ends all processes of the lab and removes its network and mounts.
`lab up` runs it as `unshare … python machine.py FOLDER [PIDFD]`; it accepts one JSON command per connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel
from files import ADDRESS, CONTROL_PORT, DATABASE_PORT, LOGIN, NODES, Folder
from node import start_node

SYSTEM_TABLES = ("/usr/share/mysql/mysql_system_tables.sql", "/usr/share/mariadb/mariadb_system_tables.sql")


class Machine:
    """All processes of one lab; pids are those of its own namespace."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.daemons: dict[str, int] = {}  # name → pid, while it runs
        self.nodes: dict[str, int] = {}  # name → pid of the node's init, while it runs
        self.cut: set[str] = set()
        self.ended = False

    def boot(self) -> None:
        """Start every daemon and node, each as soon as its dependencies answer."""
        self._become_login_node()
        self.repair()

    def repair(self) -> None:
        """Start every daemon and node that is not running, and connect all nodes."""
        run = self.folder / "run"
        if self._start("munged", self._munged()):
            self._await("munged", lambda: (run / "munge.sock").exists())
        try:
            self._start_database()
        except OSError:  # nothing is synced to disk, so a crash of the machine may have damaged it
            if "mariadbd" in self.daemons:
                raise
            shutil.rmtree(self.folder / "mysql")
            self._start_database()
        if self._start("slurmdbd", ["slurmdbd", "-D"]):
            self._await("slurmdbd", lambda: _answers(socket.AF_INET, (LOGIN, DATABASE_PORT)))
        first = not (self.folder / "state/clustername").exists()
        if self._start("slurmctld", ["slurmctld", "-D", *(["-c"] if first else [])]):
            self._await("slurmctld", lambda: _answers(socket.AF_INET, (LOGIN, CONTROL_PORT)))
        for node in NODES:
            if node not in self.nodes:
                self.revive(node)
            self.reconnect(node)

    def crash(self, node: str) -> None:
        """Kill every process of the node at once, as a power cut does."""
        pid = self.nodes.pop(node, None)
        if pid is None:
            raise ValueError(f"{node} is already down")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # returns when the kernel has ended everything in it
        self.cut.discard(node)

    def revive(self, node: str) -> None:
        """Start a crashed node."""
        if node in self.nodes:
            raise ValueError(f"{node} is up")
        _ip(f"link del {node}", may_fail=True)
        mac = "02:00:00:77:00:{:02x}".format(int(ADDRESS[node].rpartition(".")[2]))
        self.nodes[node], connected = start_node(self.folder, node)
        _ip(
            f"link add {node} type veth peer name eth0 address {mac} netns {self.nodes[node]}",
            f"link set {node} master lab up",
        )
        connected()

    def unplug(self, node: str) -> None:
        """Disconnect the network of a node; its processes keep running."""
        if node not in self.nodes:
            raise ValueError(f"{node} is down")
        _ip(f"link set {node} down")
        self.cut.add(node)

    def reconnect(self, node: str) -> None:
        """Connect the network of a node again."""
        if node not in self.nodes:
            raise ValueError(f"{node} is down")
        _ip(f"link set {node} up")
        self.cut.discard(node)

    def status(self) -> dict[str, Any]:
        """Return which daemons run, and whether each node is up, crashed or cut."""
        names = ("munged", "mariadbd", "slurmdbd", "slurmctld")
        return {
            "daemons": {name: name in self.daemons for name in names},
            "nodes": {
                n: "crashed" if n not in self.nodes else "cut" if n in self.cut else "up" for n in NODES
            },
        }

    def end(self) -> None:
        """End the nodes at once and the daemons in order, to keep the accounting database consistent."""
        self.ended = True
        for node in list(self.nodes):
            self.crash(node)
        for name in ("slurmctld", "slurmdbd", "mariadbd"):
            if name in self.daemons:
                os.kill(self.daemons[name], signal.SIGTERM)
                end = time.monotonic() + 5
                while name in self.daemons and time.monotonic() < end:
                    time.sleep(0.01)
                    self.reap()

    def reap(self) -> None:
        """Forget all processes that have ended."""
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                for table in (self.daemons, self.nodes):
                    for name in [name for name, known in table.items() if known == pid]:
                        del table[name]

    def serve(self, listener: socket.socket, owner: int | None) -> None:
        """Accept commands until `down`, or until the process of the pidfd `owner` has ended."""
        watched = [listener] if owner is None else [listener, owner]
        while not self.ended:
            ready = select.select(watched, [], [], 0.2)[0]
            self.reap()
            if owner in ready:
                self.end()
            elif ready:
                with listener.accept()[0] as client, contextlib.suppress(OSError):
                    client.settimeout(5)
                    client.sendall(json.dumps(self._answer(client.recv(4096))).encode())

    def _answer(self, request: bytes) -> dict[str, Any]:
        actions: dict[str, Callable[..., Any]] = {
            "repair": self.repair,
            "crash": self.crash,
            "revive": self.revive,
            "cut": self.unplug,
            "reconnect": self.reconnect,
            "status": self.status,
            "down": self.end,
        }
        try:
            action, *nodes = json.loads(request)
            return {"answer": actions[action](*nodes)}
        except Exception as error:
            return {"error": str(error)}

    def _become_login_node(self) -> None:
        socket.sethostname("login")
        etc = self.folder / "etc"
        kernel.bind(f"{etc}/hosts", "/etc/hosts")
        if Path("/etc/resolv.conf").exists():
            kernel.bind(f"{etc}/resolv.conf", "/etc/resolv.conf")
        kernel.bind(str(etc), "/etc/slurm")
        # Inside the lab the real commands are used; those in bin/ enter the lab from outside.
        kernel.bind(str(self.folder / "empty"), str(self.folder / "bin"))
        _ip(
            "link set lo up",
            "link add lab address 02:00:00:77:00:01 type bridge",
            "link set lab addrgenmode none",
            f"addr add {LOGIN}/24 dev lab",
            "link set lab up",
        )

    def _munged(self) -> list[str]:
        run, key = self.folder / "run", self.folder / "munge.key"
        return [
            "munged",
            "--foreground",
            "--force",  # in a user namespace / is owned by `nobody`, which munged would refuse
            f"--socket={run}/munge.sock",
            f"--key-file={key}",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munged.seed",
        ]

    def _mariadbd(self) -> list[str]:
        run = self.folder / "run"
        # Only the owner reaches the socket; nothing here has to survive a power cut of the real machine.
        return [
            "mariadbd",
            "--no-defaults",
            *(["--user=root"] if os.getuid() == 0 else []),
            f"--datadir={self.folder}/mysql",
            f"--socket={run}/mysql.sock",
            f"--pid-file={run}/mariadbd.pid",
            f"--tmpdir={run}",
            "--skip-networking",
            "--skip-grant-tables",
            "--skip-log-bin",
            "--debug-no-sync",
            "--innodb-doublewrite=0",
            "--innodb-file-per-table=0",
            "--innodb-log-file-size=16M",
            "--innodb-buffer-pool-size=32M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-flush-method=nosync",
            "--innodb-lock-wait-timeout=900",
        ]

    def _start_database(self) -> None:
        if "mariadbd" in self.daemons:
            return
        data = self.folder / "mysql"
        if not (data / "complete").exists():
            shutil.rmtree(data, ignore_errors=True)
            (data / "mysql").mkdir(parents=True)
            # The system tables suffice; mariadb-install-db takes longer than everything else.
            tables = next(path for path in map(Path, [*SYSTEM_TABLES, "/dev/null"]) if path.exists())
            with (self.folder / "log/mariadb-bootstrap.log").open("wb") as log:
                done = subprocess.run(
                    [*self._mariadbd(), "--bootstrap"],
                    input=b"use mysql;\n" + tables.read_bytes(),
                    stdout=log,
                    stderr=log,
                    check=False,
                    preexec_fn=kernel.drop_capabilities,
                )
            if done.returncode != 0:
                raise OSError(f"MariaDB cannot make its tables: see {log.name}")
            (data / "complete").touch()
        self._start("mariadbd", self._mariadbd())
        socket_path = str(self.folder / "run/mysql.sock")
        self._await("mariadbd", lambda: _answers(socket.AF_UNIX, socket_path))

    def _start(self, name: str, command: list[str]) -> bool:
        """Start a daemon unless it is running, with its output in log/<name>.log."""
        if name in self.daemons:
            return False
        with (self.folder / f"log/{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=str(self.folder),
                env={
                    **os.environ,
                    "SLURM_CONF": str(self.folder.slurm_conf),
                    "MYSQL_UNIX_PORT": str(self.folder / "run/mysql.sock"),
                },
                start_new_session=True,
                preexec_fn=kernel.drop_capabilities,
            )
        self.daemons[name] = process.pid
        process.returncode = 0  # reap() waits for it, not subprocess
        return True

    def _await(self, name: str, ready: Callable[[], bool], seconds: float = 60) -> None:
        """Wait for a daemon.

        Raises:
            OSError: it ended, or was not ready in time.
        """
        end = time.monotonic() + seconds
        while not ready():
            self.reap()
            if name not in self.daemons or time.monotonic() > end:
                raise OSError(f"{name} did not start: see {self.folder}/log/{name}.log")
            time.sleep(0.01)


def _ip(*commands: str, may_fail: bool = False) -> None:
    done = subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(commands) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and not may_fail:
        raise OSError(f"ip: {done.stderr.strip()}")


def _answers(family: int, address: Any) -> bool:
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def main() -> None:
    """Run a lab until `down` or a signal."""
    folder = Folder(Path(sys.argv[1]))
    machine = Machine(folder)
    signal.signal(signal.SIGTERM, lambda *_: setattr(machine, "ended", True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        # Before booting: the socket shows that the folder is in use, and requests wait in it.
        listener.bind(str(folder.socket))
        listener.listen()
        try:
            machine.boot()
        except OSError as error:
            sys.exit(str(error))
        machine.serve(listener, int(sys.argv[2]) if len(sys.argv) > 2 else None)


if __name__ == "__main__":
    main()
