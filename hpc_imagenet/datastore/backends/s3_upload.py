"""Sending files to a bucket: small ones whole, large ones in parts.

One thread reads a file, in order, and hashes it; others send what it has read. An object appears when its
last byte is there, so it is sent whole in one request, or in parts that are put together only after the hash
was found right: an object that is there has the hash that stands in its metadata. Parts of an upload that was
cut off are taken up again where their MD5, which is their ETag, is that of the file's bytes.
Source: the S3 API reference, "Multipart upload".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hpc_imagenet.datastore.backends.s3_client import (
    HASH,
    NotFound,
    NotImplementedByServer,
    PreconditionFailed,
    S3Client,
    check_response,
)
from hpc_imagenet.datastore.backends.storage_backend import (
    ProgressCounter,
    UploadFile,
    format_digest,
    new_digest,
    source_changed_error,
)
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

WHOLE = 64 << 20  # bytes up to which a file is sent in one request
PART = 16 << 20  # bytes of a part, more where there would be more than PARTS
PARTS = 10_000  # the most that S3 takes
MEMORY = 256 << 20  # bytes that are read and not sent yet


@dataclass
class MultipartUpload:
    """A multipart upload: its id and the ETags of its parts that are there, by number."""

    upload: str
    etags: dict[int, str] = field(default_factory=dict)
    taken_up: bool = False  # begun by an earlier try


def unfinished_uploads(server: S3Client, path: str) -> dict[str, MultipartUpload]:
    """Return the uploads that were cut off below `path`, the newest of each path relative to it."""
    begin = len(server.key(path))
    found = {}
    for upload in sorted(uploads(server, path), key=lambda each: str(each.get("Initiated", ""))):
        if upload.get("ChecksumAlgorithm") and not server.checksums:
            continue  # begun under another setting: it takes no parts without checksums
        with contextlib.suppress(NotFound, NotImplementedByServer):
            key, upload_id = upload["Key"], upload["UploadId"]
            pages = server.pages("list_parts", Key=key, UploadId=upload_id)
            parts = [part for page in pages for part in page.get("Parts", ())]
            found[key[begin:]] = MultipartUpload(
                upload_id, {part["PartNumber"]: part["ETag"].strip('"') for part in parts}, taken_up=True
            )
    return found


def uploads(server: S3Client, path: str) -> list[dict[str, Any]]:
    """Return all uploads below `path` that are not put together; none where the server does not tell."""
    begin = server.key(path)
    try:
        pages = server.pages("list_multipart_uploads", Prefix=begin)
    except (
        NotFound,
        NotImplementedByServer,
        UserError,
    ):  # not every server has the list, nor may everybody see it
        return []
    return [each for page in pages for each in page.get("Uploads", ()) if each["Key"].startswith(begin)]


def abort(server: S3Client, path: str) -> None:
    """Remove the parts of all uploads below `path` that are not put together."""
    for upload in uploads(server, path):
        with contextlib.suppress(NotFound, NotImplementedByServer):
            server.request(
                "removing parts",
                server.client.abort_multipart_upload,
                Bucket=server.bucket,
                Key=upload["Key"],
                UploadId=upload["UploadId"],
            )


def overwritten_error(server: S3Client, path: str) -> UserError:
    """Return the error that says so of an object."""
    return UserError(
        f"datastore.url={server.url}: {path} did not arrive whole, or another upload wrote it meanwhile; "
        "what is there stays: ask again to go on"
    )


class S3Upload:
    """Files on their way. Use as a context; all is there when it has ended well.

    Args:
        path: the folder, within the prefix, that they go to.
        there: paths in it of objects that are there and may be replaced.
        taken_up: uploads that were cut off, by path in it.
        tally: told of the bytes that are sent.
    """

    def __init__(
        self,
        server: S3Client,
        path: str,
        there: Container[str],
        taken_up: Mapping[str, MultipartUpload],
        tally: ProgressCounter,
    ) -> None:
        self._server, self._path, self._there, self._begun = server, path, there, taken_up
        self._tally = tally
        self._senders = ThreadPoolExecutor(server.connections)
        self._finishers = ThreadPoolExecutor(server.connections)
        self._room = threading.Semaphore(MEMORY // PART)
        self._waiting: deque[Future[Any]] = deque()
        self._free: list[bytearray] = []  # memory that is used for the first time is slow

    def __enter__(self) -> S3Upload:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            for pool in (self._senders, self._finishers):
                pool.shutdown(cancel_futures=True)

    def file(self, piece: UploadFile) -> None:
        """Send a file; return when it is read.

        Raises:
            UserError: it is not what its manifest says, or an earlier one could not be sent.
        """
        with piece.source.open("rb", buffering=0) as reader:
            before = os.fstat(reader.fileno())
            digest = new_digest(piece.file)

            def verify() -> None:
                after = os.fstat(reader.fileno())
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise source_changed_error(piece, "written to while it was read")
                if format_digest(digest) != piece.file.hash:
                    raise source_changed_error(piece, "other bytes")

            if piece.file.bytes <= WHOLE:
                data = self._read(reader, piece.file.bytes, digest, verify)
                self._later(self._senders.submit(self._put, piece.file, data))
            else:
                self._parts(piece.file, reader, digest, verify)

    def _read(
        self, reader: Any, size: int, digest: Any, verify: Callable[[], None] = lambda: None
    ) -> bytearray:
        """Read so many bytes, or less at the end of the file, once there is room for them in memory."""
        self._take(size)
        try:
            data, done = self._memory(size), 0
            with memoryview(data) as view:
                while done < size and (got := reader.readinto(view[done:])):
                    done += got
            del data[done:]
            digest.update(data)
            verify()
        except BaseException:
            self._give(size)
            raise
        return data

    def _memory(self, size: int) -> bytearray:
        """Return so many bytes, where they are if an old bytearray has to be cut or to grow but little."""
        if self._free and size > 2 * len(self._free[-1]):
            self._free.clear()
        try:
            data = self._free.pop()
            del data[size:]
            data.extend(bytes(size - len(data)))
        except (IndexError, BufferError):  # BufferError: an error that is not forgotten yet looks at it
            data = bytearray(size)
        return data

    def _put(self, file: File, data: bytearray) -> None:
        path = f"{self._path}/{file.path}"
        try:
            self._server.put(path, data, new=file.path not in self._there, file=file)
        except PreconditionFailed:
            self._by_another(path, file)
        finally:
            self._give(len(data), data)
        self._tally(file.bytes, f"sending {file.path}")

    def _parts(self, file: File, reader: Any, digest: Any, verify: Callable[[], None]) -> None:
        server = self._server
        at = server.at(f"{self._path}/{file.path}")
        size = max(PART, -(-file.bytes // PARTS >> 20 << 20))  # whole MiB
        begun = self._begun.get(file.path)
        if begun is None:
            begun = server.request(f"beginning {file.path}", lambda: self._begin(at, file))
        parts = []
        for number, start in enumerate(range(0, file.bytes, size), 1):
            data = self._read(reader, min(size, file.bytes - start), digest)
            parts.append(self._senders.submit(self._part, at, file, begun, number, data))
            self._later(parts[-1])
        verify()  # else nothing is put together, and the parts are found and replaced by the next try
        self._later(self._finishers.submit(self._finish, at, file, begun, parts))

    def _begin(self, at: dict[str, str], file: File) -> MultipartUpload:
        more = {"ChecksumAlgorithm": "CRC32"} if self._server.checksums else {}
        made = self._server.client.create_multipart_upload(**at, Metadata={HASH: file.hash}, **more)
        check_response(made, has="UploadId")
        return MultipartUpload(made["UploadId"])

    def _part(
        self, at: dict[str, str], file: File, begun: MultipartUpload, number: int, data: bytearray
    ) -> dict[str, Any]:
        """Send a part, unless it is there; return how the server knows it."""
        server, size = self._server, len(data)

        def send() -> dict[str, Any]:
            sums = server.sums(data)
            answer = server.client.upload_part(
                **at, UploadId=begun.upload, PartNumber=number, Body=data, **sums
            )
            check_response(answer, sums)
            return {name: answer[name] for name in ("ETag", *sums) if name in answer}

        try:
            there = begun.etags.get(number)
            if there and there == hashlib.md5(data, usedforsecurity=False).hexdigest():
                return {"PartNumber": number, "ETag": f'"{there}"'}
            return {"PartNumber": number, **server.request(f"sending {file.path}", send)}
        except UserError:
            if begun.taken_up:
                # It may be what is broken, for ever: the next try begins anew. Where the server is away, or
                # the login not good any more, it stays.
                with contextlib.suppress(Exception):
                    server.client.abort_multipart_upload(**at, UploadId=begun.upload)
            raise
        except NotFound:  # put together, or swept, by another; what there is is looked at in the end
            return {"PartNumber": number, "ETag": ""}
        finally:
            try:
                self._tally(size, f"sending {file.path}")  # before there is room to read on
            finally:
                self._give(size, data)

    def _finish(
        self, at: dict[str, str], file: File, begun: MultipartUpload, parts: list[Future[dict[str, Any]]]
    ) -> None:
        server, path = self._server, f"{self._path}/{file.path}"
        told = {"Parts": [part.result() for part in parts]}
        new = file.path not in self._there

        def complete() -> None:
            only = {"IfNoneMatch": "*"} if new and server.conditional else {}
            words = {"UploadId": begun.upload, "MultipartUpload": told, **only}
            check_response(server.client.complete_multipart_upload(**at, **words))

        try:
            server.conditionally(f"completing {file.path}", complete, new)
        except (NotFound, PreconditionFailed):
            self._by_another(path, file)

    def _by_another(self, path: str, file: File) -> None:
        """Accept an object that another upload, or a try of ours whose answer was lost, has put there."""
        if not self._server.has_hash(path, file):
            raise overwritten_error(self._server, path)

    def _later(self, future: Future[Any]) -> None:
        """Look at what has ended, and note one more that has to."""
        self._waiting.append(future)
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _take(self, size: int) -> None:
        # Only the caller's thread takes, so that it cannot hold some and wait for ever for the rest.
        for _ in range(_units(size)):
            self._room.acquire()

    def _give(self, size: int, memory: bytearray | None = None) -> None:
        if memory is not None:
            self._free.append(memory)
        self._room.release(_units(size))


def _units(size: int) -> int:
    return max(1, min(-(-size // PART), MEMORY // PART))
