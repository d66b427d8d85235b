"""A bucket as the place of datastores: `s3://bucket/prefix`, on any server that speaks S3.

`s3.py` asks the server, `multipart.py` sends files to it, `ranges.py` reads them.
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
    ProgressCounter,
    Reusable,
    StoredFile,
    Tell,
    UploadFile,
    UploadStats,
    check_size,
)
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.datastore.reader.presigned import PresignedShards

if TYPE_CHECKING:  # it needs packages that a look-up does not
    from hpc_imagenet.datastore.reader.shard_reader import ShardReader

log = logging.getLogger(__name__)

SETTLE = 2.0  # s in which others that claim the same number at the same moment have written it
ONE_COPY = 5 << 30  # bytes up to which the server copies in one request


class S3Backend:
    """A prefix in a bucket; see `transport.Place` and `Ranges`.

    Raises:
        UserError: the url holds a login or no bucket, or boto3 cannot make a client of what it finds.
    """

    folder: Path | None = None

    def __init__(self, url: str, connections: int) -> None:
        self._server = S3Client(url, connections)
        self._reader = S3Reader(self._server)
        self.url = self._server.url

    def versions(self, name: str | None = None) -> list[str]:
        """Return the paths of all versions that were begun."""
        return [
            f"{each}/{version}"
            for each in ([name] if name else self._folders(""))
            for version in self._folders(f"{each}/")
            if VERSION.fullmatch(version)
        ]

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those of the objects that are there."""
        server = self._server

        def one(path: str) -> bytes | None:
            def get() -> bytes:
                with server.opened(path) as body:
                    return bytes(body.read())

            try:
                return server.request(f"reading {path}", get)
            except NotFound:
                return None

        with ThreadPoolExecutor(server.connections) as threads:
            found = zip(paths, threads.map(one, paths), strict=True)
            return {path: data for path, data in found if data is not None}

    def files(self, path: str) -> dict[str, StoredFile]:
        """Return all objects below `path`."""
        prefix = self._server.key(f"{path}/")
        return {
            entry["Key"][len(prefix) :]: StoredFile(entry["Size"], entry["LastModified"].timestamp())
            for page in self._server.pages("list_objects_v2", Prefix=prefix)
            for entry in page.get("Contents", ())
        }

    def claim(self, path: str, name: str, data: bytes) -> bool:
        """Write the object `name`, unless it is there, and say so where two could do it at once."""
        server = self._server
        created = self.create(f"{path}/{name}", data)
        if created and server.conditional:
            # Once more: a server with conditional writes refuses it.
            with contextlib.suppress(PreconditionFailed):
                server.put(f"{path}/{name}", data, new=True)
                server.conditional = False
        if created and not server.conditional:
            log.warning(
                "%s: this server has no conditional writes: of two uploads of different images that begin "
                "at the same moment one may fail, and has to be asked for again",
                self.url,
            )
            time.sleep(SETTLE)
            return self.read([f"{path}/{name}"]) == {f"{path}/{name}": data}  # the last one has it
        return created

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object unless it is there."""
        if not self._server.conditional and self.read([path]):
            return False
        try:
            self._server.put(path, data, new=True)
        except PreconditionFailed:
            # The answer to a try of ours may have been lost, and the next one been refused.
            return self.read([path]).get(path) == data
        return True

    def remove(self, paths: Sequence[str]) -> None:
        """Remove objects, in this order."""
        for path in paths:
            with contextlib.suppress(NotFound):
                self._server.request(
                    f"removing {path}", self._server.client.delete_object, **self._server.at(path)
                )

    def remove_partial(self, path: str) -> None:
        """Remove the parts of uploads that were cut off."""
        s3_upload.abort(self._server, f"{path}/")

    def delete_all(self, path: str, keep: str) -> None:
        """Remove all objects below `path`, but for one, and the parts of uploads that were cut off."""
        self.remove_partial(path)
        gone = [f"{path}/{name}" for name in self.files(path) if name != keep]
        with ThreadPoolExecutor(self._server.connections) as threads:
            for _ in threads.map(lambda each: self.remove([each]), gone):
                pass

    @contextlib.contextmanager
    def lock(self, path: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Do nothing: two that send the same object make the same object."""
        yield

    def send(self, pieces: Sequence[UploadFile], path: str, known: Reusable, tell: Tell) -> UploadStats:
        """Bring all pieces below `path`; what the server has already it keeps or copies."""
        sent, tally = UploadStats(), ProgressCounter(tell)
        for piece in pieces:
            check_size(piece)
        there = self.files(path)
        missing = []
        with ThreadPoolExecutor(self._server.connections) as threads:
            looked = threads.map(lambda piece: self._stands(piece.file, path, there, known), pieces)
            for piece, how in zip(pieces, looked, strict=True):
                if how == "kept":
                    sent.kept += piece.file.bytes
                elif how == "reused":
                    sent.reused += piece.file.bytes
                else:
                    missing.append(piece)
                    continue
                tally(piece.file.bytes, f"checking {piece.file.path}")
        cut_off = s3_upload.unfinished_uploads(self._server, f"{path}/") if missing else {}
        with s3_upload.S3Upload(self._server, path, there, cut_off, tally) as sending:
            for piece in missing:
                sending.file(piece)
        self._look_again(missing, path)
        sent.copied += sum(piece.file.bytes for piece in missing)
        tally(0, "")
        return sent

    def fetch(self, path: str, file: File, target: Path, tell: Callable[[int], None]) -> None:
        """Bring an object to `target`, in ranges."""
        self._reader.fetch(path, file, target, tell)

    def shards(self, path: str, shards: Sequence[File]) -> ShardReader:
        """Return a reader of ranges of the shards."""
        return PresignedShards(self._server, path, shards)

    def hash(self, path: str, file: File, tell: Callable[[int], None]) -> str | None:
        """Read an object and return its hash."""
        return self._reader.hash(path, file, tell)

    def _stands(self, file: File, path: str, there: Mapping[str, StoredFile], known: Reusable) -> str:
        """Say how a file is there without being sent: `kept`, `reused`, or not at all."""
        stored = there.get(file.path)
        if stored and stored.bytes == file.bytes and self._server.has_hash(f"{path}/{file.path}", file):
            return "kept"
        for older in known.older.get(File("", file.bytes, file.hash), ()):
            with contextlib.suppress(NotFound, NotImplementedByServer):
                if self._server.has_hash(older, file) and self._copy(older, f"{path}/{file.path}", file):
                    return "reused"
        return ""

    def _look_again(self, sent: Sequence[UploadFile], path: str) -> None:
        """Refuse what another upload has written over; servers without conditional writes let it."""
        with ThreadPoolExecutor(self._server.connections) as threads:
            proved = threads.map(
                lambda each: self._server.has_hash(f"{path}/{each.file.path}", each.file), sent
            )
            for piece, holds in zip(sent, proved, strict=True):
                if not holds:
                    raise s3_upload.overwritten_error(self._server, f"{path}/{piece.file.path}")

    def _copy(self, older: str, path: str, file: File) -> bool:
        """Let the server copy an object."""
        from boto3.s3.transfer import TransferConfig

        server = self._server
        server.request(
            f"copying {older}",
            server.client.copy,
            CopySource=server.at(older),
            **server.at(path),
            ExtraArgs={"Metadata": {HASH: file.hash}, "MetadataDirective": "REPLACE"},
            Config=TransferConfig(
                multipart_threshold=ONE_COPY, multipart_chunksize=1 << 30, max_concurrency=server.connections
            ),
        )
        return server.has_hash(path, file)

    def _folders(self, path: str) -> list[str]:
        prefix = self._server.key(path)
        pages = self._server.pages("list_objects_v2", Prefix=prefix, Delimiter="/")
        return [
            entry["Prefix"][len(prefix) :].rstrip("/")
            for page in pages
            for entry in page.get("CommonPrefixes", ())
        ]
