"""An S3 bucket as a source, `s3://bucket/prefix`, through boto3.

boto3 looks up credentials, region, proxy and endpoint: in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL …), in ~/.aws, and from the machine's role. Source: boto3's guide to credentials.
"""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from hpc_imagenet.data.sources.range_source import ContentChanged, NotAvailable, Origin, TransientError
from hpc_imagenet.datastore.backends.s3_client import boto3_client, single_line
from hpc_imagenet.errors import UserError

# S3's codes for credentials that were valid elsewhere or before, and the fix.
_UNUSABLE = {
    "ExpiredToken": "the credentials have expired; renew those that boto3 finds",
    "InvalidToken": "the session token is not valid; renew the credentials that boto3 finds",
    "RequestTimeTooSkewed": "the clock of this machine is wrong by more than 15 minutes; set it",
}


class S3Source:
    """Objects under a prefix of a bucket; a `RangeSource`.

    Args:
        prefix: dataset.source.
        timeout: seconds without a byte after which a connection counts as broken.
        connections: size of the connection pool.

    Raises:
        UserError: boto3 cannot create a client from its configuration.
    """

    def __init__(self, prefix: str, timeout: float, connections: int) -> None:
        parts = urllib.parse.urlsplit(prefix)
        self.prefix = prefix
        self.reached = False
        self._bucket, self._folder = parts.netloc, parts.path.strip("/")
        self._client: Any = boto3_client(f"dataset.source={prefix}", timeout, connections)

    def url(self, file: str) -> str:
        """Return the s3:// URL of an object."""
        return f"{self.prefix.rstrip('/')}/{file}"

    def size(self, file: str) -> int | None:
        """Return the size of an object in bytes."""
        with self._convert_errors(file):
            return int(_require_length(self._client.head_object(**self._object(file)))["ContentLength"])

    @contextlib.contextmanager
    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> Iterator[_S3Response]:
        """Request bytes [begin, end) of an object; see `RangeSource.open`."""
        request = self._object(file)
        if end is not None:
            request["Range"] = f"bytes={begin}-{end - 1}"
            if origin and origin.etag:
                request["IfMatch"] = origin.etag
        with self._convert_errors(file):
            reply = _require_length(self._client.get_object(**request))
        with contextlib.closing(reply["Body"]):
            response = _S3Response(reply, self.url(file))
            if response.begin not in (begin, None):
                raise TransientError("the S3 server sent another range than requested")
            if origin and not origin.matches(response.origin):
                raise ContentChanged("the object has changed in the bucket")
            yield response

    def _object(self, file: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._folder}/{file}" if self._folder else file}

    @contextlib.contextmanager
    def _convert_errors(self, file: str) -> Iterator[None]:
        """Convert boto3's exceptions to those of `RangeSource.open`."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as ConnectFailed

        try:
            yield
        except ClientError as error:
            self.reached = True
            metadata = error.response.get("ResponseMetadata", {})
            status = metadata.get("HTTPStatusCode", 500)
            if status in (412, 416):
                raise ContentChanged("the object has changed in the bucket") from None
            if status in (408, 429) or status >= 500:
                wait = str(metadata.get("HTTPHeaders", {}).get("retry-after", ""))
                raise TransientError(
                    f"the S3 server responded with status {status}",
                    float(wait) if re.fullmatch("[0-9]{1,18}", wait) else None,
                ) from None
            code = error.response.get("Error", {}).get("Code", "")
            if code in _UNUSABLE:
                raise UserError(f"{self.url(file)}: {code}: {_UNUSABLE[code]}") from None
            raise NotAvailable(status) from None
        except (HTTPClientError, ConnectFailed) as error:
            raise TransientError(single_line(error)) from None
        except BotoCoreError as error:
            raise UserError(f"{self.url(file)}: {single_line(error)}") from None
        self.reached = True


def _require_length(reply: dict[str, Any]) -> dict[str, Any]:
    """Reject a reply without a length: its headers were cut off, which boto3 does not notice."""
    if "ContentLength" not in reply:
        raise TransientError("the S3 server's response has no Content-Length")
    return reply


class _S3Response:
    """The body of an object; a `Response`."""

    def __init__(self, reply: dict[str, Any], url: str) -> None:
        self._body = reply["Body"]
        content_range = re.fullmatch(
            r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", reply.get("ContentRange", "")
        )
        self.ranged = content_range is not None
        self.begin = int(content_range[1]) if content_range else None
        self.content_type = ""  # the type is chosen by the uploader, so it proves nothing
        self.end: int | None = int(content_range[2]) + 1 if content_range else reply["ContentLength"]
        total = int(content_range[3]) if content_range else reply["ContentLength"]
        modified = reply["LastModified"].isoformat() if "LastModified" in reply else None
        self.origin = Origin(url, reply.get("ETag"), modified, total, self.ranged)

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; b"" at the end."""
        from botocore.exceptions import BotoCoreError

        try:
            data: bytes = self._body.read(size)
        except (BotoCoreError, OSError) as error:
            raise TransientError(single_line(error)) from None
        return data

    def close(self) -> None:
        """Do nothing: a blocked read ends by itself, at the latest after the timeout."""
