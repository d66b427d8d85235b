"""A bucket as a remote: `s3://bucket/prefix`, by boto3's own client.

Credentials, region, proxy and endpoint come from where boto3 looks for them: the environment (AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL …), ~/.aws, the machine's role. Source: boto3's guide to credentials.
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


class S3Source:
    """A prefix in a bucket.

    Args:
        prefix: dataset.source.
        timeout: s without a byte after which a connection counts as broken.
        connections: how many are kept open.

    Raises:
        UserError: boto3 cannot make a client of what it finds.
    """

    def __init__(self, prefix: str, timeout: float, connections: int) -> None:
        parts = urllib.parse.urlsplit(prefix)
        self.prefix = prefix
        self.reached = False
        self._bucket, self._folder = parts.netloc, parts.path.strip("/")
        self._client: Any = boto3_client(f"dataset.source={prefix}", timeout, connections)

    def url(self, file: str) -> str:
        """Return the object's name, s3:// in front."""
        return f"{self.prefix.rstrip('/')}/{file}"

    def size(self, file: str) -> int | None:
        """Return the bytes of an object."""
        with self._telling(file):
            return int(_whole(self._client.head_object(**self._object(file)))["ContentLength"])

    @contextlib.contextmanager
    def open(
        self, file: str, begin: int = 0, end: int | None = None, origin: Origin | None = None
    ) -> Iterator[_S3Response]:
        """Ask for bytes [begin, end) of an object; see `remote.Remote`."""
        asked = self._object(file)
        if end is not None:
            asked["Range"] = f"bytes={begin}-{end - 1}"
            if origin and origin.etag:
                asked["IfMatch"] = origin.etag
        with self._telling(file):
            found = _whole(self._client.get_object(**asked))
        with contextlib.closing(found["Body"]):
            answer = _S3Response(found, self.url(file))
            if origin and not origin.same(answer.origin):
                raise ContentChanged("the object has changed in the bucket")
            yield answer

    def _object(self, file: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._folder}/{file}" if self._folder else file}

    @contextlib.contextmanager
    def _telling(self, file: str) -> Iterator[None]:
        """Turn boto3's errors into ours."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as NotConnected

        try:
            yield
        except ClientError as error:
            self.reached = True
            told = error.response.get("ResponseMetadata", {})
            status = told.get("HTTPStatusCode", 500)
            if status in (412, 416):
                raise ContentChanged("the object has changed in the bucket") from None
            if status in (408, 429) or status >= 500:
                wait = str(told.get("HTTPHeaders", {}).get("retry-after", ""))
                raise TransientError(
                    f"the bucket answers {status}", float(wait) if wait.isdigit() else None
                ) from None
            raise NotAvailable(status) from None
        except (HTTPClientError, NotConnected) as error:
            raise TransientError(single_line(error)) from None
        except BotoCoreError as error:
            raise UserError(f"{self.url(file)}: {single_line(error)}") from None
        self.reached = True


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    """Refuse an answer whose headers were cut off: it looks like a good one that says little."""
    if "ContentLength" not in found:
        raise TransientError("the bucket's answer has no length")
    return found


class _S3Response:
    """The body of an object."""

    def __init__(self, found: dict[str, Any], url: str) -> None:
        self._body = found["Body"]
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", found.get("ContentRange", ""))
        self.ranged = said is not None
        self.content_type = ""  # whoever put it there has chosen one, or not
        self.end: int | None = int(said[2]) + 1 if said else found["ContentLength"]
        total = int(said[3]) if said else found["ContentLength"]
        modified = found["LastModified"].isoformat() if "LastModified" in found else None
        self.origin = Origin(url, found.get("ETag"), modified, total, self.ranged)

    def read(self, most: int) -> bytes:
        """Return the next bytes; none at the end."""
        from botocore.exceptions import BotoCoreError

        try:
            data: bytes = self._body.read(most)
        except (BotoCoreError, OSError) as error:
            raise TransientError(single_line(error)) from None
        return data

    def close(self) -> None:
        """Do nothing: a read ends by itself, at the latest when the time is out."""
