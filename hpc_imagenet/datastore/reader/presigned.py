"""Read images from shards in a bucket: one range GET per image on a presigned URL.

With boto3, building and signing a request takes as long as decoding an image. A presigned URL per shard,
valid for an hour, avoids that cost. Requests still go through boto3's connection pool, with its proxies and
certificates. A presigned URL contains a signature, so error messages never show it.
Source: the S3 API reference, "Authenticating requests: using query parameters"; botocore's `httpsession`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from hpc_imagenet.datastore.backends import s3_client
from hpc_imagenet.datastore.backends.s3_client import S3Client, single_line
from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.retry import Retry

EXPIRES = 3600  # lifetime of a presigned URL, s
RENEW = 2700.0  # age after which a new URL is signed, s
CONNECTIONS = 64  # size of the connection pool


class PresignedShards:
    """A `ShardReader` of shards in a bucket.

    Args:
        server: client of the S3 server.
        path: path of the version, below the client's prefix.
        shards: shards of the manifest.
    """

    def __init__(self, server: S3Client, path: str, shards: Sequence[File]) -> None:
        import botocore.session
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        self._server, self._shards = server, shards
        self._paths = [f"{path}/{shard.path}" for shard in shards]
        self._signed: dict[int, tuple[str, float]] = {}  # by shard: presigned URL, time of signing
        self._lock = threading.Lock()
        bundle = botocore.session.get_session().get_config_variable("ca_bundle")
        self._session = URLLib3Session(
            verify=bundle or True,
            proxies=get_environ_proxies(self._presigned_url(0)),
            timeout=s3_client.TIMEOUT,
            max_pool_connections=CONNECTIONS,
        )

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a shard from `offset`.

        Raises:
            UserError: the shard is missing, too short or forbidden, or the server fails repeatedly.
        """
        url = f"{self._server.url}/{self._paths[shard]}"  # without the signature, for errors
        retry = Retry(s3_client.FIRST_WAIT, s3_client.LONGEST_WAIT, s3_client.MAX_FAILURES)
        while True:
            status, data = self._get(self._presigned_url(shard, renew=retry.failures > 0), offset, length)
            if status in (200, 206) and len(data) == length:
                return data
            if status == 404:
                raise UserError(f"{url} is missing: run datastores verify on this version")
            if status == 416 or offset + length > self._shards[shard].bytes:
                raise UserError(
                    f"{url} ends inside the image at byte {offset}: run datastores verify on this version"
                )
            reason = f"status {status}" if status else "connection failed"
            wait = retry.failed()
            # The signature may have expired, so a client error is retried once with a new one.
            if wait is None or (status in (400, 401, 403) and retry.failures > 1):
                raise UserError(f"{url} cannot be read ({reason}, {retry.failures} attempts)")
            time.sleep(wait)

    def reread(self, shard: int, offset: int, length: int, data: bytes) -> bytes:
        """Return `data`: the bucket is the only source."""
        return data

    def read_ahead(self, shard: int, offset: int, length: int) -> None:
        """Do nothing: there is no page cache, so `Prefetcher` reads ahead."""

    def is_remote(self) -> bool:
        """Return True: each read waits for the network."""
        return True

    def _get(self, url: str, offset: int, length: int) -> tuple[int, bytes]:
        """Return status and body of one range GET; status 0 if the connection failed."""
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError

        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            response = self._session.send(AWSRequest("GET", url, headers).prepare())
            data = bytes(response.content)
        except (BotoCoreError, OSError):
            return 0, b""
        if response.status_code == 200 and "Content-Range" not in response.headers:  # the whole shard
            data = data[offset : offset + length]
        return response.status_code, data

    def _presigned_url(self, shard: int, renew: bool = False) -> str:
        from botocore.exceptions import BotoCoreError

        with self._lock:
            signed = self._signed.get(shard)
            if signed is None or renew or time.monotonic() - signed[1] > RENEW:
                params = self._server.object_params(self._paths[shard])
                try:
                    url = self._server.client.generate_presigned_url("get_object", params, ExpiresIn=EXPIRES)
                except BotoCoreError as error:  # such as missing credentials
                    raise UserError(f"datastore.url={self._server.url}: {single_line(error)}") from None
                signed = self._signed[shard] = (url, time.monotonic())
            return signed[0]
