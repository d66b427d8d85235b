"""Upload of files to S3: small files in one request, large files in parts.

One thread reads a file in order and hashes it; other threads send the bytes. A file is sent in one request,
or in parts that are completed only after the hash was verified, so every visible object has the hash in its
metadata. Parts of an interrupted upload are reused if their ETag, which is their MD5, matches the bytes of
the file.
Source: the S3 API reference, "Multipart upload".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hpc_imagenet.datastore.backends.s3_client import (
    HASH,
    InternalServerError,
    NotFound,
    NotImplementedByServer,
    PreconditionFailed,
    Refused,
    S3Client,
    check_response,
)
from hpc_imagenet.datastore.backends.storage_backend import (
    ProgressCounter,
    UploadFile,
    completed_error,
    source_changed_error,
)
from hpc_imagenet.datastore.file_hash import digest_of, format_digest
from hpc_imagenet.datastore.manifest import FILE, File
from hpc_imagenet.errors import UserError

MAX_SINGLE = 64 << 20  # bytes: the largest file sent in one request
PART = 16 << 20  # bytes per part; larger if there would be more than MAX_PARTS
MAX_PARTS = 10_000  # limit of S3
MEMORY = 256 << 20  # bytes: the most read but not sent yet


@dataclass
class MultipartUpload:
    """A multipart upload: its id, and the ETags of its stored parts by part number."""

    upload_id: str
    etags: dict[int, str] = field(default_factory=dict)
    resumed: bool = False  # started by an earlier attempt


def unfinished_uploads(client: S3Client, path: str) -> dict[str, MultipartUpload]:
    """Return the newest unfinished upload of each file below `path`, by path relative to it."""
    start = len(client.key(path))
    unfinished = {}
    for upload in sorted(list_uploads(client, path), key=lambda upload: str(upload.get("Initiated", ""))):
        if upload.get("ChecksumAlgorithm") and not client.checksums:
            continue  # started under another setting: it accepts no parts without checksums
        with contextlib.suppress(NotFound, NotImplementedByServer):
            key, upload_id = upload["Key"], upload["UploadId"]
            pages = client.pages("list_parts", Key=key, UploadId=upload_id)
            parts = [part for page in pages for part in page.get("Parts", ())]
            unfinished[key[start:]] = MultipartUpload(
                upload_id, {part["PartNumber"]: part["ETag"].strip('"') for part in parts}, resumed=True
            )
    return unfinished


def list_uploads(client: S3Client, path: str) -> list[dict[str, Any]]:
    """Return all unfinished uploads below `path`; an empty list if the server does not list them."""
    prefix = client.key(path)
    try:
        pages = client.pages("list_multipart_uploads", Prefix=prefix)
    except (NotFound, NotImplementedByServer, UserError):  # not every server or account can list them
        return []
    return [
        upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"].startswith(prefix)
    ]


def abort(client: S3Client, path: str) -> None:
    """Abort all unfinished uploads below `path`, which removes their parts."""
    for upload in list_uploads(client, path):
        with contextlib.suppress(NotFound, NotImplementedByServer):
            client.request(
                "removing parts",
                client.client.abort_multipart_upload,
                Bucket=client.bucket,
                Key=upload["Key"],
                UploadId=upload["UploadId"],
            )


def overwritten_error(client: S3Client, path: str) -> UserError:
    """Return the error for an object that does not have the uploaded bytes."""
    return UserError(
        f"datastore.url={client.url}: {path} is incomplete, or was overwritten by another upload; "
        "transferred data is kept: run it again to resume"
    )


class S3Upload:
    """Upload of files in parallel. Use as a context manager; on a normal exit all files are stored.

    Args:
        client: the bucket and prefix.
        path: the folder, within the prefix, that the files go to.
        stored: paths within it of objects that exist and may be replaced.
        unfinished: interrupted uploads, by path within it.
        counter: counts the bytes sent.
    """

    def __init__(
        self,
        client: S3Client,
        path: str,
        stored: Container[str],
        unfinished: Mapping[str, MultipartUpload],
        counter: ProgressCounter,
    ) -> None:
        self._client, self._path, self._stored, self._unfinished = client, path, stored, unfinished
        self._counter = counter
        self._senders = ThreadPoolExecutor(client.connections)
        self._finishers = ThreadPoolExecutor(client.connections)
        self._memory = threading.Semaphore(MEMORY // PART)
        self._pending: deque[Future[Any]] = deque()
        self._free: list[bytearray] = []  # reused buffers: newly allocated memory is slow on first use

    def __enter__(self) -> S3Upload:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self._pending:
                self._pending.popleft().result()
        finally:
            for pool in (self._senders, self._finishers):
                pool.shutdown(cancel_futures=True)

    def send_file(self, item: UploadFile) -> None:
        """Start the upload of a file; return when the file is read.

        Raises:
            UserError: the file differs from its manifest, or an earlier file could not be sent.
        """
        with item.source.open("rb", buffering=0) as reader:
            before = os.fstat(reader.fileno())
            digest = digest_of(item.file)

            def verify() -> None:
                after = os.fstat(reader.fileno())
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise source_changed_error(item, "modified while it was read")
                if format_digest(digest) != item.file.hash:
                    raise source_changed_error(item, "different content")

            if item.file.bytes <= MAX_SINGLE:
                data = self._read(reader, item.file.bytes, digest, verify)
                self._add_pending(self._senders.submit(self._put, item.file, data))
            else:
                self._send_parts(item.file, reader, digest, verify)

    def _read(
        self, reader: Any, size: int, digest: Any, verify: Callable[[], None] = lambda: None
    ) -> bytearray:
        """Read `size` bytes, or fewer at the end of the file, once enough buffer memory is free."""
        self._acquire_memory(size)
        try:
            data, done = self._buffer(size), 0
            with memoryview(data) as view:
                while done < size and (got := reader.readinto(view[done:])):
                    done += got
            del data[done:]
            digest.update(data)
            verify()
        except BaseException:
            self._release_memory(size)
            raise
        return data

    def _buffer(self, size: int) -> bytearray:
        """Return a buffer of `size` bytes, reusing an old one unless it would have to grow a lot."""
        if self._free and size > 2 * len(self._free[-1]):
            self._free.clear()
        try:
            data = self._free.pop()
            del data[size:]
            data.extend(bytes(size - len(data)))
        except (IndexError, BufferError):  # BufferError: a traceback still holds a view of the buffer
            data = bytearray(size)
        return data

    def _put(self, file: File, data: bytearray) -> None:
        """Send a file in one request."""
        path = f"{self._path}/{file.path}"
        try:
            self._require_incomplete()
            self._client.put(path, data, new=file.path not in self._stored, file=file)
        except PreconditionFailed:
            self._accept_existing(path, file)
        finally:
            self._release_memory(len(data), data)
        self._counter(file.bytes, f"sending {file.path}")

    def _send_parts(self, file: File, reader: Any, digest: Any, verify: Callable[[], None]) -> None:
        """Send a file as a multipart upload."""
        client = self._client
        params = client.object_params(f"{self._path}/{file.path}")
        size = max(PART, -(-file.bytes // MAX_PARTS >> 20 << 20))  # whole MiB
        upload = self._unfinished.get(file.path)
        if upload is None:
            upload = client.request(f"starting the upload of {file.path}", lambda: self._create(params, file))
        parts = []
        for number, start in enumerate(range(0, file.bytes, size), 1):
            data = self._read(reader, min(size, file.bytes - start), digest)
            parts.append(self._senders.submit(self._send_part, params, file, upload, number, data))
            self._add_pending(parts[-1])
        verify()  # on failure the upload is not completed; the next attempt finds and replaces its parts
        self._add_pending(self._finishers.submit(self._complete, params, file, upload, parts))

    def _create(self, params: dict[str, str], file: File) -> MultipartUpload:
        """Create a multipart upload on the server."""
        algorithm = {"ChecksumAlgorithm": "CRC32"} if self._client.checksums else {}
        response = self._client.client.create_multipart_upload(
            **params, Metadata={HASH: file.hash}, **algorithm
        )
        check_response(response, field="UploadId")
        return MultipartUpload(response["UploadId"])

    def _send_part(
        self, params: dict[str, str], file: File, upload: MultipartUpload, number: int, data: bytearray
    ) -> dict[str, Any]:
        """Send a part unless the server has it; return its entry for completing the upload."""
        client, size = self._client, len(data)

        def send() -> dict[str, Any]:
            checksum = client.checksum(data)
            response = client.client.upload_part(
                **params, UploadId=upload.upload_id, PartNumber=number, Body=data, **checksum
            )
            check_response(response, checksum)
            return {name: response[name] for name in ("ETag", *checksum) if name in response}

        try:
            with self._discarding(params, upload, InternalServerError):
                etag = upload.etags.get(number)
                if etag and etag == hashlib.md5(data, usedforsecurity=False).hexdigest():
                    # An upload created with a checksum algorithm is completed with the checksum of each part.
                    checksum = client.checksum(data) if client.checksums else {}
                    return {"PartNumber": number, "ETag": f'"{etag}"', **checksum}
                return {"PartNumber": number, **client.request(f"sending {file.path}", send)}
        except NotFound:  # completed or aborted by another process; the object is checked at the end
            return {"PartNumber": number, "ETag": ""}
        finally:
            try:
                self._counter(size, f"sending {file.path}")  # before the memory is free for the next read
            finally:
                self._release_memory(size, data)

    @contextlib.contextmanager
    def _discarding(
        self, params: dict[str, str], upload: MultipartUpload, *errors: type[UserError]
    ) -> Iterator[None]:
        """Abort a resumed upload that the server refuses, or fails at with `errors`; the next starts anew."""
        kinds: tuple[type[UserError], ...] = (Refused, *errors)
        try:
            yield
        except kinds as error:
            if upload.resumed:
                with contextlib.suppress(Exception):
                    self._client.client.abort_multipart_upload(**params, UploadId=upload.upload_id)
                if isinstance(error, Refused):
                    raise UserError(f"{error}: run it again to send the whole file") from None
            raise

    def _complete(
        self,
        params: dict[str, str],
        file: File,
        upload: MultipartUpload,
        parts: list[Future[dict[str, Any]]],
    ) -> None:
        """Complete a multipart upload once all its parts are sent."""
        client, path = self._client, f"{self._path}/{file.path}"
        entries = {"Parts": [part.result() for part in parts]}
        new = file.path not in self._stored

        def complete() -> None:
            condition = {"IfNoneMatch": "*"} if new and client.conditional_writes else {}
            response = client.client.complete_multipart_upload(
                **params, UploadId=upload.upload_id, MultipartUpload=entries, **condition
            )
            check_response(response)

        try:
            self._require_incomplete()
            with self._discarding(params, upload):
                client.conditional_request(f"completing {file.path}", complete, new)
            # The metadata are set when an upload is created, and cannot be queried before it is completed.
            if upload.resumed and not client.has_hash(path, file):
                raise UserError(
                    f"datastore.url={client.url}: {path} has the hash of another file, for which its upload "
                    "was begun: run it again to replace it"
                )
        except (NotFound, PreconditionFailed):
            self._accept_existing(path, file)

    def _require_incomplete(self) -> None:
        """Raise if another upload has completed the version: not every write has a condition, or heeds it."""
        with contextlib.suppress(NotFound):
            self._client.head(f"{self._path}/{FILE}")
            raise completed_error(self._client.url, self._path)

    def _accept_existing(self, path: str, file: File) -> None:
        """Accept an object written by another upload, or by a request of ours whose response was lost."""
        if not self._client.has_hash(path, file):
            raise overwritten_error(self._client, path)

    def _add_pending(self, future: Future[Any]) -> None:
        """Add a request to wait for, and raise the errors of requests that have ended."""
        self._pending.append(future)
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _acquire_memory(self, size: int) -> None:
        # Called by the reading thread only, so that two readers cannot deadlock with half of it each.
        for _ in range(_memory_units(size)):
            self._memory.acquire()

    def _release_memory(self, size: int, buffer: bytearray | None = None) -> None:
        if buffer is not None:
            self._free.append(buffer)
        self._memory.release(_memory_units(size))


def _memory_units(size: int) -> int:
    """Return the number of semaphore units, of PART bytes each, for `size` bytes."""
    return max(1, min(-(-size // PART), MEMORY // PART))
