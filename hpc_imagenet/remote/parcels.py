"""What the host needs to carry out a command: the code, the settings, and files that settings name.

Each is a parcel, a set of files in a folder that is named by the hash of their content. So a parcel that the
host has is never sent again, and one that a queued job uses is never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_imagenet.config.host import Host, config_dir
from hpc_imagenet.config.input.stored_settings import (
    FILE,
    VARIABLES,
    config_folders,
    stored_value,
    user_folder,
)
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home

_ROOT = Path(__file__).resolve().parents[2]
# What running needs; the rest of the checkout (tests, docs, benchmarks) stays here.
_CODE = ("hpc_imagenet", "conf", "slurm", "notebooks", "pyproject.toml", "constraints.txt", "README.md")
_FILES = ("download.login", "model.weights")  # settings that name a file, which is sent
_DATA = ("dataset.source", "datastore.url", "workspace")  # settings that name a folder, which is not


@dataclass
class Parcel:
    """Files to send, by their path in the parcel: a file of this machine, or content.

    Attributes:
        kind: code, config or files; the parcel is sent to `<kind>/<name>/`.
        name: 12 hex digits of the hash of paths and contents.
    """

    kind: str
    files: dict[str, Path | bytes]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for path, source in sorted(self.files.items()):
            content = _hash_file(source) if isinstance(source, Path) else hashlib.sha256(source).digest()
            mode = os.access(source, os.X_OK) if isinstance(source, Path) else False
            digest.update(json.dumps([path, mode, content.hex()]).encode())
        self.name = digest.hexdigest()[:12]

    @property
    def path(self) -> str:
        """The parcel's folder in the host's folder."""
        return f"{self.kind}/{self.name}"

    def write(self, folder: Path) -> None:
        """Write the parcel into a folder; files of this machine become links, which rsync follows."""
        for path, source in self.files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path):
                target.symlink_to(source.absolute())
            else:
                target.write_bytes(source)


@dataclass(frozen=True)
class LocalPath:
    """A path in a setting that exists on this machine; refused if the host has no such path."""

    path: str
    refusal: str  # one line


@dataclass
class Sending:
    """A command line for the host.

    Attributes:
        arguments: the arguments, with paths of the host.
        environment: variables with settings.
        parcels: what the host must have.
        local_paths: paths that exist on this machine.
    """

    arguments: list[str]
    environment: dict[str, str]
    parcels: list[Parcel]
    local_paths: list[LocalPath]


def make_sending(host: Host, arguments: Sequence[str], submits: bool) -> Sending:
    """Return what to send to the host for a command line.

    Args:
        host: the host.
        arguments: the command line as typed.
        submits: whether the arguments are settings of a submission, so that any setting can be added.

    Raises:
        UserError: the code cannot be sent.
    """
    config = settings_parcel(config_dir(arguments))
    sending = Sending([], {}, [code_parcel(), config], [])
    typed = set()
    for word in _with_config_dir(arguments, f"{config.path}/config-dir"):
        key, equals, value = word.partition("=")
        typed.add(key.lstrip("+"))
        if equals and key.lstrip("+") in (*_FILES, *_DATA):
            value = _localized(host, key.lstrip("+"), value, sending)
        sending.arguments.append(f"{key}{equals}{value}")
    for key in (*_FILES, *_DATA):
        if key not in typed and (stored := stored_value(key)):
            changed = _localized(host, key, stored, sending)
            if changed != stored and submits and key in _FILES:
                sending.arguments.append(f"{key}={changed}")
    for key, variable in VARIABLES.items():
        if inherited := os.environ.get(variable):
            sending.environment[variable] = _localized(host, key, inherited, sending)
    return sending


def code_parcel(root: Path = _ROOT) -> Parcel:
    """Return the tracked files of the checkout as they are now, with the commit and the difference to it.

    Files that are new and not ignored are sent as well, since tracked ones may import them.

    Raises:
        UserError: the package is installed without a checkout.
    """
    if not (root / "constraints.txt").is_file():
        raise UserError(
            "cluster.host needs a checkout of this project, whose constraints.txt makes the environment on "
            "the host: clone it, and install it with pip install --editable"
        )
    if (root / ".git").exists():
        listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_CODE)
        names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    else:
        found = (path for name in _CODE for path in (root / name, *(root / name).rglob("*")))
        names = [path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts]
    files: dict[str, Path | bytes] = {name: root / name for name in names if (root / name).is_file()}
    if (root / ".git").exists():
        commit = _git(root, "describe", "--always", "--dirty", "--abbrev=12").decode().strip()
        files["code.json"] = json.dumps({"commit": commit}).encode()
        if difference := _git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", *_CODE):
            files["difference.patch"] = difference
    return Parcel("code", files)


def settings_parcel(folder: str | None) -> Parcel:
    """Return the config files of the project, the user and --config-dir.

    Raises:
        UserError: `folder` does not exist.
    """
    files: dict[str, Path | bytes] = {}
    places = {Path("conf").resolve(): "project/conf", user_folder().resolve(): "user"}
    for source in config_folders(folder):
        place = places.get(source, "config-dir")
        files |= {f"{place}/{path.relative_to(source)}": path for path in source.rglob("*.yaml")}
    if folder is not None:  # also if it is one of the others
        files |= {f"config-dir/{p.relative_to(folder)}": p for p in Path(folder).rglob("*.yaml")}
    if Path(FILE).is_file():
        files[f"project/{FILE}"] = Path(FILE)
    return Parcel("config", files or {"project/.none": b""})


def _with_config_dir(arguments: Sequence[str], folder: str) -> list[str]:
    words = list(arguments)
    for index, word in enumerate(words):
        if word in ("-cd", "--config-dir") and index + 1 < len(words):
            words[index + 1] = folder
        elif word.startswith("--config-dir="):
            words[index] = f"--config-dir={folder}"
    return words


def _localized(host: Host, key: str, text: str, sending: Sending) -> str:
    """Return the value of a setting with paths of the host; add what has to be sent or checked."""
    quote = text[0] if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] else ""
    values = [text[1:-1]] if quote else text.split(",")  # a sweep
    return quote + ",".join(_path_there(host, key, value, sending) for value in values) + quote


def _path_there(host: Host, key: str, value: str, sending: Sending) -> str:
    if value.startswith(f"{host.address}:"):  # the explicit form of a path there
        return value[len(host.address) + 1 :]
    try:
        path = expand_home(value)
    except UserError:  # the host may have a user of that name
        return value
    if not value or re.match(r"[^/]+:", value) or not path.exists():  # such as s3://…, or a path there
        return value
    if key in _FILES and path.is_file():
        parcel = Parcel("files", {path.name: path})
        sending.parcels.append(parcel)
        return f"{parcel.path}/{path.name}"
    # Relative places of output are made there; dataset.source must exist.
    if key == "dataset.source" or value.startswith(("/", "~")):
        here = f"{key}={value} is on this machine, and {host.address} has no such path"
        if key == "workspace":
            fix = f"set a folder there, or {key}={host.address}:{path.absolute()} to create this one"
        else:
            name = path.resolve().name
            fix = (
                f"copy it with rsync -a {path} {host.address}:{host.folder}/ and set {key}={name}, "
                "or give the path it has there"
            )
        sending.local_paths.append(LocalPath(value, f"{here}: {fix}"))
    return value


def _hash_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    except FileNotFoundError:
        raise UserError(
            "cluster.host: git is missing on this machine, which lists the files to send"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"cluster.host: git in {root}: {error.stderr.decode().strip()}") from None
    return done.stdout
