"""A bucket as the place of datastores: `s3://bucket/prefix`, on any server that speaks S3, by boto3.

Credentials, region, proxy and endpoint come from where boto3 looks for them: the environment (AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL …), ~/.aws, the machine's role. Objects get no ACL, so they are as private
as the bucket.

One thread reads a file, in order, and hashes it; others send what it has read. An object appears when its
last byte is there, so it is sent whole in one request, or in parts that are put together only after the hash
was found right: an object that is there has the hash that stands in its metadata. Parts of an upload that was
cut off are taken up again where their MD5, which is their ETag, is that of the file's bytes.
Sources: the guide to boto3's credentials; the S3 API reference, "Conditional writes", "Multipart upload".
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.transport import (
    BLOCK,
    Known,
    Piece,
    Sent,
    Stored,
    Tally,
    Tell,
    changed,
    check_size,
    digest_of,
    in_form,
)
from hpc_imagenet.durable import sync_folder
from hpc_imagenet.errors import UserError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

WHOLE = 64 << 20  # bytes up to which a file is sent in one request
PART = 16 << 20  # bytes of a part, more where there would be more than PARTS
PARTS = 10_000  # the most that S3 takes
MEMORY = 256 << 20  # bytes that are read and not sent yet
RANGE = 8 << 20  # bytes that are asked for at a time
_PIECE = 256 << 10  # bytes, small enough for a CPU's cache
ONE_COPY = 5 << 30  # bytes up to which the server copies in one request
TRIES = 9  # of each request: 0.5, 1, 2 … 20 s apart, a minute and a half at most
FIRST_TRIES = 3  # to reach a server that was not reached yet
TIMEOUT = 60.0  # s without a byte
HASH = "hash"  # of an object's metadata, in the manifest's form

_PASSING = {"RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_NOT_THERE = {"404", "NoSuchKey", "NotFound"}


class _Held(Exception):
    """An object is there already, so that it was not written."""


@dataclass
class _Begun:
    """A multipart upload: its id and those of its parts that are there, by number."""

    upload: str
    etags: dict[int, str] = field(default_factory=dict)


def client(setting: str, timeout: float, connections: int) -> Any:
    """Return boto3's client; every request is tried once, and again by whoever makes it.

    Args:
        setting: named by an error, such as datastore.url=s3://bucket.
        timeout: s without a byte after which a connection counts as broken.
        connections: how many are kept open.

    Raises:
        UserError: boto3 cannot make a client of what it finds.
    """
    # Imported here: a second, which nobody else has to wait for.
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        return Session().client(
            "s3",
            config=Config(
                connect_timeout=timeout,
                read_timeout=timeout,
                max_pool_connections=connections,
                retries={"total_max_attempts": 1},
                response_checksum_validation="when_required",  # the hash of the whole is ours
                s3={"payload_signing_enabled": False},  # a third hash of the same bytes
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{setting}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """Return what an error says without line breaks."""
    return " ".join(str(error).split())


class Bucket:
    """A prefix in a bucket; see `transport.Place`.

    Args:
        url: s3://bucket/prefix.
        connections: requests at a time.
        sleep: what waits between tries, for some s.

    Raises:
        UserError: the url holds a login or no bucket, or boto3 cannot make a client of what it finds.
    """

    folder: Path | None = None

    def __init__(self, url: str, connections: int, sleep: Callable[[float], object] = time.sleep) -> None:
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError(
                "datastore.url is s3://bucket/prefix without a login, ? or #: boto3 finds the login"
            )
        if not parts.netloc:
            raise UserError(f"datastore.url={url} names no bucket: s3://bucket/prefix")
        self.url = url.rstrip("/")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._client = client(f"datastore.url={url}", TIMEOUT, 2 * connections + 4)
        # boto3's own setting, for servers that do not know the newer checksums.
        self._checksums = self._client.meta.config.request_checksum_calculation != "when_required"
        self._connections = connections
        self._sleep = sleep
        self._reached = False
        self._conditional = True  # until the server shows that it has no conditional writes

    # What versions are made of

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions that were begun."""
        names = [name] if name else self._folders("")
        return sorted(
            f"{each}/{version}"
            for each in names
            for version in self._folders(f"{each}/")
            if version[:1] == "v" and version[1:].isascii() and version[1:].isdigit() and version[1] != "0"
        )

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those of the objects that are there."""

        def one(path: str) -> bytes | None:
            def get() -> bytes:
                found = self._client.get_object(**self._at(path))
                with contextlib.closing(found["Body"]) as body:
                    return bytes(body.read())

            try:
                return self._ask(f"reading {path}", get)
            except _Missing:
                return None

        with ThreadPoolExecutor(self._connections) as threads:
            found = zip(paths, threads.map(one, paths), strict=True)
            return {path: data for path, data in found if data is not None}

    def files(self, path: str) -> dict[str, Stored]:
        """Return all objects below `path`."""
        begin = len(self._key(f"{path}/"))
        return {
            entry["Key"][begin:]: Stored(entry["Size"], entry["LastModified"].timestamp())
            for entry in self._list(f"{path}/")
        }

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Write the object `name`, unless it is there, and say so where two could do it at once."""
        created = self.create(f"{path}/{name}", data)
        if created and self._conditional:
            # Once more: a server with conditional writes refuses it.
            with contextlib.suppress(_Held):
                self._put(f"{path}/{name}", data, {}, new=True)
                self._conditional = False
        if created and not self._conditional:
            log.warning(
                "%s: this server has no conditional writes: of two uploads of different images that begin "
                "at the same moment one may fail, and has to be asked for again",
                self.url,
            )
        return created

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object unless it is there."""
        if not self._conditional and self.read([path]):
            return False
        try:
            self._put(path, data, {}, new=True)
        except _Held:
            # The answer to a try of ours may have been lost, and the next one been refused.
            return self.read([path]).get(path) == data
        return True

    def remove(self, paths: Sequence[str]) -> None:
        """Remove objects, in this order."""
        for path in paths:
            at = self._at(path)
            with contextlib.suppress(_Missing):
                self._ask(f"removing {path}", lambda at=at: self._client.delete_object(**at))  # type: ignore[misc]

    def clear(self, path: str, keep: str) -> None:
        """Remove all objects below `path`, and the parts of uploads that were cut off, but for one object."""
        for upload in self._uploads(f"{path}/"):
            self._abort(upload["Key"], upload["UploadId"])
        with ThreadPoolExecutor(self._connections) as threads:
            gone = [f"{path}/{name}" for name in self.files(path) if name != keep]
            for _ in threads.map(lambda each: self.remove([each]), gone):
                pass

    @contextlib.contextmanager
    def turn(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Do nothing: two that send the same object make the same object."""
        yield

    # Sending

    def send(self, pieces: Sequence[Piece], path: str, known: Known, tell: Tell) -> Sent:
        """Bring all pieces below `path`; what the server has already it keeps or copies."""
        sent, tally = Sent(), Tally(tell)
        for piece in pieces:
            check_size(piece)
        there = self.files(path)
        begun = {} if not pieces else self._begun(f"{path}/")
        missing = []
        with ThreadPoolExecutor(self._connections) as threads:
            looked = threads.map(lambda piece: self._stands(piece.file, path, there, known), pieces)
            for piece, how in zip(pieces, looked, strict=True):
                if how is None:
                    missing.append(piece)
                    continue
                setattr(sent, how, getattr(sent, how) + piece.file.bytes)
                tally(piece.file.bytes, f"checking {piece.file.path}")
        with _Sending(self, path, there, begun, tally) as sending:
            for piece in missing:
                sending.file(piece)
        sent.copied += sum(piece.file.bytes for piece in missing)
        tally(0, "")
        return sent

    def _stands(self, file: File, path: str, there: dict[str, Stored], known: Known) -> str | None:
        """Say how a file came to be there without being sent: `kept`, `reused` or not at all."""
        stored = there.get(file.path)
        if stored and stored.bytes == file.bytes and self._proved(f"{path}/{file.path}", file):
            return "kept"
        for older in known.older.get(File("", file.bytes, file.hash), ()):
            with contextlib.suppress(_Missing, _Unable):
                if self._proved(older, file):
                    self._copy(older, f"{path}/{file.path}", file)
                    return "reused"
        return None

    def _proved(self, path: str, file: File) -> bool:
        """Whether an object has the hash: by its metadata, or by its ETag where that is the MD5."""
        try:
            found = self._ask(f"looking at {path}", lambda: self._client.head_object(**self._at(path)))
        except _Missing:
            return False
        if found["ContentLength"] != file.bytes:
            return False
        etag = "md5:" + found.get("ETag", "").strip('"')
        noted = {name.lower(): value for name, value in found.get("Metadata", {}).items()}  # some say Hash
        return file.hash in (noted.get(HASH), etag)

    def _copy(self, older: str, path: str, file: File) -> None:
        """Let the server copy an object."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=ONE_COPY, multipart_chunksize=1 << 30, max_concurrency=self._connections
        )
        at = self._at(path)
        self._ask(
            f"copying {older}",
            lambda: self._client.copy(
                self._at(older),
                at["Bucket"],
                at["Key"],
                ExtraArgs={"Metadata": {HASH: file.hash}, "MetadataDirective": "REPLACE"},
                Config=config,
            ),
        )
        if not self._proved(path, file):
            raise _Unable

    def _put(self, path: str, data: bytes | memoryview, more: dict[str, Any], new: bool) -> None:
        """Write an object in one request.

        Raises:
            _Held: it is there, though it should be `new`.
        """

        def put() -> None:
            only = {"IfNoneMatch": "*"} if new and self._conditional else {}
            self._client.put_object(**self._at(path), Body=data, **more, **only)

        try:
            self._ask(f"writing {path}", put)
        except _Unable:
            if not (new and self._conditional):
                raise
            self._conditional = False
            self._ask(f"writing {path}", put)

    def _begun(self, path: str) -> dict[str, _Begun]:
        """Return the multipart uploads that were cut off, the newest of each path relative to `path`."""
        begin = len(self._key(path))
        uploads = sorted(self._uploads(path), key=lambda upload: str(upload.get("Initiated", "")))
        found = {}
        for upload in uploads:
            with contextlib.suppress(_Missing, _Unable):
                key, parts = upload["Key"], {}
                for page in self._pages("list_parts", Key=key, UploadId=upload["UploadId"]):
                    for part in page.get("Parts", ()):
                        parts[part["PartNumber"]] = part["ETag"].strip('"')
                found[key[begin:]] = _Begun(upload["UploadId"], parts)
        return found

    def _uploads(self, path: str) -> list[dict[str, Any]]:
        try:
            pages = self._pages("list_multipart_uploads", Prefix=self._key(path))
        except (_Missing, _Unable, UserError):  # not every server has the list, nor may everybody see it
            return []
        begin = self._key(path)
        return [
            upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"].startswith(begin)
        ]

    def _abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(_Missing, _Unable):
            self._ask(
                "removing parts",
                lambda: self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload),
            )

    # Fetching

    def fetch(self, path: str, file: File, target: Path, tell: Callable[[int], None]) -> None:
        """Bring an object to `target`, in ranges that are asked for side by side and written in order."""
        part = target.with_name(f".{target.name}.part")
        for again in (True, False):
            with part.open("ab+", buffering=0) as writer:
                digest, done = digest_of(file), 0
                while block := os.pread(writer.fileno(), BLOCK, done):  # of an earlier try
                    digest.update(block)
                    done += len(block)
                tell(done)
                for data in self._ranges(path, file, done) if done <= file.bytes else ():
                    writer.write(data)
                    digest.update(data)
                    done += len(data)
                    tell(done)
                os.fsync(writer.fileno())
            if in_form(digest) == file.hash:
                part.replace(target)
                sync_folder(target.parent)
                return
            part.unlink()  # and once more from the beginning: an earlier try may have left it wrong
            if not again:
                raise UserError(f"{self.url}/{path} has other bytes than when it was made: {in_form(digest)}")

    def hash(self, path: str, file: File, tell: Callable[[int], None]) -> str | None:
        """Read an object and return its hash."""
        digest, done = digest_of(file), 0
        try:
            size = self._ask(f"looking at {path}", lambda: self._client.head_object(**self._at(path)))
            for data in self._ranges(path, File(file.path, size["ContentLength"], file.hash), 0):
                digest.update(data)
                done += len(data)
                tell(done)
        except _Missing:
            return None
        return in_form(digest)

    def _ranges(self, path: str, file: File, begin: int) -> Iterator[memoryview]:
        """Yield the bytes of an object from `begin` on, in order; each block until the next is asked for."""
        starts = range(begin, file.bytes, RANGE)
        free = deque(memoryview(bytearray(RANGE)) for _ in starts[: self._connections + 1])
        waiting: deque[tuple[Future[memoryview], memoryview]] = deque()
        with _pool(self._connections) as threads:
            for start in starts:
                if not free:
                    future, block = waiting.popleft()
                    yield future.result()
                    free.append(block)
                block = free.popleft()
                size = min(file.bytes - start, RANGE)
                waiting.append((threads.submit(self._range, path, start, block[:size]), block))
            while waiting:
                yield waiting.popleft()[0].result()

    def _range(self, path: str, begin: int, block: memoryview) -> memoryview:
        """Fill `block` with the bytes of an object from `begin` on."""

        def get() -> memoryview:
            last = begin + len(block) - 1
            found, done = self._client.get_object(**self._at(path), Range=f"bytes={begin}-{last}"), 0
            with contextlib.closing(found["Body"]) as body:
                while data := body.read(_PIECE):
                    if done + len(data) > len(block):
                        raise _Short("more bytes came than were asked for")
                    block[done : done + len(data)] = data
                    done += len(data)
            if done != len(block):
                raise _Short(f"{done} bytes came instead of {len(block)}")
            return block

        try:
            return self._ask(f"reading {path}", get)
        except _Missing:
            raise UserError(f"{self.url}/{path} is missing") from None

    # Asking

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(path)}

    def _folders(self, path: str) -> list[str]:
        begin = len(self._key(path))
        pages = self._pages("list_objects_v2", Prefix=self._key(path), Delimiter="/")
        return [
            entry["Prefix"][begin:].rstrip("/") for page in pages for entry in page.get("CommonPrefixes", ())
        ]

    def _list(self, path: str) -> Iterable[dict[str, Any]]:
        pages = self._pages("list_objects_v2", Prefix=self._key(path))
        return [entry for page in pages for entry in page.get("Contents", ())]

    def _pages(self, operation: str, **words: Any) -> list[dict[str, Any]]:
        paginator = self._client.get_paginator(operation)
        return self._ask("listing", lambda: list(paginator.paginate(Bucket=self._bucket, **words)))

    def _ask(self, what: str, call: Callable[[], Result]) -> Result:
        """Call, and call again while the trouble is one that passes.

        Raises:
            _Missing: there is no such object.
            _Held: a condition was not met.
            _Unable: the server does not know such a request.
            UserError: anything else, or the trouble did not pass.
        """
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
        from botocore.exceptions import ConnectionError as NotConnected
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        # Also an answer that is no XML, or that ends before its end.
        passing = (
            HTTPClientError,
            NotConnected,
            IncompleteReadError,
            ResponseParserError,
            HTTPError,
            OSError,
            _Short,
        )
        failures = 0
        while True:
            try:
                result = call()
            except ClientError as error:
                self._reached = True
                trouble = self._judge(what, error)
            except passing as error:
                trouble = one_line(error)
            except BotoCoreError as error:
                raise UserError(f"datastore.url={self.url}: {one_line(error)}") from None
            else:
                self._reached = True
                return result
            failures += 1
            if failures >= (TRIES if self._reached else FIRST_TRIES):
                raise UserError(
                    f"datastore.url={self.url}: {what}: {trouble}, {failures} tries in a row; "
                    "what is there stays: ask again to go on"
                )
            wait = min(20.0, 2.0 ** (failures - 2)) * random.uniform(0.75, 1.25)
            log.warning("%s: %s: %s; again in %.1f s", self.url, what, trouble, wait)
            self._sleep(wait)

    def _judge(self, what: str, error: Any) -> str:
        """Return what passes of the server's answers, in words, and raise the others."""
        said = error.response.get("Error", {})
        code, words = str(said.get("Code", "")), one_line(Exception(said.get("Message", "")))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        if code == "NoSuchBucket":
            raise UserError(f"datastore.url={self.url}: there is no bucket {self._bucket}: make it first")
        if code in _NOT_THERE or code == "NoSuchUpload":
            raise _Missing
        if status == 412:
            raise _Held
        if status == 501 or code == "NotImplemented":
            raise _Unable
        if status in (408, 409, 429) or status >= 500 or code in _PASSING:
            return f"the server answers {status} {code}".rstrip()
        if code in _EXPIRED:
            raise UserError(
                f"datastore.url={self.url}: the credentials have expired ({code}): renew them and ask again; "
                "what is there stays"
            )
        if status in (401, 403):
            raise UserError(
                f"datastore.url={self.url}: {what} is forbidden ({code}): look at the credentials that boto3 "
                "finds and at the bucket's rights"
            )
        raise UserError(f"datastore.url={self.url}: {what}: {code} {words}".rstrip())


class _Missing(Exception):
    """There is no such object."""


class _Unable(Exception):
    """The server does not know such a request."""


class _Short(Exception):
    """A body ended before its end."""


class _Sending:
    """Files on their way: read and hashed by the caller's thread, sent by others.

    Use as a context; all is there when it has ended well.
    """

    def __init__(
        self,
        bucket: Bucket,
        path: str,
        there: dict[str, Stored],
        begun: dict[str, _Begun],
        tally: Tally,
    ) -> None:
        self._bucket, self._path, self._there, self._begun = bucket, path, there, begun
        self._tally = tally
        self._senders = ThreadPoolExecutor(bucket._connections)
        self._finishers = ThreadPoolExecutor(bucket._connections)
        self._room = threading.Semaphore(MEMORY // PART)
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> _Sending:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            for pool in (self._senders, self._finishers):
                pool.shutdown(cancel_futures=True)

    def file(self, piece: Piece) -> None:
        """Send a file; return when it is read.

        Raises:
            UserError: it is not what its manifest says, or an earlier one could not be sent.
        """
        with piece.source.open("rb", buffering=0) as reader:
            before = os.fstat(reader.fileno())
            digest = digest_of(piece.file)

            def check() -> None:
                after = os.fstat(reader.fileno())
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise changed(piece, "written to while it was read")
                if in_form(digest) != piece.file.hash:
                    raise changed(piece, "other bytes")

            if piece.file.bytes <= WHOLE:
                size = piece.file.bytes
                self._take(size)
                try:
                    data = _read(reader, size)
                    digest.update(data)
                    check()
                except BaseException:
                    self._give(size)
                    raise
                self._later(self._senders.submit(self._put, piece, data))
            else:
                self._parts(piece, reader, digest, check)

    def _put(self, piece: Piece, data: bytes) -> None:
        bucket, file = self._bucket, piece.file
        more: dict[str, Any] = {"Metadata": {HASH: file.hash}}
        algorithm, _, value = file.hash.partition(":")
        if algorithm == "sha256" and bucket._checksums:
            import base64

            more["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(value)).decode()
        path = f"{self._path}/{file.path}"
        try:
            bucket._put(path, data, more, new=file.path not in self._there)
        except _Held:
            self._by_another(path, file)
        finally:
            self._give(len(data))
        self._tally(len(data), f"sending {file.path}")

    def _parts(self, piece: Piece, reader: Any, digest: Any, check: Callable[[], None]) -> None:
        bucket, file = self._bucket, piece.file
        at = bucket._at(f"{self._path}/{file.path}")
        size = max(PART, -(-file.bytes // PARTS >> 20 << 20))
        begun = self._begun.get(file.path)
        if begun is None:
            more = {"ChecksumAlgorithm": "CRC32"} if bucket._checksums else {}
            made = bucket._ask(
                f"beginning {file.path}",
                lambda: bucket._client.create_multipart_upload(**at, Metadata={HASH: file.hash}, **more),
            )
            begun = _Begun(made["UploadId"])
        parts = []
        for number, start in enumerate(range(0, file.bytes, size), 1):
            length = min(size, file.bytes - start)
            self._take(length)
            try:
                data = _read(reader, length)
                digest.update(data)
            except BaseException:
                self._give(length)
                raise
            parts.append(self._senders.submit(self._part, at, file, begun, number, data))
            self._later(parts[-1])
        check()  # else nothing is put together, and the parts are found and replaced by the next try
        self._later(self._finishers.submit(self._finish, at, file, begun, parts))

    def _part(
        self, at: dict[str, str], file: File, begun: _Begun, number: int, data: bytes
    ) -> dict[str, Any]:
        bucket = self._bucket
        try:
            there = begun.etags.get(number)
            if there and there == hashlib.md5(data, usedforsecurity=False).hexdigest():
                return {"PartNumber": number, "ETag": f'"{there}"'}
            answer = bucket._ask(
                f"sending {file.path}",
                lambda: bucket._client.upload_part(**at, UploadId=begun.upload, PartNumber=number, Body=data),
            )
            sums = {"ChecksumCRC32": answer["ChecksumCRC32"]} if "ChecksumCRC32" in answer else {}
            return {"PartNumber": number, "ETag": answer["ETag"], **sums}
        except _Missing:  # put together, or swept, by another; what there is is looked at in the end
            return {"PartNumber": number, "ETag": ""}
        finally:
            self._give(len(data))
            self._tally(len(data), f"sending {file.path}")

    def _finish(
        self, at: dict[str, str], file: File, begun: _Begun, parts: list[Future[dict[str, Any]]]
    ) -> None:
        bucket, path = self._bucket, f"{self._path}/{file.path}"
        told = [part.result() for part in parts]
        new = file.path not in self._there

        def complete() -> None:
            only = {"IfNoneMatch": "*"} if new and bucket._conditional else {}
            bucket._client.complete_multipart_upload(
                **at, UploadId=begun.upload, MultipartUpload={"Parts": told}, **only
            )

        try:
            bucket._ask(f"completing {file.path}", complete)
        except (_Missing, _Held):
            self._by_another(path, file)
        except _Unable:
            new = False
            bucket._ask(f"completing {file.path}", complete)

    def _by_another(self, path: str, file: File) -> None:
        """Accept an object that another upload, or a try of ours whose answer was lost, has put there."""
        if not self._bucket._proved(path, file):
            raise UserError(f"{self._bucket.url}/{path} was written by another upload meanwhile: ask again")

    def _later(self, future: Future[Any]) -> None:
        """Look at what has ended, and note one more that has to."""
        self._waiting.append(future)
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _take(self, size: int) -> None:
        # Only this thread takes, so that it cannot hold some and wait for ever for the rest.
        for _ in range(_units(size)):
            self._room.acquire()

    def _give(self, size: int) -> None:
        self._room.release(_units(size))


def _units(size: int) -> int:
    return max(1, min(-(-size // PART), MEMORY // PART))


def _read(reader: Any, size: int) -> bytes:
    """Read so many bytes, or less at the end of the file."""
    data = bytearray(size)
    done = 0
    with memoryview(data) as view:
        while done < size and (got := reader.readinto(view[done:])):
            done += got
    return data if done == size else data[:done]  # type: ignore[return-value]


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
