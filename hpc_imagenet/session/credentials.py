"""What lets its owner in and nobody else: a token in a file of mode 600, and a certificate for TLS."""

from __future__ import annotations

import secrets
import socket
from datetime import datetime, timedelta, timezone
from pathlib import Path

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write

TOKEN = "token"  # in the run's folder


def new_token(run_folder: Path) -> str:
    """Write a new token, readable by its owner alone from the first byte on, and return it."""
    token = secrets.token_hex(32)  # 256 bits
    with atomic_write(run_folder / TOKEN, secret=True) as file:
        file.write(token.encode())
    return token


def token(run_folder: Path) -> str:
    """Return the token of a session.

    Raises:
        UserError: there is none, or it is somebody else's.
    """
    path = run_folder / TOKEN
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path} is gone: cancel the session and ask for it again") from None
    except PermissionError:
        raise UserError(
            f"{path} is {path.owner()}'s, and so is the session: take another session.name"
        ) from None


def certificate(folder: Path, hours: float) -> tuple[Path, Path, str]:
    """Write a key and a certificate of its own for this host.

    Args:
        folder: of mode 700.
        hours: that it is valid.

    Returns:
        The certificate, its key, and its SHA-256 fingerprint as browsers show it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, host, now = ec.generate_private_key(ec.SECP256R1()), socket.gethostname(), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host[:64])])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # the clocks of two machines differ
        .not_valid_after(now + timedelta(hours=hours + 1))
        # A tunnel ends at the browser's own machine, so localhost is what it asks for.
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host), x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    with atomic_write(files[1], secret=True) as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    return *files, made.fingerprint(hashes.SHA256()).hex(":").upper()
