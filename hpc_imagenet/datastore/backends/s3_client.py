"""How a server of S3 is asked, by boto3: again while the trouble is one that passes.

Credentials, region, proxy and endpoint come from where boto3 looks for them: the environment (AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL …), ~/.aws, the machine's role. Objects get no ACL, so they are as private
as the bucket.
Sources: the guide to boto3's credentials; the S3 API reference, "Error responses", "Conditional writes",
"Checking object integrity".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import random
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from typing import Any, TypeVar

from hpc_imagenet.datastore.manifest import File
from hpc_imagenet.errors import UserError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PAUSE = 0.5  # s before the second try of a request, twice as long before each further one …
LONGEST = 20.0  # … up to this
TRIES = 9  # in a row: about a minute in all
FIRST_TRIES = 3  # to reach a server that was not reached yet
TIMEOUT = 60.0  # s without a byte
HASH = "hash"  # of an object's metadata, in the manifest's form

_PASSING = {"RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_NOT_THERE = {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}


class NotFound(Exception):
    """There is no such object, or no such upload."""


class PreconditionFailed(Exception):
    """An object is there already, so that it was not written."""


class NotImplementedByServer(Exception):
    """The server does not know such a request."""


class Corrupted(Exception):
    """Bytes were lost or changed on the way."""


def boto3_client(setting: str, timeout: float, connections: int) -> Any:
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
                signature_version="s3v4",  # also of addresses, which would else have the old form
                response_checksum_validation="when_required",  # the hash of the whole is ours
                s3={"payload_signing_enabled": False},  # a further hash of the same bytes
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{setting}: {single_line(error)}") from None


def single_line(error: Exception) -> str:
    """Return what an error says without line breaks."""
    return " ".join(str(error).split())


class S3Client:
    """A server, and the prefix in one of its buckets.

    Args:
        url: s3://bucket/prefix.
        connections: requests at a time, by all who share this.

    Attributes:
        client: boto3's.
        checksums: whether requests carry the newer checksums (boto3's own setting).
        conditional: whether it writes objects only where there are none; until it shows that it does not.

    Raises:
        UserError: the url holds a login or no bucket, or boto3 cannot make a client of what it finds.
    """

    def __init__(self, url: str, connections: int) -> None:
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError(
                "datastore.url is s3://bucket/prefix without a login, ? or #: boto3 finds the login"
            )
        if not parts.netloc:
            raise UserError(f"datastore.url={url} names no bucket: s3://bucket/prefix")
        self.url = url.rstrip("/")
        self.bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self.connections = connections
        self.client = boto3_client(f"datastore.url={url}", TIMEOUT, 2 * connections + 4)
        self.checksums = self.client.meta.config.request_checksum_calculation != "when_required"
        self.conditional = True
        self._reached = False

    def key(self, path: str) -> str:
        """Return the key of what lies at `path` within the prefix."""
        return f"{self._prefix}/{path}" if self._prefix else path

    def at(self, path: str) -> dict[str, str]:
        """Return where that is, as boto3's calls take it."""
        return {"Bucket": self.bucket, "Key": self.key(path)}

    def pages(self, operation: str, **words: Any) -> list[dict[str, Any]]:
        """Return all pages of a list."""
        paginator = self.client.get_paginator(operation)

        def pages() -> list[dict[str, Any]]:
            found = list(paginator.paginate(Bucket=self.bucket, **words))
            for page in found:
                check_response(page, has="Name" if operation == "list_objects_v2" else "Bucket")
            return found

        return self.request("listing", pages)

    @contextlib.contextmanager
    def opened(self, path: str, **words: Any) -> Iterator[Any]:
        """Return the body of an object; to be called by what is given to `ask`."""
        found = self.client.get_object(**self.at(path), **words)
        check_response(found)
        with contextlib.closing(found["Body"]) as body:
            yield body

    def head(self, path: str) -> dict[str, Any]:
        """Return what is noted of an object.

        Raises:
            Missing: there is none.
        """

        def head() -> dict[str, Any]:
            found: dict[str, Any] = self.client.head_object(**self.at(path))
            check_response(found)
            check_response(found, has="ContentLength")
            return found

        return self.request(f"looking at {path}", head)

    def has_hash(self, path: str, file: File) -> bool:
        """Whether an object has the hash: by its metadata, or by its ETag where that is the MD5."""
        try:
            found = self.head(path)
        except NotFound:
            return False
        etag = "md5:" + found["ETag"].strip('"')
        noted = {name.lower(): value for name, value in found.get("Metadata", {}).items()}  # some say Hash
        return found["ContentLength"] == file.bytes and file.hash in (noted.get(HASH), etag)

    def put(self, path: str, data: bytes | bytearray, new: bool, file: File | None = None) -> None:
        """Write an object in one request, with the hash of `file` in its metadata.

        Raises:
            Held: it is there, though it should be `new`.
        """
        more: dict[str, Any] = {"Metadata": {HASH: file.hash}} if file else {}
        sums = self.sums(data, file.hash if file else "")

        def put() -> None:
            only = {"IfNoneMatch": "*"} if new and self.conditional else {}
            check_response(self.client.put_object(**self.at(path), Body=data, **more, **sums, **only), sums)

        self.conditionally(f"writing {path}", put, new)

    def conditionally(self, what: str, write: Callable[[], None], new: bool) -> None:
        """Ask for a write, and once more without its condition where the server knows none."""
        try:
            self.request(what, write)
        except NotImplementedByServer:
            if not (new and self.conditional):
                raise
            self.conditional = False
            self.request(what, write)

    def sums(self, data: bytes | bytearray, known: str = "") -> dict[str, str]:
        """Return the checksum by which the server proves what arrives; `known` is the bytes' hash, if any."""
        algorithm, _, value = known.partition(":")
        if not self.checksums:
            return {"ContentMD5": _base64(hashlib.md5(data, usedforsecurity=False).digest())}
        if algorithm == "sha256":
            return {"ChecksumSHA256": _base64(bytes.fromhex(value))}
        return {"ChecksumCRC32": _base64(zlib.crc32(data).to_bytes(4, "big"))}

    def request(self, what: str, call: Callable[..., Result], **words: Any) -> Result:
        """Call, and call again while the trouble is one that passes.

        Raises:
            Missing: there is no such object.
            Held: a condition was not met.
            Unable: the server does not know such a request.
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
            Corrupted,
        )
        failures = 0
        while True:
            try:
                result = call(**words)
            except ClientError as error:
                self._reached = True
                trouble = self._judge(what, error)
            except passing as error:
                trouble = single_line(error)
            except BotoCoreError as error:
                raise UserError(f"datastore.url={self.url}: {single_line(error)}") from None
            else:
                self._reached = True
                return result
            failures += 1
            if failures >= (TRIES if self._reached else FIRST_TRIES):
                raise UserError(
                    f"datastore.url={self.url}: {what}: {trouble}, {failures} tries in a row; "
                    "what is there stays: ask again to go on"
                )
            wait = min(LONGEST, PAUSE * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
            log.warning("%s: %s: %s; again in %.1f s", self.url, what, trouble, wait)
            time.sleep(wait)

    def _judge(self, what: str, error: Any) -> str:
        """Return what passes of the server's answers, in words, and raise the others."""
        said = error.response.get("Error", {})
        code, words = str(said.get("Code", "")), single_line(Exception(said.get("Message", "")))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        if code == "NoSuchBucket":
            raise UserError(f"datastore.url={self.url}: there is no bucket {self.bucket}: make it first")
        if code in _NOT_THERE:
            raise NotFound
        if status == 412:
            raise PreconditionFailed
        if status == 501 or code == "NotImplemented":
            raise NotImplementedByServer
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


def check_response(
    answer: Mapping[str, Any], sums: Mapping[str, str] | None = None, has: str = "ETag"
) -> None:
    """Look whether an answer is whole, and hold the checksums in it against those of what was sent.

    An answer that was cut off, or that comes from a proxy between, may look like a good one that says little.

    Raises:
        Damaged: it lacks what every good one has, or the server has other bytes.
    """
    if has not in answer:
        raise Corrupted(f"the server's answer has no {has}")
    for name, value in (sums or {}).items():
        if answer.get(name, value) != value:
            raise Corrupted(f"the server has other bytes than were sent, by their {name}")


def read_into(body: Any, block: memoryview) -> int:
    """Fill `block` with an object's body; return the bytes that came, fewer where it ends before.

    Raises:
        Damaged: more came than there is room for.
    """
    with body as raw:  # urllib3's answer, and below it that of http.client, which copies nothing
        answer, done = getattr(raw, "_original_response", None) or raw, 0
        try:
            while done < len(block) and (got := answer.readinto(block[done:])):
                done += got
            more = done == len(block) and answer.read(1)
        except HTTPException as error:
            raise Corrupted(f"the answer broke off: {single_line(error)}") from None
        if more:
            raise Corrupted("more bytes came than were asked for")
        if done == len(block):
            raw.release_conn()  # for the next request
        return done


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
