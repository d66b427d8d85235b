"""The host that carries out commands, by ssh: which settings name it, without composing them.

Every command needs it first, so only YAML is read here: the stored settings, and the chosen cluster file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_imagenet.config.input.stored_settings import (
    SENT,
    config_folders,
    load_yaml,
    store,
    stored_settings,
    user_folder,
)
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError

_KEYS = ("cluster.host", "cluster.host_folder", "cluster.host_python")
_CONFIG_DIR = ("-cd", "--config-dir")

# Commands for which cluster= is more than a choice of the host: a setting of their jobs, or, of retry and
# resume, another cluster, which they refuse.
TAKE_CLUSTER = ("doctor", "evaluate", "price", "retry", "resume")


@dataclass(frozen=True)
class Host:
    """A host behind ssh, and what to use there.

    Attributes:
        address: user@host, or a name of ~/.ssh/config.
        folder: folder of code, environment and relative paths; relative to the home.
        python: the Python that makes the environment.
    """

    address: str
    folder: str = Cluster.host_folder
    python: str = Cluster.host_python


def find_host(arguments: Sequence[str]) -> Host | None:
    """Return the host of a command line, or None if it is carried out on this machine.

    Raises:
        UserError: cluster.host is not user@host, a file of settings cannot be read, a command on runs names a
            cluster that does not exist, or a sweep names clusters on different hosts.
    """
    if SENT in os.environ:  # this is the host
        return None
    typed = {key.lstrip("+"): value for key, equals, value in (w.partition("=") for w in arguments) if equals}
    stored = {item.key: "null" if item.value is None else str(item.value) for item in stored_settings()}
    name = typed.get("cluster") or stored.get("cluster")
    folders = config_folders(config_dir(arguments))
    file = _read_cluster(name, folders) if name else None
    if name and file is None and "," in name:  # a sweep over clusters
        file = _same_host(name.split(","), folders)
    if "cluster" in typed and file is not None:  # a chosen file also replaces what is stored for its group
        stored = {}
    values = {f"cluster.{key}": value for key, value in (file or {}).items()}
    for level in (stored, typed):
        values |= {key: value for key, value in level.items() if key in _KEYS}
    address, *others = ("" if (v := values.get(key)) in (None, "null") else str(v) for key in _KEYS)
    if not address:
        first = arguments[0] if arguments else ""
        composes = re.search("^-|=", first) or first in TAKE_CLUSTER
        if "cluster" in typed and file is None and not composes:
            raise UserError(
                f"cluster={name} is unknown: there is no cluster/{name}.yaml in conf/ or {user_folder()}"
            )
        return None
    if not re.fullmatch(r"(?!-)[^\s:/]+", address):
        raise UserError(
            f"cluster.host={address} must be user@host or a name of ~/.ssh/config, without a port or folder: "
            "a port is set in ~/.ssh/config, the folder by cluster.host_folder"
        )
    return Host(address, others[0] or Cluster.host_folder, others[1] or Cluster.host_python)


def config_dir(arguments: Iterable[str]) -> str | None:
    """Return the folder of --config-dir, or None."""
    remaining = iter(arguments)
    for word in remaining:
        if word in _CONFIG_DIR:
            return next(remaining, None)
        if word.startswith("--config-dir="):
            return word.partition("=")[2]
    return None


def without_host(arguments: Iterable[str]) -> list[str]:
    """Return the arguments of a command on runs without those that only choose the host."""
    remaining, kept = iter(arguments), []
    for word in remaining:
        if word in _CONFIG_DIR:
            next(remaining, None)
        elif not word.startswith("--config-dir=") and word.partition("=")[0] not in ("cluster", *_KEYS):
            kept.append(word)
    return kept


def store_host(host: Host, cluster: str) -> Path:
    """Store the host, and the name of a cluster file on it, as the user's default; return the file."""
    return store(
        dict(zip(("cluster", *_KEYS), (cluster, host.address, host.folder, host.python), strict=True))
    )


def _same_host(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Any] | None:
    """Return the first of several cluster files; None if one does not exist.

    Raises:
        UserError: they are on different hosts, whose runs are in different workspaces.
    """
    files = [_read_cluster(name, folders) for name in names]
    hosts = [str((file or {}).get("host") or "this machine") for file in files]
    if len(set(hosts)) > 1:
        pairs = ", ".join(f"{name} on {host}" for name, host in zip(names, hosts, strict=True))
        raise UserError(
            f"cluster={','.join(names)} are on different hosts ({pairs}): a sweep is split over clusters of "
            "one host; submit a part of it to each"
        )
    return None if None in files else files[0]


def _read_cluster(name: str, folders: Sequence[Path]) -> dict[str, Any] | None:
    """Return the values of a cluster file and of the files in its defaults; None if there is no such file."""
    path = next((p for folder in folders if (p := folder / "cluster" / f"{name}.yaml").is_file()), None)
    if path is None:
        package = Path(__file__).resolve().parents[1]  # its conf/ is within it in a wheel, else beside it
        ours = any((root / "conf/cluster" / f"{name}.yaml").exists() for root in (package, package.parent))
        return {} if ours else None
    own = load_yaml(path)
    values: dict[str, Any] = {}
    for default in own.pop("defaults", None) or []:
        if isinstance(default, str) and default not in ("_self_", name):
            values |= _read_cluster(default, folders) or {}
    return values | own
