"""How clients reach a running session: connection details, access token and TLS certificate.

The details are stored in the attempt folder and contain no secret. The token is a file of mode 600.
"""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write, read_json, write_json
from hpc_imagenet.io.ownership import owner_name
from hpc_imagenet.runs.attempt import Attempt

TOKEN = "token"  # file name in the run folder
WARNING = 600.0  # time before a session's end at which users are warned, s
_FILE = "session.json"


@dataclass(frozen=True)
class ConnectionInfo:
    """Address, certificate and end of a session's server.

    `way` is loopback, socket or address; `fingerprint` is the SHA-256 of the certificate of a TLS server.
    """

    host: str
    way: str
    port: int  # of a server on a Unix socket: the local port of the tunnel
    socket: str | None
    fingerprint: str | None
    notebooks: str  # root folder of Jupyter
    ends: float  # s since 1970
    idle_minutes: float | None
    restarts: int  # Slurm restarts of the attempt when this was written
    job: str | None = None  # job id for srun, a plain number even for an array task

    def save(self, attempt: Attempt) -> None:
        """Write the details to the attempt folder."""
        write_json(attempt.folder / _FILE, asdict(self))


def load_connection_info(attempt: Attempt) -> ConnectionInfo | None:
    """Return the details of the attempt's current start; None until its server responds."""
    values: dict[str, Any] | None = read_json(attempt.folder / _FILE)
    if values is None or values["restarts"] != attempt.started.get("restarts", 0):
        return None
    return ConnectionInfo(**values)


def end_warning(ends: float) -> str:
    """Return a warning about a session's end (`ends`, s since 1970); empty earlier than `WARNING` before."""
    left = ends - time.time()
    if left >= WARNING:
        return ""
    minutes = max(1, round(left / 60))
    clock = time.strftime("%H:%M", time.localtime(ends))
    return (
        f"this session ends in {minutes} {'minute' if minutes == 1 else 'minutes'}, at {clock}: "
        "save your work; resume restarts the session"
    )


def new_token(run_folder: Path) -> str:
    """Write a new token to a file that only its owner can ever read, and return the token."""
    token = secrets.token_hex(32)  # 256 bits
    with atomic_write(run_folder / TOKEN, secret=True) as file:
        file.write(token.encode())
    return token


def read_token(run_folder: Path) -> str:
    """Return the token of a session.

    Raises:
        UserError: the token file does not exist or belongs to another user.
    """
    path = run_folder / TOKEN
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: cancel the session, then resume it") from None
    except PermissionError:
        raise UserError(
            f"{path} belongs to {owner_name(path)}, and so does the session: "
            "start your own with another session.name"
        ) from None


def new_certificate(folder: Path, hours: float) -> tuple[Path, Path, str]:
    """Write a private key and a self-signed certificate for this host.

    Args:
        folder: folder of mode 700.
        hours: validity of the certificate, h.

    Returns:
        The certificate's path, its key's path, and its SHA-256 fingerprint in the format of browsers.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, host, now = ec.generate_private_key(ec.SECP256R1()), socket.gethostname(), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host[:64])])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # the clocks of two machines differ
        .not_valid_after(now + timedelta(hours=hours + 1))
        # The tunnel ends on the browser's machine, so the browser connects to localhost.
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host), x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    with atomic_write(files[1], secret=True) as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    return *files, signed.fingerprint(hashes.SHA256()).hex(":").upper()
