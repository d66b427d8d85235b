"""Storage backend for a host behind ssh: `user@host:/path`, by rsync.

`ssh_connection` runs the commands. The host needs rsync, a POSIX shell, and GNU coreutils, findutils and
tar.

Files are transferred by rsync, which verifies that the received bytes are those it read; the hash is computed
on this machine meanwhile. Files that are stored already are hashed on the host, with b3sum where BLAKE3 is
needed. On a host without b3sum, an upload compares the SHA-256 of both sides, and verifying reads the bytes
over the connection.
Source: rsync(1), "--partial-dir", "--ignore-times".
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpc_imagenet.datastore.backends.ssh_connection import SshConnection
from hpc_imagenet.datastore.backends.storage_backend import (
    ProgressCallback,
    ProgressCounter,
    Reusable,
    StoredFile,
    UploadFile,
    UploadStats,
    check_size,
    require_incomplete,
    source_changed_error,
)
from hpc_imagenet.datastore.file_hash import BLOCK, digest_of, format_digest, hash_file, new_digest
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import BackgroundWriteback, sync_folder
from hpc_imagenet.io.tempdir import NodeTempDir

PARTIAL = ".sent-in-part"  # rsync's folder for interrupted files, beside their target
FETCHED = ".fetched.tmp"  # folder for downloaded files that are not verified yet
POLL = 0.02  # s between two checks whether a file has grown

_VERSION = re.compile(r"[^/.][^/]*/v[1-9][0-9]{0,8}")
# Write "$3" bytes of standard input to the file "$1"; fails if a broken connection truncated them.
_WRITE = 'cat > "$1" && test "$(wc -c < "$1")" -eq "$3" && sync "$1"'
# Print the first of the programs $2 and $3 that the host has, and its hashes of files in the folder $1.
_HASH = """for sum in "$2" "$3"; do command -v "$sum" >/dev/null && break; done ||
    { echo "$2 is missing on the host" >&2; exit 1; }
echo "$sum"; cd "$1" 2>/dev/null || exit 0
tr "\\n" "\\0" | xargs -0 -n 1 -P 4 "$sum" 2>/dev/null; true"""
_PROGRAMS = {
    "blake3": ("b3sum", "sha256sum"),
    "sha256": ("sha256sum", "sha256sum"),
    "md5": ("md5sum", "md5sum"),
}
_ALGORITHM_OF = {"b3sum": "blake3", "sha256sum": "sha256", "md5sum": "md5"}


class SshBackend:
    """A folder on another host; see `StorageBackend`.

    Raises:
        UserError: the URL has another form, or ssh or rsync is missing on this machine.
    """

    folder: Path | None = None

    def __init__(self, url: str) -> None:
        self._ssh = SshConnection(url)
        self.url = self._ssh.url

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions ever started."""
        output = self._ssh.run(
            'test -d "$1" || exit 0; cd "$1" && find . -ignore_readdir_race -mindepth 1 -maxdepth $2 -type d '
            '-printf "%P\\0" -not -readable -prune',  # a datastore of another user is left out
            *([self._ssh.remote_path(name), "1"] if name else [self._ssh.root, "2"]),
        )
        folders = [os.fsdecode(entry) for entry in output.split(b"\0") if entry]
        paths = [f"{name}/{folder}" if name else folder for folder in folders]
        return sorted(path for path in paths if _VERSION.fullmatch(path))

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the contents of the files that exist and may be read, by path; transferred as one tar."""
        if not paths:
            return {}
        output = self._ssh.run(
            'cd "$1" 2>/dev/null || exit 0; '
            'while IFS= read -r f; do test -f "$f" && test -r "$f" && printf "%s\\0" "$f"; done | '
            "tar -cf - --null --no-recursion -T -",
            self._ssh.root,
            data=_lines(paths),
        )
        contents = {}
        with tarfile.open(fileobj=io.BytesIO(output or bytes(1024))) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    contents[member.name] = file.read()
        return contents

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all files below `path`."""
        output = self._ssh.run(
            'test -d "$1" || exit 0; cd "$1" && find . -ignore_readdir_race -type f -printf "%s %T@ %P\\0"',
            self._ssh.remote_path(path),
        )
        entries = (os.fsdecode(entry).split(" ", 2) for entry in output.split(b"\0") if entry)
        return {name: StoredFile(int(size), float(modified)) for size, modified, name in entries}

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Create the folder `path` with a file in it, by renaming a temporary folder with that file."""
        folder = self._ssh.remote_path(path)
        draft = _draft(folder)
        output = self._ssh.run(
            f'mkdir -p "$2" && {_WRITE} && '
            'if mv -T "$2" "$4"; then echo created; else rm -rf "$2"; test -d "$4"; fi',
            *(f"{draft}/{name}", draft, str(len(data)), folder),
            data=data,
        )
        return output == b"created\n"

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file atomically unless it exists, by hard-linking a temporary file."""
        target = self._ssh.remote_path(path)
        output = self._ssh.run(
            f'{_WRITE} && if ln -T "$1" "$2"; then echo created; else test -e "$2"; fi; '
            'code=$?; rm -f "$1"; exit $code',
            *(_draft(target), target, str(len(data))),
            data=data,
        )
        # If a connection broke after the file was created, the retry finds the file of the first attempt.
        return output == b"created\n" or self.read([path]).get(path) == data

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, in this order."""
        self._ssh.run(
            'cd "$1" && while IFS= read -r f; do rm -f "$f" || exit 1; done',
            self._ssh.root,
            data=_lines(paths),
        )

    def remove_partial(self, path: str) -> None:
        """Remove temporary files, and the interrupted files that rsync has kept."""
        self._ssh.run(
            'find "$1" \\( -name "$2" -o -name ".*.tmp" \\) -prune -exec rm -rf {} +',
            self._ssh.remote_path(path),
            PARTIAL,
        )

    def delete_all(self, path: str, keep: str) -> None:
        """Remove everything below `path` except the file `keep`."""
        self._ssh.run(
            'cd "$1" && find . -mindepth 1 -not -path "./$2" -delete', self._ssh.remote_path(path), keep
        )

    @contextlib.contextmanager
    def lock(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Do nothing: rsync writes to a temporary name and renames complete files."""
        yield

    def send(
        self, items: Sequence[UploadFile], path: str, reusable: Reusable, progress: ProgressCallback
    ) -> UploadStats:
        """Upload files to the folder `path`."""
        stats = UploadStats()
        for item in items:
            check_size(item)
        stored = self.files(path)
        same_size = [
            item
            for item in items
            if item.file.path in stored and stored[item.file.path].bytes == item.file.bytes
        ]
        progress(0, "checking stored files")
        unverified = [item.file for item in same_size if item.file.path not in reusable.verified]
        hashes = self._hashes(path, unverified)
        missing = []
        for item in items:
            file = item.file
            if item in same_size and (
                file.path in reusable.verified or _is_same(item, hashes.get(file.path))
            ):
                stats.kept += file.bytes
            elif not self._link_older(item, path, reusable):
                missing.append(item)
            else:
                stats.reused += file.bytes
        if missing:
            self._transfer(missing, path, lambda done: progress(stats.total + done, "sending"))
        stats.copied += sum(item.file.bytes for item in missing)
        progress(stats.total, "")
        return stats

    def fetch(self, path: str, file: File, target: Path, progress: Callable[[int], None]) -> None:
        """Download a file to `target`; rsync resumes a partial file of an earlier attempt."""
        part = target.with_name(f".{target.name}.part")
        for retry in (True, False):
            before = part.stat().st_size if part.exists() else 0
            # rsync compares the partial file by its own checksums; the hash is then read from the page cache.
            self._ssh.rsync(
                f"fetching {path}",
                ["--inplace", self._ssh.rsync_path(path), str(part)],
                lambda done, before=before: progress(max(before, done)),  # type: ignore[misc]
            )
            damage = file.damage(f"{self.url}/{path}", hash_file(part, file, lambda done: None))
            if damage is None:
                with part.open("rb") as reader:
                    os.fsync(reader.fileno())
                part.replace(target)
                sync_folder(target.parent)
                progress(file.bytes)
                return
            part.unlink()
            if not retry:
                raise UserError(damage)

    def fetch_all(self, path: str, files: Sequence[File], folder: Path, counter: ProgressCounter) -> None:
        """Download files by one rsync and hash them as they arrive; see `SupportsBatchFetch`."""
        if not files:
            return
        part, ended = folder / FETCHED, threading.Event()
        part.mkdir(exist_ok=True)
        with contextlib.closing(NodeTempDir("rsync")) as temporary, counter.threads(1) as threads:
            names = temporary.folder / "names"
            names.write_bytes(b"".join(file.path.encode() + b"\0" for file in files))
            hashing = threads.submit(_hash_arriving, part, sorted(files, key=_rsync_order), ended, counter)
            try:
                options = ["--inplace", "--from0", f"--files-from={names}"]
                self._ssh.rsync(f"fetching {path}", [*options, f"{self._ssh.rsync_path(path)}/", f"{part}/"])
            finally:
                ended.set()
            hashes = hashing.result()
        for file in files:
            arrived, target = part / file.path, folder / file.path
            verified = hashes[file.path] == file.hash
            # rsync may have changed the beginning of a resumed file after it was hashed: hash it again.
            if verified or hash_file(arrived, file, lambda done: None) == file.hash:
                arrived.replace(target)
            else:
                self.fetch(f"{path}/{file.path}", file, target, lambda done: None)
        for parent in {(folder / file.path).parent for file in files}:
            sync_folder(parent)
        shutil.rmtree(part)

    def hash(self, path: str, file: File, progress: Callable[[int], None]) -> str | None:
        """Return the file's hash, computed on the host if that has a program for it."""
        folder, _, name = path.rpartition("/")
        value = self._hashes(folder, [File(name, file.bytes, file.hash)]).get(name)
        if value is not None and digest_of(file).name != value.partition(":")[0]:
            with contextlib.closing(NodeTempDir("verify")) as temporary:
                copy = temporary.folder / name
                self._ssh.rsync(f"reading {path}", [self._ssh.rsync_path(path), str(copy)], progress)
                value = hash_file(copy, file, lambda done: None)
        progress(file.bytes)
        return value

    def _hashes(self, path: str, files: Sequence[File]) -> dict[str, str]:
        """Return the hashes of the files that exist, by path, computed on the host.

        They are by the algorithm of `file.hash`, or SHA-256 if the host has no program for BLAKE3.
        """
        hashes = {}
        for algorithm in sorted({digest_of(file).name for file in files}):
            paths = [file.path for file in files if file.hash.startswith(f"{algorithm}:")]
            output = self._ssh.run(
                _HASH, *(self._ssh.remote_path(path), *_PROGRAMS[algorithm]), data=_lines(paths)
            )
            used, *lines = os.fsdecode(output).splitlines()
            for line in lines:
                value, _, name = line.partition(" ")
                hashes[name[1:]] = f"{_ALGORITHM_OF[used]}:{value}"
        return hashes

    def _link_older(self, item: UploadFile, path: str, reusable: Reusable) -> bool:
        """Hard-link the file to the same file of an older version, if that still has its hash."""
        file = item.file
        for older in reusable.older.get(File("", file.bytes, file.hash), ()):
            folder, _, name = older.rpartition("/")
            if not _is_same(item, self._hashes(folder, [File(name, file.bytes, file.hash)]).get(name)):
                continue
            require_incomplete(self, path)
            target = self._ssh.remote_path(f"{path}/{file.path}")
            output = self._ssh.run(
                'mkdir -p "$1" && ln -fT "$2" "$3" && echo linked; true',
                *(target.rpartition("/")[0], self._ssh.remote_path(older), target),
            )
            if output == b"linked\n":
                return True
        return False

    def _transfer(self, items: Sequence[UploadFile], path: str, progress: Callable[[int], None]) -> None:
        """Upload files by one rsync, and hash the sources meanwhile."""
        status_before = {item: item.source.stat() for item in items}
        with contextlib.closing(NodeTempDir("rsync")) as temporary, ThreadPoolExecutor(1) as threads:
            for item in items:  # rsync follows these links (-L)
                link = temporary.folder / item.file.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(item.source.absolute())
            hashing = [threads.submit(hash_file, item.source, item.file, lambda done: None) for item in items]
            try:
                # --ignore-times: a stored file of the same size and time was found to have another hash.
                options = ["--ignore-times", f"--partial-dir={PARTIAL}", "--chmod=F444"]
                ends = [f"{temporary.folder}/", f"{self._ssh.rsync_path(path)}/"]
                self._ssh.rsync(
                    "sending", [*options, *ends], progress, before=lambda: require_incomplete(self, path)
                )
            except BaseException as error:
                threads.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, UserError):
                    require_incomplete(self, path)  # whose upload then removed what rsync had kept
                raise
            for item, future in zip(items, hashing, strict=True):
                value, after, before, change = future.result(), item.source.stat(), status_before[item], ""
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    change = "modified while it was read"
                elif value != item.file.hash:
                    change = "different content"
                if change:
                    self.remove([f"{path}/{item.file.path}"])
                    raise source_changed_error(item, change)


def _is_same(item: UploadFile, found: str | None) -> bool:
    """Whether a stored file with the hash `found`, None if there is none, is the same as the source.

    Raises:
        UserError: the source had to be read, and differs from its manifest.
    """
    if found is None or found.partition(":")[0] == item.file.hash.partition(":")[0]:
        return found == item.file.hash
    known, other = digest_of(item.file), new_digest(found.partition(":")[0])
    with item.source.open("rb", buffering=0) as reader:
        while block := reader.read(BLOCK):
            known.update(block)
            other.update(block)
    if format_digest(known) != item.file.hash:
        raise source_changed_error(item, "different content")
    return format_digest(other) == found


def _hash_arriving(
    top: Path, files: Sequence[File], ended: threading.Event, counter: ProgressCounter
) -> dict[str, str]:
    """Hash files while rsync writes them.

    Args:
        top: folder that the files are written to.
        files: the files, in the order in which rsync writes them.
        ended: set when rsync has ended: files no longer grow.
        counter: counts the bytes hashed.

    Returns:
        Hashes of the bytes read, by path.
    """
    hashes, block = {}, memoryview(bytearray(BLOCK))
    for file in files:
        path, digest, done, progress = top / file.path, digest_of(file), 0, counter.for_file(file.path)
        while not path.exists() and not ended.wait(POLL):
            pass
        with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as reader:
            writeback = BackgroundWriteback(reader.fileno())
            while done < file.bytes:
                last = ended.is_set()
                if got := reader.readinto(block):
                    digest.update(block[:got])
                    done += got
                    writeback.written_up_to(done)
                    progress(done)
                elif last:
                    break
                else:
                    ended.wait(POLL)
            os.fsync(reader.fileno())
        hashes[file.path] = format_digest(digest)
    return hashes


def _rsync_order(file: File) -> tuple[str, str]:
    """Sort key in rsync's order: the files of a folder before those of its subfolders."""
    folder, _, name = file.path.rpartition("/")
    return folder, name


def _draft(path: str) -> str:
    """Return a temporary name beside `path`."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"


def _lines(paths: Sequence[str]) -> bytes:
    return "".join(f"{path}\n" for path in paths).encode()
