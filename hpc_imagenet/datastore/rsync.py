"""A host behind ssh as the place of datastores: `user@host:/path`, by rsync, which `sh` calls.

How to reach the host (port, keys, jump hosts, shared connections) stands in ~/.ssh/config, or RSYNC_RSH names
another command; nothing of it is a setting here, and no password is asked for. The other side needs rsync, a
POSIX shell and the find, stat, mv and md5sum or sha256sum of GNU.

Files travel through rsync, which compares what arrived with what it read; the hash is computed here at the
same time. What was sent before is proved over there, where it lies.
Sources: rsync(1), "--partial-dir", "--info=progress2", "EXIT VALUES"; ssh(1), "EXIT STATUS".
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import re
import shlex
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.transport import (
    Known,
    Piece,
    Sent,
    Stored,
    Tell,
    changed,
    check_size,
    digest_of,
    hash_of,
)
from hpc_imagenet.durable import sync_folder
from hpc_imagenet.errors import UserError

log = logging.getLogger(__name__)

PARTIAL = ".sent-in-part"  # where rsync keeps a file that was cut off, beside its place
PAUSE = 1.0  # s before the second try of a connection that broke, twice as long before each further one …
LONGEST = 20.0  # … up to this
TRIES = 7  # in a row without a byte more: about a minute in all
FIRST_TRIES = 3  # to reach a host that was not reached yet
TIMEOUT = 60  # s without a byte

_URL = re.compile(r"((?:[^@:/]+@)?[^@:/][^@:/]*):(?!:|[^/]*@)(.+)", re.DOTALL)
_PROGRESS = re.compile(rb"(?:^|\r|\n) *(\d+) +\d+%")
_BROKEN = {10, 12, 30, 35, 255}  # rsync's and ssh's codes for a connection that failed or ended


class Host:
    """A folder on another host; see `transport.Place`.

    Args:
        url: user@host:/path or host:path.

    Raises:
        UserError: the url has another form, or ssh or rsync is missing here.
    """

    folder: Path | None = None

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        if match is None or match[1].startswith("-") or "\n" in url:
            raise UserError(
                "datastore.url is no user@host:/path: a password, a port and :: have no place in it"
            )
        self.url = url.rstrip("/")
        self._host, self._root = match[1], match[2].rstrip("/") or "/"
        self._shell = os.environ.get("RSYNC_RSH") or "ssh -o BatchMode=yes"
        self._reached = False
        import sh

        self._errors: Any = sh.ErrorReturnCode
        try:
            words = shlex.split(self._shell)
            self._ssh: Any = sh.Command(words[0]).bake(*words[1:], self._host)
            self._rsync: Any = sh.Command("rsync").bake(
                "-rtL", "--no-h", f"--timeout={TIMEOUT}", "--info=progress2", "-e", self._shell
            )
        except sh.CommandNotFound as error:
            raise UserError(
                f"datastore.url={url} needs {error} here: install openssh-client and rsync"
            ) from None

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions that were begun."""
        at = f"{self._root}/{name}" if name else self._root
        depth = 1 if name else 2
        told = self._run(
            f"test -d {_q(at)} || exit 0; cd {_q(at)} && "
            f"find . -mindepth {depth} -maxdepth {depth} -type d -name 'v[1-9]*' -print0"
        )
        found = [entry.decode().removeprefix("./") for entry in told.split(b"\0") if entry]
        paths = [f"{name}/{entry}" if name else entry for entry in found]
        return sorted(path for path in paths if re.fullmatch(r"[^/.][^/]*/v[1-9][0-9]{0,8}", path))

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those of the files that are there, in one go, as a tar."""
        if not paths:
            return {}
        told = self._run(
            f"cd {_q(self._root)} 2>/dev/null || exit 0; "
            'while IFS= read -r f; do test -f "$f" && printf "%s\\0" "$f"; done | '
            "tar -cf - --null --no-recursion -T -",
            "".join(f"{path}\n" for path in paths).encode(),
        )
        found = {}
        with tarfile.open(fileobj=io.BytesIO(told or bytes(1024))) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    found[member.name.removeprefix("./")] = file.read()
        return found

    def files(self, path: str) -> dict[str, Stored]:
        """Return all files below `path`."""
        told = self._run(
            f"test -d {_q(self._at(path))} || exit 0; cd {_q(self._at(path))} && "
            "find . -type f -printf '%s %T@ %P\\0'"
        )
        entries = (entry.decode().split(" ", 2) for entry in told.split(b"\0") if entry)
        return {name: Stored(int(size), float(when)) for size, when, name in entries}

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Make the folder `path` with a file in it, by renaming one that has it."""
        folder = self._at(path)
        draft = _draft(folder)
        told = self._run(
            f"mkdir -p {_q(draft)} && cat > {_q(f'{draft}/{name}')} && sync {_q(f'{draft}/{name}')} && "
            f"if mv -T {_q(draft)} {_q(folder)} 2>/dev/null; then echo mine; "
            f"else rm -rf {_q(draft)}; test -d {_q(folder)}; fi",
            data,
        )
        return told == b"mine\n"

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless it is there, by a second name for one that is written."""
        target = self._at(path)
        draft = _draft(target)
        told = self._run(
            f"cat > {_q(draft)} && sync {_q(draft)} && "
            f"if ln -T {_q(draft)} {_q(target)} 2>/dev/null; then echo mine; else test -e {_q(target)}; fi; "
            f"was=$?; rm -f {_q(draft)}; exit $was",
            data,
        )
        # The answer to a try of ours may have been lost, and the next one come too late.
        return told == b"mine\n" or self.read([path]).get(path) == data

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, in this order."""
        self._run(
            f'cd {_q(self._root)} && while IFS= read -r f; do rm -f "$f" || exit 1; done', _lines(paths)
        )

    def tidy(self, path: str) -> None:
        """Remove what rsync has kept of files that were cut off."""
        self._run(f"cd {_q(self._at(path))} && find . -type d -name {PARTIAL} -prune -exec rm -rf {{}} +")

    def clear(self, path: str, keep: str) -> None:
        """Remove all below `path` but the file `keep`."""
        self._run(f"cd {_q(self._at(path))} && find . -mindepth 1 -not -path {_q(f'./{keep}')} -delete")

    @contextlib.contextmanager
    def turn(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Do nothing: rsync writes under a name of its own, and renames what is whole."""
        yield

    def send(self, pieces: Sequence[Piece], path: str, known: Known, tell: Tell) -> Sent:
        """Bring all pieces into the folder `path`."""
        sent = Sent()
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
            self._again(
                f"fetching {path}",
                lambda out: self._rsync(
                    "--inplace",
                    f"{self._host}:{self._at(path)}",
                    str(part),
                    _out=out,
                    _out_bufsize=0,
                    _env=_environment(),
                ),
                lambda done, before=before: tell(max(before, done)),  # type: ignore[misc]
            )
            found = hash_of(part, file, lambda done: None)
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

    def hash(self, path: str, file: File, tell: Callable[[int], None]) -> str | None:
        """Let the other side read the file."""
        top, _, name = path.rpartition("/")
        found = self._hashes(top, [File(name, file.bytes, file.hash)]).get(name)
        tell(file.bytes)
        return found

    def _hashes(self, path: str, files: Sequence[File]) -> dict[str, str]:
        """Return the hashes of those of the files that are there, each read over there."""
        found = {}
        for algorithm in sorted({digest_of(file).name for file in files}):
            mine = [file.path for file in files if file.hash.startswith(f"{algorithm}:")]
            told = self._run(
                f"command -v {algorithm}sum >/dev/null || {{ echo no {algorithm}sum there >&2; exit 1; }}; "
                f"cd {_q(self._at(path))} 2>/dev/null || exit 0; tr '\\n' '\\0' | "
                f"xargs -0 -n 1 -P 4 {algorithm}sum -b 2>/dev/null; true",
                _lines(mine),
            )
            for line in told.decode().splitlines():
                value, _, name = line.partition(" *")
                found[name] = f"{algorithm}:{value}"
        return found

    def _reuse(self, file: File, path: str, known: Known) -> bool:
        """Make the file a second name of the same file of an older version, if that is still what it was."""
        for older in known.older.get(File("", file.bytes, file.hash), ()):
            top, _, name = older.rpartition("/")
            if self._hashes(top, [File(name, file.bytes, file.hash)]).get(name) != file.hash:
                continue
            target = self._at(f"{path}/{file.path}")
            told = self._run(
                f"mkdir -p {_q(target.rpartition('/')[0])} && ln -fT {_q(self._at(older))} {_q(target)} "
                "2>/dev/null && echo linked; true"
            )
            if told == b"linked\n":
                return True
        return False

    def _transfer(self, pieces: Sequence[Piece], path: str, tell: Callable[[int], None]) -> None:
        """Send files by one rsync, and hash them meanwhile."""
        before = {piece: piece.source.stat() for piece in pieces}
        with tempfile.TemporaryDirectory(prefix="hpc_imagenet-") as staged, ThreadPoolExecutor(1) as threads:
            top = Path(staged)
            for piece in pieces:  # rsync follows these links (-L)
                link = top / piece.file.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(piece.source.absolute())
            hashing = [threads.submit(hash_of, p.source, p.file, lambda done: None) for p in pieces]
            try:
                self._again(
                    "sending",
                    lambda out: self._rsync(
                        "--ignore-times",  # what looks the same was found to be something else
                        f"--partial-dir={PARTIAL}",
                        "--chmod=F444",
                        f"{staged}/",
                        f"{self._host}:{self._at(path)}/",
                        _out=out,
                        _out_bufsize=0,
                        _env=_environment(),
                    ),
                    tell,
                )
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
                    raise changed(piece, how)

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _run(self, script: str, data: bytes = b"") -> bytes:
        """Run a script over there and return what it prints."""

        def call(out: Any) -> Any:
            return self._ssh(_q_all(script), _in=data, _return_cmd=True, _decode_errors="surrogateescape")

        return bytes(self._again("asking", call, None).stdout)

    def _again(self, what: str, call: Callable[[Any], Any], tell: Callable[[int], None] | None) -> Any:
        """Call ssh or rsync, and call again while the connection breaks.

        Raises:
            UserError: it ended badly, with the last line of what it said.
        """
        furthest, failures = 0, 0

        def out(chunk: bytes | str) -> None:
            nonlocal furthest, failures
            data = chunk.encode() if isinstance(chunk, str) else chunk
            if (found := _PROGRESS.findall(data)) and tell is not None:
                if int(found[-1]) > furthest:
                    furthest, failures = int(found[-1]), 0
                tell(int(found[-1]))

        while True:
            try:
                result = call(out)
                self._reached = True
                return result
            except self._errors as error:
                words = _last_line(error.stderr)
                code = error.exit_code
                if code in _BROKEN and not _for_good(words):
                    failures += 1
                    if failures < (TRIES if self._reached else FIRST_TRIES):
                        wait = min(LONGEST, PAUSE * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
                        log.warning("%s: %s: %s; again in %.1f s", self.url, what, words, wait)
                        time.sleep(wait)
                        continue
                    words = f"{words}, {failures} tries in a row; what is there stays: ask again to go on"
                raise UserError(f"datastore.url={self.url}: {what}: {words or f'exit code {code}'}") from None


def _for_good(words: str) -> bool:
    """Whether it makes no sense to try again."""
    return any(
        said in words
        for said in (
            "Permission denied",
            "verification failed",
            "Could not resolve",
            "No space left",
            "quota",
        )
    )


def _last_line(said: bytes) -> str:
    """Return the line that says why: the last one, or the one before rsync's own summary."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    telling = [
        line for line in lines if not line.startswith(("rsync error:", "rsync: connection unexpectedly"))
    ]
    full = [line for line in lines if "No space left" in line or "quota" in line]
    return (full or telling or lines or [""])[-1]


def _draft(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _lines(paths: Sequence[str]) -> bytes:
    return "".join(f"{path}\n" for path in paths).encode()


def _q(word: str) -> str:
    return shlex.quote(word)


def _q_all(script: str) -> str:
    # The login shell over there may be no POSIX shell.
    return f"exec sh -c {shlex.quote(script)}"
