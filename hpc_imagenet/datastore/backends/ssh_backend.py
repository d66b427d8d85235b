"""A host behind ssh as the place of datastores: `user@host:/path`, by rsync.

`ssh.py` asks the host. The other side needs rsync, a POSIX shell and the find, stat, mv and md5sum or
sha256sum of GNU.

Files travel through rsync, which compares what arrived with what it read; the hash is computed here at the
same time. What was sent before is proved over there, where it lies.
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
    BLOCK,
    ProgressCounter,
    Reusable,
    StoredFile,
    Tell,
    UploadFile,
    UploadStats,
    check_size,
    format_digest,
    hash_file,
    new_digest,
    source_changed_error,
)
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import BackgroundWriteback, sync_folder
from hpc_imagenet.io.tempdir import NodeTempDir

PARTIAL = ".sent-in-part"  # where rsync keeps a file that was cut off, beside its place
FETCHED = ".fetched.tmp"  # where files lie that were not proved yet
LOOK = 0.02  # s between two looks whether more has come

_VERSION = re.compile(r"[^/.][^/]*/v[1-9][0-9]{0,8}")
# A file "$1" of "$3" bytes from standard input: what a broken connection leaves of it is not taken for it.
_WRITE = 'cat > "$1" && test "$(wc -c < "$1")" -eq "$3" && sync "$1"'


class SshBackend:
    """A folder on another host; see `transport.Place`.

    Raises:
        UserError: the url has another form, or ssh or rsync is missing here.
    """

    folder: Path | None = None

    def __init__(self, url: str) -> None:
        self._shell = SshConnection(url)
        self.url = self._shell.url

    def _run(self, script: str, *words: str, data: bytes = b"") -> bytes:
        return self._shell.run(script, *words, data=data)

    def _at(self, path: str) -> str:
        return self._shell.at(path)

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions that were begun."""
        told = self._run(
            'test -d "$1" || exit 0; cd "$1" && find . -mindepth $2 -maxdepth $2 -type d -printf "%P\\0"',
            *([self._at(name), "1"] if name else [self._shell.root, "2"]),
        )
        found = [entry.decode() for entry in told.split(b"\0") if entry]
        paths = [f"{name}/{entry}" if name else entry for entry in found]
        return sorted(path for path in paths if _VERSION.fullmatch(path))

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those of the files that are there, in one go, as a tar."""
        if not paths:
            return {}
        told = self._run(
            'cd "$1" 2>/dev/null || exit 0; '
            'while IFS= read -r f; do test -f "$f" && printf "%s\\0" "$f"; done | '
            "tar -cf - --null --no-recursion -T -",
            self._shell.root,
            data=_lines(paths),
        )
        found = {}
        with tarfile.open(fileobj=io.BytesIO(told or bytes(1024))) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    found[member.name] = file.read()
        return found

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all files below `path`."""
        told = self._run(
            'test -d "$1" || exit 0; cd "$1" && find . -type f -printf "%s %T@ %P\\0"', self._at(path)
        )
        entries = (entry.decode().split(" ", 2) for entry in told.split(b"\0") if entry)
        return {name: StoredFile(int(size), float(when)) for size, when, name in entries}

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Make the folder `path` with a file in it, by renaming one that has it."""
        folder = self._at(path)
        draft = _draft(folder)
        told = self._run(
            f'mkdir -p "$2" && {_WRITE} && '
            'if mv -T "$2" "$4"; then echo mine; else rm -rf "$2"; test -d "$4"; fi',
            *(f"{draft}/{name}", draft, str(len(data)), folder),
            data=data,
        )
        return told == b"mine\n"

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless it is there, by a second name for one that is written."""
        target = self._at(path)
        told = self._run(
            f'{_WRITE} && if ln -T "$1" "$2"; then echo mine; else test -e "$2"; fi; '
            'was=$?; rm -f "$1"; exit $was',
            *(_draft(target), target, str(len(data))),
            data=data,
        )
        # The answer to a try of ours may have been lost, and the next one come too late.
        return told == b"mine\n" or self.read([path]).get(path) == data

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, in this order."""
        self._run(
            'cd "$1" && while IFS= read -r f; do rm -f "$f" || exit 1; done',
            self._shell.root,
            data=_lines(paths),
        )

    def remove_partial(self, path: str) -> None:
        """Remove temporary files, and what rsync has kept of files that were cut off."""
        self._run(
            'find "$1" \\( -name "$2" -o -name ".*.tmp" \\) -prune -exec rm -rf {} +', self._at(path), PARTIAL
        )

    def delete_all(self, path: str, keep: str) -> None:
        """Remove all below `path` but the file `keep`."""
        self._run('cd "$1" && find . -mindepth 1 -not -path "./$2" -delete', self._at(path), keep)

    @contextlib.contextmanager
    def lock(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Do nothing: rsync writes under a name of its own, and renames what is whole."""
        yield

    def send(self, pieces: Sequence[UploadFile], path: str, known: Reusable, tell: Tell) -> UploadStats:
        """Bring all pieces into the folder `path`."""
        sent = UploadStats()
        for piece in pieces:
            check_size(piece)
        there = self.files(path)
        fits = [
            piece
            for piece in pieces
            if piece.file.path in there and there[piece.file.path].bytes == piece.file.bytes
        ]
        tell(0, "checking what is there")
        looked = [piece.file for piece in fits if piece.file.path not in known.vouched]
        hashes = self._hashes(path, looked)
        missing = []
        for piece in pieces:
            file = piece.file
            if piece in fits and (file.path in known.vouched or hashes.get(file.path) == file.hash):
                sent.kept += file.bytes
            elif not self._reuse(file, path, known):
                missing.append(piece)
            else:
                sent.reused += file.bytes
        if missing:
            self._transfer(missing, path, lambda done: tell(sent.total + done, "sending"))
        sent.copied += sum(piece.file.bytes for piece in missing)
        tell(sent.total, "")
        return sent

    def fetch(self, path: str, file: File, target: Path, tell: Callable[[int], None]) -> None:
        """Bring a file to `target`; rsync goes on with what an earlier try has brought."""
        part = target.with_name(f".{target.name}.part")
        for again in (True, False):
            before = part.stat().st_size if part.exists() else 0
            # Compared with what is there by rsync's own sums; the hash is taken from the disk's cache.
            self._shell.rsync(
                f"fetching {path}",
                ["--inplace", self._shell.there(path), str(part)],
                lambda done, before=before: tell(max(before, done)),  # type: ignore[misc]
            )
            found = hash_file(part, file, lambda done: None)
            if found == file.hash:
                with part.open("rb") as opened:
                    os.fsync(opened.fileno())
                part.replace(target)
                sync_folder(target.parent)
                tell(file.bytes)
                return
            part.unlink()
            if not again:
                raise UserError(f"{self.url}/{path} has other bytes than when it was made: {found}")

    def fetch_all(self, path: str, files: Sequence[File], folder: Path, tally: ProgressCounter) -> None:
        """Bring files by one rsync, hashed while they arrive; see `transport.Batches`."""
        if not files:
            return
        part, ended = folder / FETCHED, threading.Event()
        part.mkdir(exist_ok=True)
        with contextlib.closing(NodeTempDir("rsync")) as told, ThreadPoolExecutor(1) as threads:
            names = told.folder / "names"
            names.write_bytes(b"".join(file.path.encode() + b"\0" for file in files))
            hashing = threads.submit(_follow, part, sorted(files, key=_order), ended, tally)
            try:
                words = ["--inplace", "--from0", f"--files-from={names}"]
                self._shell.rsync(f"fetching {path}", [*words, f"{self._shell.there(path)}/", f"{part}/"])
            finally:
                ended.set()
            hashes = hashing.result()
        for file in files:
            arrived, target = part / file.path, folder / file.path
            proved = hashes[file.path] == file.hash
            # Of a file that went on where it was cut, what was read at first may not be what it is now.
            if proved or hash_file(arrived, file, lambda done: None) == file.hash:
                arrived.replace(target)
            else:
                self.fetch(f"{path}/{file.path}", file, target, lambda done: None)
        for parent in {(folder / file.path).parent for file in files}:
            sync_folder(parent)
        shutil.rmtree(part)

    def hash(self, path: str, file: File, tell: Callable[[int], None]) -> str | None:
        """Let the other side read the file."""
        top, _, name = path.rpartition("/")
        found = self._hashes(top, [File(name, file.bytes, file.hash)]).get(name)
        tell(file.bytes)
        return found

    def _hashes(self, path: str, files: Sequence[File]) -> dict[str, str]:
        """Return the hashes of those of the files that are there, each read over there."""
        found = {}
        for algorithm in sorted({new_digest(file).name for file in files}):
            mine = [file.path for file in files if file.hash.startswith(f"{algorithm}:")]
            told = self._run(
                'command -v "$2" >/dev/null || { echo "no $2 there" >&2; exit 1; }; '
                'cd "$1" 2>/dev/null || exit 0; '
                'tr "\\n" "\\0" | xargs -0 -n 1 -P 4 "$2" -b 2>/dev/null; true',
                *(self._at(path), f"{algorithm}sum"),
                data=_lines(mine),
            )
            for line in told.decode().splitlines():
                value, _, name = line.partition(" *")
                found[name] = f"{algorithm}:{value}"
        return found

    def _reuse(self, file: File, path: str, known: Reusable) -> bool:
        """Make the file a second name of the same file of an older version, if that is still what it was."""
        for older in known.older.get(File("", file.bytes, file.hash), ()):
            top, _, name = older.rpartition("/")
            if self._hashes(top, [File(name, file.bytes, file.hash)]).get(name) != file.hash:
                continue
            target = self._at(f"{path}/{file.path}")
            told = self._run(
                'mkdir -p "$1" && ln -fT "$2" "$3" && echo linked; true',
                *(target.rpartition("/")[0], self._at(older), target),
            )
            if told == b"linked\n":
                return True
        return False

    def _transfer(self, pieces: Sequence[UploadFile], path: str, tell: Callable[[int], None]) -> None:
        """Send files by one rsync, and hash them meanwhile."""
        before = {piece: piece.source.stat() for piece in pieces}
        with contextlib.closing(NodeTempDir("rsync")) as staged, ThreadPoolExecutor(1) as threads:
            for piece in pieces:  # rsync follows these links (-L)
                link = staged.folder / piece.file.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(piece.source.absolute())
            hashing = [threads.submit(hash_file, p.source, p.file, lambda done: None) for p in pieces]
            try:
                # What looks the same was found to be something else: --ignore-times.
                options = ["--ignore-times", f"--partial-dir={PARTIAL}", "--chmod=F444"]
                ends = [f"{staged.folder}/", f"{self._shell.there(path)}/"]
                self._shell.rsync("sending", [*options, *ends], tell)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
            for piece, hashed in zip(pieces, hashing, strict=True):
                found, after, was, how = hashed.result(), piece.source.stat(), before[piece], ""
                if (was.st_size, was.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    how = "written to while it was read"
                elif found != piece.file.hash:
                    how = "other bytes"
                if how:
                    self.remove([f"{path}/{piece.file.path}"])
                    raise source_changed_error(piece, how)


def _follow(
    top: Path, files: Sequence[File], ended: threading.Event, tally: ProgressCounter
) -> dict[str, str]:
    """Hash files while they grow, until `ended` or all is there; return the hashes of what was read."""
    found, block = {}, memoryview(bytearray(BLOCK))
    for file in files:
        path, digest, done, tell = top / file.path, new_digest(file), 0, tally.of(file.path)
        while not path.exists() and not ended.wait(LOOK):
            pass
        with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as reader:
            flowing = BackgroundWriteback(reader.fileno())
            while done < file.bytes:
                last = ended.is_set()
                if got := reader.readinto(block):
                    digest.update(block[:got])
                    done += got
                    flowing.written_up_to(done)
                    tell(done)
                elif last:
                    break
                else:
                    ended.wait(LOOK)
            os.fsync(reader.fileno())
        found[file.path] = format_digest(digest)
    return found


def _order(file: File) -> tuple[str, str]:
    """Sort as rsync does: the files of a folder before those of the folders in it."""
    folder, _, name = file.path.rpartition("/")
    return folder, name


def _draft(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"


def _lines(paths: Sequence[str]) -> bytes:
    return "".join(f"{path}\n" for path in paths).encode()
