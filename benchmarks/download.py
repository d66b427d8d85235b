"""Measure the download of one archive over loopback, beside aria2c, curl and wget in the same run.

    python benchmarks/download.py [--gib 2] [--repeats 3] [--folder DIR]

The server is nginx with sendfile. In the second table it gives each connection 4 MB/s, and a proxy delays
all bytes so that a response comes 50 ms later, like a typical remote server. Ours verifies the MD5 and ends
when the bytes are on disk (fsync); the peers do neither, except `aria2c --checksum`. All are whole
processes, Python's start included, and alternate. Missing peers are listed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from limited import LIMIT, TIMED_OUT, run_limited

from hpc_imagenet.io.tar_header import END, member_header

FILE = "archive.tar"
DELAY = 0.050  # s of round-trip delay
CAP = 4_000_000  # bytes per second and connection
FAR_BYTES = 128 << 20

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; sendfile_max_chunk 1m;
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
  uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
  server {{ listen 127.0.0.1:{near}; root {folder}/www; }}
  server {{ listen 127.0.0.1:{far}; root {folder}/far; limit_rate {cap}; }}
}}
"""
OURS = """
import sys
from pathlib import Path
from hpc_imagenet.data.download.downloader import Downloader
from hpc_imagenet.data.sources.http_credentials import HttpCredentials
from hpc_imagenet.data.download.expected import ExpectedArchive
from hpc_imagenet.data.sources.http_source import HttpSource
url, folder, file, md5, connections = sys.argv[1:]
count = int(connections)
source = Downloader(HttpSource(url, 60, count, HttpCredentials(url)), 8, 60, connections=count)
want = ExpectedArchive("dataset.archives.train", file, False, md5=md5, md5_source="md5sums")
source.fetch(want, Path(folder) / file, lambda done: None)
"""


@dataclass
class Row:
    """A program and its measured times."""

    name: str
    command: Callable[[str, Path, str], list[str]]  # from URL, folder and MD5
    seconds: list[float] = field(default_factory=list)
    hung: bool = False  # killed at its time limit, and not run again

    @property
    def median(self) -> float:
        """Median in s."""
        return statistics.median(self.seconds)

    @property
    def missing(self) -> bool:
        """Whether the program is not installed."""
        return shutil.which(self.command("", Path(), "")[0]) is None


def ours(connections: int) -> Row:
    return Row(
        f"hpc_imagenet, {connections} connections, MD5, fsync",
        lambda url, folder, md5: [sys.executable, "-c", OURS, url, str(folder), FILE, md5, str(connections)],
    )


def aria2(words: str, *more: str) -> Row:
    # The fastest options: no preallocation, and -s, since -x alone uses five connections.
    common = ["aria2c", "-q", "-x16", "-s16", "--file-allocation=none", "--no-conf=true", *more]
    return Row(
        f"aria2c -x16{words}",
        lambda url, folder, md5: [
            *(word.format(md5=md5) for word in common),
            f"--dir={folder}",
            f"{url}/{FILE}",
        ],
    )


def rows(*for_aria2: str) -> list[Row]:
    return [
        aria2(", no MD5", *for_aria2),
        aria2(", MD5", "--checksum=md5={md5}", *for_aria2),
        Row("curl", lambda url, folder, md5: ["curl", "-sf", "-o", str(folder / FILE), f"{url}/{FILE}"]),
        Row("wget", lambda url, folder, md5: ["wget", "-q", "-O", str(folder / FILE), f"{url}/{FILE}"]),
        ours(16),
        ours(8),
    ]


def write_archive(path: Path, size: int) -> str:
    """Write a tar of one file of about `size` bytes; return its MD5."""
    path.parent.mkdir(parents=True)
    md5, block = hashlib.md5(usedforsecurity=False), random.Random(0).randbytes(1 << 20)
    with path.open("wb") as file:
        pieces = [member_header("image.JPEG", size), *([block] * (size >> 20)), END]
        for number, piece in enumerate(pieces):
            # All blocks differ, for file systems that deduplicate.
            data = number.to_bytes(8, "little") + piece[8:] if len(piece) == 1 << 20 else piece
            file.write(data)
            md5.update(data)
    return md5.hexdigest()


@contextlib.contextmanager
def nginx(folder: Path, near: int, far: int) -> Iterator[None]:
    """Serve folder/www and, slowly, folder/far."""
    if not shutil.which("nginx"):
        raise SystemExit("nginx is missing: apt-get install --no-install-recommends nginx-light")
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, near=near, far=far, cap=CAP))
    server = subprocess.Popen(["nginx", "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        wait_for(near)
        yield
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def delayed(port: int, to: int) -> Iterator[None]:
    """Listen on `port` and forward to `to` and back, each way delayed by half of DELAY."""
    proxy = multiprocessing.get_context("spawn").Process(target=_proxy, args=(port, to), daemon=True)
    proxy.start()
    try:
        wait_for(port)
        yield
    finally:
        proxy.terminate()
        proxy.join()


def _proxy(port: int, to: int) -> None:
    async def move(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(4096)

        async def hold() -> None:
            while True:
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = await reader.read(1 << 16)
                await held.put((time.monotonic() + DELAY / 2, data))
                if not data:
                    return

        holding = asyncio.create_task(hold())
        with contextlib.suppress(ConnectionError):
            while True:
                due, data = await held.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        holding.cancel()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", to)
            await asyncio.gather(move(reader, back), move(there, writer))

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(serve())


def wait_for(port: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"no server listens on port {port}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def measure(table: list[Row], url: str, archive: Path, md5: str, into: Path, repeats: int) -> None:
    """Run the programs alternately; the first round is not counted."""
    for turn in range(repeats + 1):
        for row in table:
            if row.missing or row.hung or (turn == 0 and url.endswith("/far")):
                continue
            folder = into / "to"
            folder.mkdir()
            os.sync()  # the previous program's dirty pages must not count here
            begin = time.perf_counter()
            try:
                done = run_limited(row.command(url, folder, md5), LIMIT)
            except subprocess.TimeoutExpired:
                row.hung = True
                shutil.rmtree(folder)
                continue
            seconds = time.perf_counter() - begin
            if done.returncode or (folder / FILE).stat().st_size != archive.stat().st_size:
                raise SystemExit(f"{row.name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
            if turn or url.endswith("/far"):
                row.seconds.append(seconds)
            shutil.rmtree(folder)


def show(title: str, table: list[Row], size: int, peer: str) -> None:
    width = max(len(row.name) for row in table)
    print(f"\n{title}")
    print(f"{'s':{width}}  median     min     max    MB/s  / {peer.split(',')[0]}")
    at = next((row.median for row in table if row.name == peer and row.seconds), None)
    for row in table:
        if not row.seconds:
            print(f"{row.name:{width}}  {TIMED_OUT if row.hung else 'missing'}")
            continue
        times = "  ".join(f"{value:6.2f}" for value in (row.median, min(row.seconds), max(row.seconds)))
        ratio = f"{at / row.median:6.2f}" if at else ""
        print(f"{row.name:{width}}  {times}  {size / row.median / 1e6:6.0f}  {ratio}")


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} CPU cores, {memory:.0f} GiB, load {load:.1f} at the start"


def version(*command: str) -> str:
    if not shutil.which(command[0]):
        return f"{command[0]} missing"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join((done.stdout + done.stderr).splitlines()[0].split()[:3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=2, help="size of the archive on loopback (2)")
    parser.add_argument("--repeats", type=int, default=3, help="times each program is run (3)")
    parser.add_argument(
        "--folder", type=Path, help="where to write; default: the system's for temporary files"
    )
    options = parser.parse_args()
    print(machine())
    print(
        f"Python {platform.python_version()}",
        *(f"{package} {importlib.metadata.version(package)}" for package in ("hpc-imagenet", "urllib3")),
        version("nginx", "-v"),
        version("aria2c", "--version"),
        version("curl", "--version"),
        version("wget", "--version"),
        sep=", ",
    )
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-download-", dir=options.folder) as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)  # nginx drops its privileges
        near, far, late = free_port(), free_port(), free_port()
        archive, slow = folder / "www" / FILE, folder / "far" / "far" / FILE
        md5, slow_md5 = write_archive(archive, int(options.gib * 1024) << 20), write_archive(slow, FAR_BYTES)
        with nginx(folder, near, far), delayed(late, far):
            # 16 pieces of the small archive need a smaller piece size; on loopback that would be slower.
            table, distant = rows(), rows("-k1M")
            measure(table, f"http://127.0.0.1:{near}", archive, md5, folder, options.repeats)
            measure(distant, f"http://127.0.0.1:{late}/far", slow, slow_md5, folder, options.repeats)
        size = archive.stat().st_size
        show(f"loopback, {size / 2**30:.1f} GiB, {options.repeats} times each", table, size, table[0].name)
        title = f"{DELAY * 1e3:.0f} ms later, {CAP / 1e6:.0f} MB/s a connection, {FAR_BYTES >> 20} MiB"
        show(f"{title}, {options.repeats} times each", distant, FAR_BYTES, "wget")


if __name__ == "__main__":
    main()
