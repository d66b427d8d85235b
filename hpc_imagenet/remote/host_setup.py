"""Send parcels to the host, and make the environment there from constraints.txt, once."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hpc_imagenet.config.host import Host
from hpc_imagenet.datastore.backends.ssh_connection import SshConnection
from hpc_imagenet.errors import UserError
from hpc_imagenet.remote.parcels import Parcel

SENT, MADE = "/.sent", "/.made"  # files in a folder of the host: it is complete

# $1: the folder. The newest code comes first.
_LIST = (
    'mkdir -p "$1" && cd "$1" && mkdir -p code config files venv && '
    "{ ls -t code/*/.sent config/*/.sent files/*/.sent venv/*/.made 2>/dev/null || true; }"
)
# $1: the folder, further arguments: parcels.
_MARK = 'cd "$1" && shift && for parcel; do : > "$parcel/.sent" || exit 1; done'
# $1: the folder, $2: the environment, $3: the code, $4: Python. Safe to run twice, also at the same time.
# One line, as not every login shell takes several.
_MAKE = (
    'cd "$1" || exit 1; exec 1>&2 9>"$2.lock"; flock 9 2>/dev/null; [ -e "$2/.made" ] && exit 0; '
    'case "$4" in "~/"*) python="$HOME/${4#"~/"}";; *) python="$4";; esac; '
    '"$python" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null || '
    '{ echo "$4 is not Python 3.10 to 3.13 there: set cluster.host_python to one, such as the path that '
    'which python3 prints after module load python"; exit 1; }; '
    '{ "$2/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$2"; } && '
    '"$2/bin/python" -m pip install -q --disable-pip-version-check -c "$3/constraints.txt" '
    '"./$3[demo,session]" && "$2/bin/python" -m pip uninstall -q -y hpc-imagenet && : > "$2/.made"'
)


def environment_path(code: Parcel) -> str:
    """Return the folder of the environment in the host's folder; its name is a hash of constraints.txt."""
    source = code.files["constraints.txt"]
    content = source.read_bytes() if isinstance(source, Path) else source
    return f"venv/{hashlib.sha256(content).hexdigest()[:12]}"


def set_up_host(host: Host, shell: str, parcels: Sequence[Parcel]) -> None:
    """Send the parcels that the host lacks, and make the environment if it has none for constraints.txt.

    Transfers are resumed after a lost connection.

    Args:
        host: the host.
        shell: ssh with its options.
        parcels: the code first.

    Raises:
        UserError: a transfer or the installation failed, or a file changed while it was sent.
    """
    connection = SshConnection(f"{host.address}:{host.folder}", "cluster.host", shell)
    present = connection.run(_LIST, connection.root).decode().split("\n")
    older = next((name.removesuffix(SENT) for name in present if name.startswith("code/")), None)
    missing = [parcel for parcel in parcels if f"{parcel.path}{SENT}" not in present]
    for parcel in missing:
        _report(host, f"sending {parcel.kind}")
        # go-w: settings that others may write are refused, and on the host others may be in the user's group.
        options = ["-zpc", "--chmod=go-w", "--partial-dir=.partial"]
        if parcel.kind == "code" and older:  # equal files are not sent, and take no space
            # -W: rsync 3.2.7 fails to verify a file that is sent as a difference to one of --link-dest.
            options = ["-zpcW", "--chmod=go-w", f"--link-dest=../../{older}"]
        with tempfile.TemporaryDirectory() as folder:
            parcel.write(Path(folder))
            target = connection.rsync_path(f"{parcel.path}/")
            connection.rsync(f"sending {parcel.kind}", [*options, f"{folder}/", target])
        if Parcel(parcel.kind, parcel.files).name != parcel.name:  # it is not marked as sent
            raise UserError(f"cluster.host: {parcel.kind} changed while it was sent: give the command again")
    if missing:
        connection.run(_MARK, connection.root, *(parcel.path for parcel in missing))
    environment = environment_path(parcels[0])
    if f"{environment}{MADE}" not in present:
        _report(host, "installing the packages of constraints.txt, once; this takes minutes")
        connection.run(_MAKE, connection.root, environment, parcels[0].path, host.python)


def _report(host: Host, step: str) -> None:
    print(f"{host.address}: {step}", file=sys.stderr, flush=True)
