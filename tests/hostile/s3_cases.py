"""Hostile S3 servers: what they answer for one archive, and for the list of a datastore's versions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from cases import FILES, Case, write_archives
from http_cases import Reply, fixed, ranged, whole
from run_stage import config_of, run_stage

from hpc_imagenet.data.download import receipt
from hpc_imagenet.datastore import versions
from hpc_imagenet.demo.http_server import Handler, serving
from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.work import download

_LOGIN = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "never-print-this"}
_LOGIN |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1"}
_LOGIN |= {"AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}


def failure(status: str, code: str, message: str = "m", head: str = "", more: tuple[str, ...] = ()) -> Reply:
    """Return a server that answers with an S3 error."""
    body = (
        f"<?xml version='1.0'?>{head}<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    )
    return fixed(status, "Content-Type: application/xml", f"Content-Length: {len(body)}", *more, body=body)


def listing(content: str) -> Reply:
    """Return a server that answers a list with this content."""
    body = f"<?xml version='1.0'?><ListBucketResult><Name>source</Name>{content}</ListBucketResult>".encode()
    return fixed("200 OK", "Content-Type: application/xml", f"Content-Length: {len(body)}", body=body)


def _serving(folder: Path, answer: Reply, only: str) -> object:
    served = (folder / "source" / FILES["val"]).read_bytes()

    class Hostile(Handler):
        def _answer(self, body: bool) -> None:
            if only not in self.path:
                super()._answer(body)
                return
            self.wfile.write(answer(served, self.headers.get("Range")))
            self.close_connection = True

    return serving(folder, Hostile)


def run(answer: Reply) -> Callable[[Path], str]:
    """Return the work of a case: download archives from the bucket `source`."""

    def work(folder: Path) -> str:
        write_archives(folder / "source", {})
        with (
            _serving(folder, answer, FILES["val"]) as url,
            mock.patch.dict(os.environ, {**_LOGIN, "AWS_ENDPOINT_URL": url}),
        ):  # type: ignore[attr-defined]
            config = config_of(folder / "workspace", "s3://source")
            config.download.timeout = 5
            kept = folder / "workspace" / "archives" / "numbers"
            try:
                run_stage(download, config)
            except UserError:
                assert receipt.missing_receipts(kept, FILES.values()), "a refused archive looks whole"
                raise
        assert (kept / FILES["val"]).read_bytes() == (folder / "source" / FILES["val"]).read_bytes()
        return "3 archives"

    return work


def listed(answer: Reply) -> Callable[[Path], str]:
    """Return the work of a case: list the versions of a datastore."""

    def work(folder: Path) -> str:
        write_archives(folder / "source", {})
        with (
            _serving(folder, answer, "/") as url,
            mock.patch.dict(os.environ, {**_LOGIN, "AWS_ENDPOINT_URL": url}),
            mock.patch("hpc_imagenet.datastore.backends.s3_client.LONGEST_WAIT", 0.01),
            mock.patch("hpc_imagenet.datastore.backends.s3_client.FIRST_WAIT", 0.01),
        ):
            return f"versions {versions.complete_versions('s3://source/stores', 'digits')}"

    return work


_LAUGHS = (
    "<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>"
    + "".join(
        f"<!ENTITY {chr(c + 1)} '{'&' + chr(c) + ';'}{('&' + chr(c) + ';') * 9}'>" for c in range(97, 107)
    )
    + "]>"
)
_KEY = "<Contents><Key>stores/digits/v1/manifest.json</Key><Size>5</Size><LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"

_INPUTS: list[tuple[str, Callable[[Path], str], str]] = [
    ("access denied", run(failure("403 Forbidden", "AccessDenied")), "is forbidden"),
    (
        "a clock that is skewed",
        run(failure("403 Forbidden", "RequestTimeTooSkewed")),
        "the clock of this machine is wrong",
    ),
    (
        "a token that has expired",
        run(failure("400 Bad Request", "ExpiredToken")),
        "the credentials have expired",
    ),
    (
        "a signature that does not match",
        run(failure("403 Forbidden", "SignatureDoesNotMatch")),
        "is forbidden",
    ),
    ("no such bucket", run(failure("404 Not Found", "NoSuchBucket")), "does not exist"),
    (
        "another region",
        run(failure("301 Moved", "PermanentRedirect", more=("x-amz-bucket-region: mars",))),
        "",
    ),
    (
        "a redirect to another host",
        run(failure("307 Moved", "TemporaryRedirect", more=("Location: http://127.0.0.1:9/x",))),
        "",
    ),
    ("slow down", run(failure("503 Slow Down", "SlowDown", more=("Retry-After: 0",))), "status 503"),
    (
        "slow down for ² seconds",
        run(failure("503 Slow Down", "SlowDown", more=("Retry-After: ²",))),
        "status 503",
    ),
    ("an internal error", run(failure("500 Oops", "InternalError")), "status 500"),
    ("a code of escape sequences", run(failure("400 Bad", "\x1b[2J".replace("\x1b", "&#27;"))), "status 400"),
    ("a billion laughs", run(failure("400 Bad", "X", "&k;", _LAUGHS)), "status 400"),
    (
        "an error that is an HTML page",
        run(fixed("400 Bad", "Content-Length: 20", body=b"<html>" + b" " * 14)),
        "status 400",
    ),
    ("an object that is cut", run(whole('ETag: "1"', lack=700)), "failed attempts in a row"),
    ("an object without a length", run(whole('ETag: "1"', length=None)), "has no Content-Length"),
    (
        "another range than requested",
        run(ranged("Content-Range: bytes 5-{last}/{total}")),
        "another range than requested",
    ),
    (
        "a range with a total of 1",
        run(ranged("Content-Range: bytes 0-0/1", 0, 'ETag: "1"')),
        "more than the 1 bytes",
    ),
    (
        "an object that is an HTML page",
        run(fixed("200 OK", "Content-Length: 606", 'ETag: "1"', body=b"<html>" + b" " * 600)),
        "is an HTML page",
    ),
    ("a list without a version", listed(listing(_KEY)), "ok: versions []"),
    (
        "a list that never ends",
        listed(
            listing(_KEY + "<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>")
        ),
        "",
    ),
    ("a list without its next token", listed(listing(_KEY + "<IsTruncated>true</IsTruncated>")), ""),
    ("a list that is not XML", listed(fixed("200 OK", "Content-Length: 5", body=b"hello")), ""),
    ("a list with a path upward", listed(listing(_KEY.replace("v1/", "../../v1/"))), "ok: versions []"),
    ("a list with a version of 5,000 digits", listed(listing(_KEY.replace("v1/", f"v{'9' * 5000}/"))), ""),
    ("a list with a size that is no number", listed(listing(_KEY.replace(">5<", ">many<"))), ""),
    (
        "a list with a time of nonsense",
        listed(listing(_KEY.replace("2020-01-01T00:00:00Z", "yesterday"))),
        "",
    ),
    ("a list that is denied", listed(failure("403 Forbidden", "AccessDenied")), "AccessDenied"),
]

CASES = [Case("s3", name, work, expected) for name, work, expected in _INPUTS]
