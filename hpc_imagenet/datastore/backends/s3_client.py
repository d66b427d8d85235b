"""S3 requests through boto3, retried on transient errors.

boto3 finds credentials, region, proxy and endpoint: in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL …), in ~/.aws, or from the machine's role. Objects get no ACL, so they are as private as the
bucket.
Sources: boto3's guide to credentials; the S3 API reference, "Error responses", "Conditional writes",
"Checking object integrity".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from typing import Any, TypeVar

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.retry import Retry

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_WAIT = 0.5  # s before the first retry; doubled before each further one …
LONGEST_WAIT = 20.0  # … up to this
MAX_FAILURES = 9  # in a row: about a minute in total
TIMEOUT = 60.0  # s without a byte
HASH = "hash"  # metadata key of an object's hash, in the manifest's format

_TRANSIENT = {"RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
# The same request fails again; a full quota or wrong credentials may also be a 400.
_REFUSED = {
    "EntityTooSmall",
    "InvalidArgument",
    "InvalidPart",
    "InvalidPartOrder",
    "InvalidRequest",
    "MalformedXML",
}
_NOT_FOUND = {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}


class NotFound(Exception):
    """The object or multipart upload does not exist."""


class PreconditionFailed(Exception):
    """The object exists already, so it was not written."""


class Refused(UserError):
    """The server refuses the contents of the request."""


class InternalServerError(UserError):
    """The server replied 500 to each attempt, as to the parts of an upload that it cannot continue."""


class NotImplementedByServer(Exception):
    """The server does not support this request."""


class Corrupted(Exception):
    """Bytes were lost or changed during the transfer."""


def boto3_client(setting: str, timeout: float, connections: int) -> Any:
    """Return a boto3 S3 client without retries of its own: the caller retries.

    Args:
        setting: setting and value for error messages, such as datastore.url=s3://bucket.
        timeout: s without a byte after which a connection counts as broken.
        connections: maximum number of connections kept open.

    Raises:
        UserError: boto3 cannot create a client from its configuration.
    """
    # Imported here because the import takes a second.
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
                signature_version="s3v4",  # also for presigned URLs, which use an older version by default
                response_checksum_validation="when_required",  # complete objects are verified by hash
                s3={"payload_signing_enabled": False},  # would hash the same bytes once more
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{setting}: {single_line(error)}") from None


def single_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


class S3Client:
    """A prefix in a bucket of an S3 server.

    Args:
        url: s3://bucket/prefix.
        connections: parallel requests.

    Attributes:
        client: the boto3 client.
        checksums: whether requests carry the newer checksums (boto3's own setting).
        conditional_writes: whether the server supports If-None-Match on writes; true until shown otherwise.

    Raises:
        UserError: the URL has credentials or no bucket, or boto3 cannot create a client.
    """

    def __init__(self, url: str, connections: int) -> None:
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError(
                "datastore.url must be s3://bucket/prefix without credentials, ? or #: boto3 finds "
                "credentials by itself"
            )
        if not parts.netloc:
            raise UserError(f"datastore.url={url} has no bucket: type s3://bucket/prefix")
        self.url = url.rstrip("/")
        self.bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self.connections = connections
        self.client = boto3_client(f"datastore.url={url}", TIMEOUT, 2 * connections + 4)
        self.checksums = self.client.meta.config.request_checksum_calculation != "when_required"
        self.conditional_writes = True
        self._reached = False

    def key(self, path: str) -> str:
        """Return the key of the object at `path` within the prefix."""
        return f"{self._prefix}/{path}" if self._prefix else path

    def object_params(self, path: str) -> dict[str, str]:
        """Return the parameters Bucket and Key of boto3's calls for the object at `path`."""
        return {"Bucket": self.bucket, "Key": self.key(path)}

    def pages(self, operation: str, **params: Any) -> list[dict[str, Any]]:
        """Return all pages of a listing."""
        paginator = self.client.get_paginator(operation)

        def pages() -> list[dict[str, Any]]:
            result = list(paginator.paginate(Bucket=self.bucket, **params))
            for page in result:
                check_response(page, field="Name" if operation == "list_objects_v2" else "Bucket")
            return result

        return self.request("listing", pages)

    @contextlib.contextmanager
    def open_object(self, path: str, **params: Any) -> Iterator[Any]:
        """Open the body of an object. Not retried: call it within `request`."""
        response = self.client.get_object(**self.object_params(path), **params)
        check_response(response)
        with contextlib.closing(response["Body"]) as body:
            yield body

    def head(self, path: str) -> dict[str, Any]:
        """Return the response to a HEAD request: size, ETag and metadata of an object.

        Raises:
            NotFound: the object does not exist.
        """

        def head() -> dict[str, Any]:
            response: dict[str, Any] = self.client.head_object(**self.object_params(path))
            check_response(response)
            check_response(response, field="ContentLength")
            return response

        return self.request(f"querying {path}", head)

    def has_hash(self, path: str, file: File) -> bool:
        """Whether an object has the hash: in its metadata, or as its ETag if that is the MD5."""
        try:
            response = self.head(path)
        except NotFound:
            return False
        etag = "md5:" + response["ETag"].strip('"')
        # Some servers capitalize the keys.
        metadata = {name.lower(): value for name, value in response.get("Metadata", {}).items()}
        return response["ContentLength"] == file.bytes and file.hash in (metadata.get(HASH), etag)

    def put(self, path: str, data: bytes | bytearray, new: bool, file: File | None = None) -> None:
        """Write an object in one request, with the hash of `file` in its metadata.

        Raises:
            PreconditionFailed: `new` is true and the object exists.
        """
        metadata: dict[str, Any] = {"Metadata": {HASH: file.hash}} if file else {}
        checksum = self.checksum(data, file.hash if file else "")

        def put() -> None:
            condition = {"IfNoneMatch": "*"} if new and self.conditional_writes else {}
            response = self.client.put_object(
                **self.object_params(path), Body=data, **metadata, **checksum, **condition
            )
            check_response(response, checksum)

        self.conditional_request(f"writing {path}", put, new)

    def conditional_request(self, step: str, write: Callable[[], None], new: bool) -> None:
        """Write, and repeat without the condition if the server does not support conditional writes."""
        try:
            self.request(step, write)
        except NotImplementedByServer:
            if not (new and self.conditional_writes):
                raise
            self.conditional_writes = False
            self.request(step, write)

    def checksum(self, data: bytes | bytearray, known_hash: str = "") -> dict[str, str]:
        """Return the request parameter with the checksum by which the server verifies the bytes.

        Args:
            data: the bytes.
            known_hash: their hash in the manifest's format, if known; saves computing a checksum.
        """
        algorithm, _, value = known_hash.partition(":")
        if not self.checksums:
            return {"ContentMD5": _base64(hashlib.md5(data, usedforsecurity=False).digest())}
        if algorithm == "sha256":
            return {"ChecksumSHA256": _base64(bytes.fromhex(value))}
        return {"ChecksumCRC32": _base64(zlib.crc32(data).to_bytes(4, "big"))}

    def request(self, step: str, call: Callable[..., Result], **params: Any) -> Result:
        """Call boto3, and retry on transient errors.

        Args:
            step: what the request does, for messages, such as "reading a/v1/manifest.json".
            call: function that makes the request.
            params: its keyword arguments.

        Raises:
            NotFound: the object does not exist.
            PreconditionFailed: the condition of a write was not met.
            NotImplementedByServer: the server does not support the request.
            Refused: the server refuses its contents.
            InternalServerError: the server itself fails each time.
            UserError: any other error, or a transient error that persists.
        """
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
        from botocore.exceptions import ConnectionError as NotConnected
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        # Includes responses that are not XML or are truncated.
        transient = (
            HTTPClientError,
            NotConnected,
            IncompleteReadError,
            ResponseParserError,
            HTTPError,
            OSError,
            ValueError,  # a size or a time in a response that botocore cannot convert
            Corrupted,
        )
        retry = Retry(FIRST_WAIT, LONGEST_WAIT, MAX_FAILURES)
        while True:
            kind: type[UserError] = UserError
            try:
                result = call(**params)
            except ClientError as error:
                self._reached = True
                kind = InternalServerError if _status(error) == 500 else UserError
                reason = self._transient_reason(step, error)
            except transient as error:
                reason = single_line(error)
            except BotoCoreError as error:
                raise UserError(f"datastore.url={self.url}: {single_line(error)}") from None
            else:
                self._reached = True
                return result
            wait = retry.failed(self._reached)
            if wait is None:
                raise kind(
                    f"datastore.url={self.url}: {step} failed {retry.failures} times in a row: {reason}; "
                    "transferred data is kept: run it again to resume"
                )
            log.warning("%s: %s: %s; retry in %.1f s", self.url, step, reason, wait)
            time.sleep(wait)

    def _transient_reason(self, step: str, error: Any) -> str:
        """Return the reason of a transient error, and raise any other one as its own exception."""
        details = error.response.get("Error", {})
        code, message = str(details.get("Code", "")), single_line(Exception(details.get("Message", "")))
        status = _status(error)
        if code == "NoSuchBucket":
            raise UserError(f"datastore.url={self.url}: bucket {self.bucket} does not exist: create it first")
        if code in _NOT_FOUND:
            raise NotFound
        if status == 412:
            raise PreconditionFailed
        if status == 501 or code == "NotImplemented":
            raise NotImplementedByServer
        if status in (408, 409, 429) or status >= 500 or code in _TRANSIENT:
            return f"the server replied {status} {code}".rstrip()
        if code in _EXPIRED:
            raise UserError(
                f"datastore.url={self.url}: the credentials have expired ({code}): renew them and run it "
                "again; transferred data is kept"
            )
        if status in (401, 403):
            raise UserError(
                f"datastore.url={self.url}: {step} is forbidden ({code}): check the credentials that boto3 "
                "finds and the bucket's permissions"
            )
        kind = Refused if status == 400 and code in _REFUSED else UserError
        raise kind(f"datastore.url={self.url}: {step}: {code} {message}".rstrip())


def _status(error: Any) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return status


def check_response(
    response: Mapping[str, Any], checksum: Mapping[str, str] | None = None, field: str = "ETag"
) -> None:
    """Check that a response is complete and that its checksums match those of the bytes sent.

    A response that was truncated, or that comes from a proxy, may look like a valid one with few fields.

    Args:
        response: boto3's response.
        checksum: checksum parameters of the request; see `S3Client.checksum`.
        field: field that every complete response has.

    Raises:
        Corrupted: the field is missing, or the server received other bytes.
    """
    if field not in response:
        raise Corrupted(f"the server's response has no {field}")
    for name, value in (checksum or {}).items():
        if response.get(name, value) != value:
            raise Corrupted(f"the server received other bytes than were sent: {name} differs")


def read_into(body: Any, block: memoryview) -> int:
    """Fill `block` with an object's body.

    Returns:
        The number of bytes read, fewer than the block's size if the body ends early.

    Raises:
        Corrupted: the body is longer than the block.
    """
    with body as raw:  # urllib3's response; the http.client response below it reads without a copy
        response, done = getattr(raw, "_original_response", None) or raw, 0
        try:
            while done < len(block) and (got := response.readinto(block[done:])):
                done += got
            more = done == len(block) and response.read(1)
        except HTTPException as error:
            raise Corrupted(f"the response ended early: {single_line(error)}") from None
        if more:
            raise Corrupted("the response is longer than requested")
        if done == len(block):
            raw.release_conn()  # for the next request
        return done


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
