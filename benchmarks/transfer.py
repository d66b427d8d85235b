"""How long datasets take to and from a place, beside the programs that people use, in the same run.

    python benchmarks/transfer.py [--shards 32] [--mb 64] [--large-gb 4] [--repeats 3] [--folder DIR]

S3 is `rclone serve s3` over a folder, ssh an sshd with keys that are thrown away, both on loopback: server
and client share the CPUs, so that the client's CPU seconds a GB say more than the time. Every program gets as
many files or requests at a time. Ours verifies each file's SHA-256, in both directions; the peers compare
what their protocol does. All are whole processes, Python's start included, and take turns. Peers that are
missing are said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import servers

CONNECTIONS = 8
URL = "s3://bucket/x"
OURS = """
import json, sys
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.transport import Known, Piece
way, url, folder, files, connections = sys.argv[1:]
files = [File(*entry) for entry in json.loads(Path(files).read_text())]
place, folder = versions.locate(url, int(connections)), Path(folder)
if way == "up":
    place.claim("a/v1", "upload.json", b"{}")
    place.send([Piece(folder / f.path, f) for f in files], "a/v1", Known(0), lambda done, note: None)
else:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda f: place.fetch(f"a/v1/{f.path}", f, folder / f.path, lambda done: None), files))
"""


@dataclass
class Row:
    """One program on one way."""

    name: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def missing(self) -> bool:
        """Whether the program is not here."""
        return shutil.which(self.command[0]) is None


def write(folder: Path, count: int, size: int) -> list[list[object]]:
    """Write `count` files of `size` bytes; return path, bytes and hash of each."""
    folder.mkdir(parents=True)
    block, listed = random.Random(0).randbytes(1 << 20), []
    for number in range(count):
        digest, left, path = hashlib.sha256(), size, folder / f"shard-{number:05d}.tar"
        with path.open("wb") as file:
            while left:
                data = (number * 2**32 + left).to_bytes(8, "little") + block[8:]
                file.write(data[:left])
                digest.update(data[:left])
                left -= len(data[:left])
        listed.append([path.name, size, f"sha256:{digest.hexdigest()}"])
    return listed


def measure(row: Row) -> None:
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(row.command, capture_output=True, text=True, check=False)
    row.seconds.append(time.perf_counter() - begin)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    if done.returncode:
        raise SystemExit(f"{row.name}: exit code {done.returncode}: {done.stderr[-500:]}")


def compare(title: str, rows: list[Row], size: int, repeats: int, before: Callable[[], None]) -> list[str]:
    present = [row for row in rows if not row.missing]
    for _ in range(repeats):
        for row in present:
            before()
            os.sync()
            measure(row)
    mine = statistics.median(present[0].seconds)
    best = min(statistics.median(row.seconds) for row in present[1:])
    lines = []
    for row in rows:
        if row.missing:
            lines.append(f"{title:28} {row.name:22} missing")
            continue
        median = statistics.median(row.seconds)
        lines.append(
            f"{title:28} {row.name:22} {median:7.2f} {size / 1e6 / median:7.0f} "
            f"{statistics.median(row.cpu) / (size / 1e9):9.2f}"
        )
    lines[0] += f"   {best / mine:5.2f} x the best peer's speed"
    return lines


def s3_rows(way: str, local: Path, listed: Path, endpoint: str) -> list[Row]:
    s5cmd = ["s5cmd", f"--numworkers={CONNECTIONS}", f"--endpoint-url={endpoint}", "cp"]
    rclone = [servers.RCLONE or "rclone", "copy", f"--transfers={CONNECTIONS}", "--config="]
    there, remote = f"{rclone_name(endpoint)}/a/v1", f"{URL}/a/v1"
    ends = (f"{local}/", f"{remote}/") if way == "up" else (f"{remote}/*", f"{local}/")
    return [
        ours(way, URL, local, listed),
        Row("s5cmd cp", [*s5cmd, *ends]),
        Row("rclone copy", [*rclone, *((str(local), there) if way == "up" else (there, str(local)))]),
    ]


def ours(way: str, url: str, local: Path, listed: Path) -> Row:
    words = [way, url, str(local), str(listed), str(CONNECTIONS)]
    return Row("hpc_imagenet, SHA-256", [sys.executable, "-c", OURS, *words])


def rclone_name(endpoint: str) -> str:
    return f":s3,provider=Other,env_auth=true,endpoint='{endpoint}':{URL.removeprefix('s3://')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", type=int, default=32, help="files of the first set (32)")
    parser.add_argument("--mb", type=int, default=64, help="MB of each (64)")
    parser.add_argument("--large-gb", type=float, default=4, help="GB of the one file of the second set (4)")
    parser.add_argument("--repeats", type=int, default=3, help="of each, the median counts (3)")
    parser.add_argument("--folder", type=Path, help="where to work; three times the bytes")
    options = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([servers.BIN, os.environ["PATH"]])
    with tempfile.TemporaryDirectory(prefix="transfer-", dir=options.folder) as name:
        table = run(Path(name), options)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    for line in versions():
        print(line)
    print(f"{'':28} {'':22} {'s':>7} {'MB/s':>7} {'CPU s/GB':>9}")
    print("\n".join(table))


def versions() -> Iterator[str]:
    for command in (["s5cmd", "version"], [servers.RCLONE or "rclone", "version"], ["rsync", "--version"]):
        if shutil.which(command[0]):
            told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            yield f"{Path(command[0]).name} {told.splitlines()[0]}"


def run(top: Path, options: argparse.Namespace) -> list[str]:
    table = []
    sets = {
        f"{options.shards} x {options.mb} MB": (options.shards, options.mb * 10**6),
        f"1 x {options.large_gb:g} GB": (1, int(options.large_gb * 1e9)),
    }
    for words, (count, size) in sets.items():
        source, listed = top / "source", top / "files.json"
        listed.write_text(json.dumps(write(source, count, size)))
        for title, rows, before in ways(top, source, listed):
            table += compare(f"{title}, {words}", rows, count * size, options.repeats, before)
        shutil.rmtree(source)
    return table


def ways(top: Path, source: Path, listed: Path) -> Iterator[tuple[str, list[Row], Callable[[], None]]]:
    """Yield what is compared: a title, the programs, and what has to be done before each of them."""
    here, ssh, folder = top / "here", top / "ssh", top / "folder"

    def fresh(*gone: Path) -> None:
        for each in (here, *gone):
            shutil.rmtree(each, ignore_errors=True)
        here.mkdir()

    with servers.rclone(_bucket(top / "served")) as endpoint:
        _environment(endpoint)

        def empty() -> None:
            # Through the server, which remembers what lies in its folders.
            purge = [servers.RCLONE or "rclone", "purge", "--config=", rclone_name(endpoint)]
            subprocess.run(purge, capture_output=True, check=False)
            fresh()

        yield "to S3", s3_rows("up", source, listed, endpoint), empty
        yield "from S3", s3_rows("down", here, listed, endpoint), fresh
    shutil.rmtree(top / "served")
    if servers.SSHD:
        keys = top / "keys"
        keys.mkdir()
        with servers.sshd(keys) as shell:
            os.environ["RSYNC_RSH"] = shell
            at = f"there:{ssh}/a/v1/"
            plain = Row("rsync", ["sh", "-c", f"mkdir -p {ssh}/a/v1 && rsync -rt {source}/ {at}"])
            yield "to ssh", [ours("up", f"there:{ssh}", source, listed), plain], lambda: fresh(ssh)
            back = Row("rsync", ["rsync", "-rt", at, f"{here}/"])
            yield "from ssh", [ours("down", f"there:{ssh}", here, listed), back], fresh
        shutil.rmtree(keys)
    copy = f"mkdir -p {folder}/a && cp -r {source} {folder}/a/v1"
    rows = [
        ours("up", str(folder), source, listed),
        Row("cp", ["sh", "-c", copy]),
        Row("cp, sync", ["sh", "-c", f"{copy} && sync -f {folder}"]),
    ]
    yield "to a folder", rows, lambda: fresh(folder)
    fresh(folder, ssh)


def _bucket(folder: Path) -> Path:
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    return folder


def _environment(endpoint: str) -> None:
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": servers.KEY,
        "AWS_SECRET_ACCESS_KEY": servers.SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
