"""Shards in a bucket, read an image at a time: a GET of a range from an address that is signed for an hour.

Building and signing a request takes boto3 as long as decoding an image. With one signature a shard and hour
that goes away; what goes out is still boto3's own connection, with its proxies and certificates. An address
holds a signature, so no error shows one.
Source: the S3 API reference, "Authenticating requests: using query parameters"; botocore's `httpsession`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

from hpc_imagenet.datastore.backends import s3_client
from hpc_imagenet.datastore.backends.s3_client import S3Client, single_line
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

SIGNED = 3600  # s for which an address is good
RENEW = 2700.0  # s after which another is made
CONNECTIONS = 64  # kept open


class PresignedShards:
    """See `shards.Shards`.

    Args:
        server: has them.
        path: of the version, within the server's prefix.
        shards: of the manifest.
    """

    def __init__(self, server: S3Client, path: str, shards: Sequence[File]) -> None:
        import botocore.session
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        self._server, self._shards = server, shards
        self._paths = [f"{path}/{shard.path}" for shard in shards]
        self._addresses: dict[int, tuple[str, float]] = {}  # with when each was signed
        self._lock = threading.Lock()
        bundle = botocore.session.get_session().get_config_variable("ca_bundle")
        self._session = URLLib3Session(
            verify=bundle or True,
            proxies=get_environ_proxies(self._address(0)),
            timeout=s3_client.TIMEOUT,
            max_pool_connections=CONNECTIONS,
        )

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`.

        Raises:
            UserError: it is not there or forbidden, or the server stays away.
        """
        where, failures = f"{self._server.url}/{self._paths[shard]}", 0
        while True:
            status, data = self._get(self._address(shard, again=failures > 0), offset, length)
            if status in (200, 206) and len(data) == length:
                return data
            if status == 404:
                raise UserError(f"{where} is missing")
            if status == 416 or offset + length > self._shards[shard].bytes:
                raise UserError(f"{where}: ends inside the image at byte {offset}")
            trouble = f"status {status}" if status else "the connection broke"
            failures += 1
            # A signature may have run out, once.
            if failures >= s3_client.TRIES or (status in (400, 401, 403) and failures > 1):
                raise UserError(f"{where} cannot be read ({trouble}, {failures} tries)")
            pause = min(s3_client.LONGEST, s3_client.PAUSE * 2 ** (failures - 1))
            time.sleep(random.uniform(0.5, 1.0) * pause)

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Return what was read: there is nothing else."""
        return data

    def is_remote(self) -> bool:
        """Each read is a wait."""
        return True

    def _get(self, address: str, offset: int, length: int) -> tuple[int, bytes]:
        """Return status and body of one GET; status 0 where the connection broke."""
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError

        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            answer = self._session.send(AWSRequest("GET", address, headers).prepare())
            data = bytes(answer.content)
        except (BotoCoreError, OSError):
            return 0, b""
        if answer.status_code == 200 and "Content-Range" not in answer.headers:  # all of it
            data = data[offset : offset + length]
        return answer.status_code, data

    def _address(self, shard: int, again: bool = False) -> str:
        from botocore.exceptions import BotoCoreError

        with self._lock:
            known = self._addresses.get(shard)
            if known is None or again or time.monotonic() - known[1] > RENEW:
                at = self._server.at(self._paths[shard])
                try:
                    address = self._server.client.generate_presigned_url("get_object", at, ExpiresIn=SIGNED)
                except BotoCoreError as error:  # such as no credentials
                    raise UserError(f"datastore.url={self._server.url}: {single_line(error)}") from None
                known = self._addresses[shard] = (address, time.monotonic())
            return known[0]
