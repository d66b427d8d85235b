"""Storage backend for an S3 bucket: `s3://bucket/prefix`, on any S3-compatible server.

`s3_client` makes the requests, `s3_upload` uploads files, and `s3_download` downloads them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_imagenet.datastore.backends import s3_upload
from hpc_imagenet.datastore.backends.s3_client import (
    HASH,
    NotFound,
    NotImplementedByServer,
    PreconditionFailed,
    S3Client,
)
from hpc_imagenet.datastore.backends.s3_download import S3Reader
from hpc_imagenet.datastore.backends.storage_backend import (
    VERSION,
    ProgressCallback,
    ProgressCounter,
    Reusable,
    StoredFile,
    UploadFile,
    UploadStats,
    check_size,
    require_incomplete,
)
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.reader.presigned import PresignedShards

if TYPE_CHECKING:  # imports packages that listing versions does not need
    from hpc_imagenet.datastore.reader.shard_reader import ShardReader

log = logging.getLogger(__name__)

CLAIM_WAIT = 2.0  # s after which other uploads that claimed the same number at once have written it
MAX_COPY = 5 << 30  # bytes: the most that S3 copies in one request


class S3Backend:
    """A prefix in a bucket; see `StorageBackend` and `SupportsRangeReads`.

    Args:
        url: s3://bucket/prefix.
        connections: parallel requests.

    Raises:
        UserError: the URL has credentials or no bucket, or boto3 cannot create a client.
    """

    folder: Path | None = None

    def __init__(self, url: str, connections: int) -> None:
        self._client = S3Client(url, connections)
        self._reader = S3Reader(self._client)
        self.url = self._client.url

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions ever started."""
        return [
            f"{datastore}/{version}"
            for datastore in ([name] if name else self._subfolders(""))
            for version in self._subfolders(f"{datastore}/")
            if VERSION.fullmatch(version)
        ]

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the contents of the objects that exist, by path."""
        client = self._client

        def read_object(path: str) -> bytes | None:
            def get() -> bytes:
                with client.open_object(path) as body:
                    return bytes(body.read())

            try:
                return client.request(f"reading {path}", get)
            except NotFound:
                return None

        with ThreadPoolExecutor(client.connections) as threads:
            contents = zip(paths, threads.map(read_object, paths), strict=True)
            return {path: data for path, data in contents if data is not None}

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all objects below `path`."""
        prefix = self._client.key(f"{path}/")
        return {
            entry["Key"][len(prefix) :]: StoredFile(entry["Size"], entry["LastModified"].timestamp())
            for page in self._client.pages("list_objects_v2", Prefix=prefix)
            for entry in page.get("Contents", ())
        }

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Create the object `path/name`; warn if the server cannot exclude a concurrent claim."""
        client = self._client
        created = self.create(f"{path}/{name}", data)
        if created and client.conditional_writes:
            # Write again: a server with conditional writes rejects it.
            with contextlib.suppress(PreconditionFailed):
                client.put(f"{path}/{name}", data, new=True)
                client.conditional_writes = False
        if created and not client.conditional_writes:
            log.warning(
                "%s: this server has no conditional writes: if two uploads of different images start at the "
                "same moment, one may fail and must be started again",
                self.url,
            )
            time.sleep(CLAIM_WAIT)
            return self.read([f"{path}/{name}"]) == {f"{path}/{name}": data}  # the last writer has the claim
        return created

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object unless it exists."""
        if not self._client.conditional_writes and self.read([path]):
            return False
        try:
            self._client.put(path, data, new=True)
        except PreconditionFailed:
            # If the response to a successful write was lost, its retry is rejected.
            return self.read([path]).get(path) == data
        return True

    def remove(self, paths: Sequence[str]) -> None:
        """Remove objects, in this order."""
        for path in paths:
            with contextlib.suppress(NotFound):
                self._client.request(
                    f"removing {path}", self._client.client.delete_object, **self._client.object_params(path)
                )

    def remove_partial(self, path: str) -> None:
        """Abort interrupted multipart uploads, which removes their parts."""
        s3_upload.abort(self._client, f"{path}/")

    def delete_all(self, path: str, keep: str) -> None:
        """Remove all objects below `path` except `keep`, and the parts of interrupted uploads."""
        self.remove_partial(path)
        paths = [f"{path}/{name}" for name in self.files(path) if name != keep]
        with ThreadPoolExecutor(self._client.connections) as threads:
            for _ in threads.map(lambda path: self.remove([path]), paths):
                pass

    @contextlib.contextmanager
    def lock(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Do nothing: concurrent uploads of the same file write the same object."""
        yield

    def send(
        self, items: Sequence[UploadFile], path: str, reusable: Reusable, progress: ProgressCallback
    ) -> UploadStats:
        """Upload files to objects below `path`; objects that the server has already are kept or copied."""
        stats, counter = UploadStats(), ProgressCounter(progress)
        for item in items:
            check_size(item)
        stored = self.files(path)
        missing = []
        with ThreadPoolExecutor(self._client.connections) as threads:
            outcomes = threads.map(lambda item: self._reuse(item.file, path, stored, reusable), items)
            for item, outcome in zip(items, outcomes, strict=True):
                if outcome == "kept":
                    stats.kept += item.file.bytes
                elif outcome == "reused":
                    stats.reused += item.file.bytes
                else:
                    missing.append(item)
                    continue
                counter(item.file.bytes, f"checking {item.file.path}")
        unfinished = s3_upload.unfinished_uploads(self._client, f"{path}/") if missing else {}
        with s3_upload.S3Upload(self._client, path, stored, unfinished, counter) as upload:
            for item in missing:
                upload.send_file(item)
        self._verify_uploaded(missing, path)
        stats.copied += sum(item.file.bytes for item in missing)
        counter(0, "")
        return stats

    def fetch(self, path: str, file: File, target: Path, progress: Callable[[int], None]) -> None:
        """Download an object to `target`, in ranges."""
        self._reader.fetch(path, file, target, progress)

    def shards(self, path: str, shards: Sequence[File]) -> ShardReader:
        """Return a range reader of the shards."""
        return PresignedShards(self._client, path, shards)

    def hash(self, path: str, file: File, progress: Callable[[int], None]) -> str | None:
        """Read an object and return its hash."""
        return self._reader.hash(path, file, progress)

    def _reuse(self, file: File, path: str, stored: Mapping[str, StoredFile], reusable: Reusable) -> str:
        """Return `kept` if the object exists, `reused` if an older one was copied, else an empty string."""
        existing = stored.get(file.path)
        if existing and existing.bytes == file.bytes and self._client.has_hash(f"{path}/{file.path}", file):
            return "kept"
        for older in reusable.older.get(File("", file.bytes, file.hash), ()):
            with contextlib.suppress(NotFound, NotImplementedByServer):
                if not self._client.has_hash(older, file):
                    continue
                require_incomplete(self, path)
                if self._copy(older, f"{path}/{file.path}", file):
                    return "reused"
        return ""

    def _verify_uploaded(self, items: Sequence[UploadFile], path: str) -> None:
        """Fail if another upload overwrote an object, which servers without conditional writes allow."""
        with ThreadPoolExecutor(self._client.connections) as threads:
            results = threads.map(
                lambda item: self._client.has_hash(f"{path}/{item.file.path}", item.file), items
            )
            for item, matches in zip(items, results, strict=True):
                if not matches:
                    raise s3_upload.overwritten_error(self._client, f"{path}/{item.file.path}")

    def _copy(self, older: str, path: str, file: File) -> bool:
        """Copy an object on the server; return whether the copy has the hash."""
        from boto3.s3.transfer import TransferConfig

        client = self._client
        client.request(
            f"copying {older}",
            client.client.copy,
            CopySource=client.object_params(older),
            **client.object_params(path),
            ExtraArgs={"Metadata": {HASH: file.hash}, "MetadataDirective": "REPLACE"},
            Config=TransferConfig(
                multipart_threshold=MAX_COPY, multipart_chunksize=1 << 30, max_concurrency=client.connections
            ),
        )
        return client.has_hash(path, file)

    def _subfolders(self, path: str) -> list[str]:
        """Return the names of the "folders" directly below `path`."""
        prefix = self._client.key(path)
        pages = self._client.pages("list_objects_v2", Prefix=prefix, Delimiter="/")
        return [
            entry["Prefix"][len(prefix) :].rstrip("/")
            for page in pages
            for entry in page.get("CommonPrefixes", ())
        ]
