"""Stored settings: `hpc_imagenet.yaml` and config folders of the project and the user.

A stored `cluster: mine` chooses a file of a group, and `cluster.time: 60` or a mapping sets values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hpc_imagenet.config.input.slurm_values import check_quoted_times
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.io.ownership import check_own, read_own

PRECEDENCE = """\
Precedence, highest first:
1. the command line
2. the environment: HPC_IMAGENET_WORKSPACE, HPC_IMAGENET_CLUSTER
3. the project: ./hpc_imagenet.yaml, and config files in ./conf
4. the user: ~/.config/hpc_imagenet/hpc_imagenet.yaml, and config files in that folder
5. the package's conf/
"""
FILE = "hpc_imagenet.yaml"
SENT = "HPC_IMAGENET_SENT"  # set on cluster.host: the folder with the settings of the machine that sent them
VARIABLES = {"workspace": "HPC_IMAGENET_WORKSPACE", "cluster": "HPC_IMAGENET_CLUSTER"}


class Stored(NamedTuple):
    """One stored setting: its name, value, form as an override of Hydra's grammar, and where it is stored."""

    key: str
    value: Any
    override: str
    source: str


def user_folder() -> Path:
    """Return the folder of the user's settings."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "hpc_imagenet"


def _folders() -> list[Path]:
    """Return the folders of stored settings, highest precedence first: the project's, the user's."""
    if sent := os.environ.get(SENT):
        return [Path(sent) / "project", Path(sent) / "user", user_folder()]
    return [Path(), user_folder()]


def config_folders(config_dir: str | None = None) -> list[Path]:
    """Return the folders of config files in addition to the package's, highest precedence first.

    Raises:
        UserError: `config_dir` does not exist.
    """
    folders = [] if config_dir is None else [Path(config_dir).resolve()]
    if folders and not folders[0].is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder")
    stored = _folders()
    project = (stored[0] / "conf").resolve()
    # A conf/ with a config.yaml belongs to another Hydra application, or is the package's own.
    if not (project / "config.yaml").exists() and any((project / group).is_dir() for group in _groups()):
        folders.append(project)
    folders += [folder.resolve() for folder in stored[1:] if folder.is_dir()]
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        # Who names a folder with --config-dir trusts its owner; what is found by itself must be their own.
        named = config_dir is not None and folder == folders[0]
        for path in (folder, *config_files(folder)):
            check_own(path, path, "its settings are not used", named=named)
    return folders


def config_files(folder: Path) -> list[Path]:
    """Return the files of a folder of config groups, without links to nothing, such as the locks of Emacs."""
    return sorted(path for path in folder.rglob("*.yaml") if path.is_file())


def stored_settings() -> list[Stored]:
    """Return the settings of environment, project and user that are in effect, one per key.

    Raises:
        UserError: a file cannot be read as settings.
    """
    found = [
        Stored(key, value, f"{key}={_text(value)}", variable)
        for key, variable in VARIABLES.items()
        if (value := os.environ.get(variable))
    ]
    for path in (folder / FILE for folder in _folders()):
        higher = {stored.key for stored in found}
        found += [stored for stored in _read(path) if not _is_hidden(stored.key, higher)]
    return found


def add_stored_settings(overrides: Sequence[str]) -> list[str]:
    """Return the overrides after the stored settings that they do not replace; options come first."""
    given = {word.lstrip("+~").partition("=")[0] for word in overrides if word[:1] != "-"}
    stored = [item.override for item in stored_settings() if not _is_hidden(item.key, given)]
    # Next to the other overrides: Hydra cannot parse overrides with options between them.
    index = next((i for i, word in enumerate(overrides) if "=" in word and word[0] != "-"), len(overrides))
    return [*overrides[:index], *stored, *overrides[index:]]


def describe() -> str:
    """Return the order of precedence and the stored settings that are in effect, for --info."""
    lines = [PRECEDENCE]
    if sent := os.environ.get(SENT):  # as in the cells of a session
        lines.append(f"3 is here what your own machine sent, not ./{FILE} and ./conf: {sent}")
    lines += [f"config folder: {folder}" for folder in config_folders()]
    lines += [f"{item.override}   ({item.source})" for item in stored_settings()] or ["no stored settings"]
    return "\n".join(lines)


def stored_value(key: str) -> str | None:
    """Return the stored value of a text setting, such as workspace, or None."""
    found = next((item.value for item in stored_settings() if item.key == key), None)
    return None if found is None else str(found)


def store(values: dict[str, str]) -> Path:
    """Store settings of the user in place of those of the same names, and return their file.

    The other lines are kept, and what the mapping of a group holds: `cluster: {account: a}` becomes
    `cluster.account: a` beside a new `cluster`. A file to which no line can be added, such as one in the form
    of JSON, is written as a whole, without its comments.

    Raises:
        UserError: the file cannot be read as settings.
    """
    path = user_folder() / FILE
    before = load_yaml(path)
    replaced = {key: value for key, value in before.items() if key in values}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    node: Any = yaml.compose(text) if before else None
    starts = {key.start_mark.line: key.value for key, _ in node.value} if node else {}
    kept, dropping = [], False
    for number, line in enumerate(text.splitlines()):
        dropping = starts[number] in replaced if number in starts else dropping
        if not dropping or line.startswith("#"):
            kept.append(f"{line}\n")
    added = dict(_flatten(replaced)) | values
    settings = {key: value for key, value in before.items() if key not in replaced} | added
    text = f"{''.join(kept)}{_dump(added)}"
    if not _has(text, settings):  # a form to which no line can be added, such as that of JSON
        text = _dump(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path.resolve()) as file:  # a link remains, such as one into a folder of dotfiles
        file.write(text.encode())
    return path


def _dump(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _has(text: str, settings: dict[str, Any]) -> bool:
    """Whether text is YAML of exactly these settings."""
    try:
        return bool(yaml.safe_load(text) == settings)
    except yaml.YAMLError:
        return False


def _is_hidden(key: str, given: Any) -> bool:
    # Values of a group belong to the file that was chosen with them: cluster=lab also replaces cluster.time.
    return key in given or key.partition(".")[0] in given


def _read(path: Path) -> Iterator[Stored]:
    groups = _groups()
    for key, value in _flatten(load_yaml(path)):
        if key in groups:
            if not isinstance(value, str):
                raise UserError(f"{path}: {key}: {value!r} is not the name of a file, such as {key}: NAME")
            yield Stored(key, value, f"{'+' * (key == 'stage')}{key}={_text(value)}", str(path))
        else:
            yield Stored(key, value, f"++{key}={_literal(value)}", str(path))


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; empty if there is no such file.

    Raises:
        UserError: it cannot be read as settings.
    """
    try:
        text = read_own(path, None, "its settings are not used").decode()
        check_quoted_times(text, path)
        loaded = yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{path}: must contain settings, such as workspace: /scratch/me/imagenet")
    return loaded


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _groups() -> set[str]:
    return {entry.name for entry in fields(Config) if is_dataclass(entry.default_factory)}


def _literal(value: Any) -> str:
    """Return a value of YAML in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return _text(str(value)) if not isinstance(value, dict) else "{}"


def _text(text: str) -> str:
    if re.fullmatch(r"/?[A-Za-z_][A-Za-z0-9_./@-]*", text) and text.lower() not in (
        "null",
        "true",
        "false",
        "nan",
        "inf",
    ):
        return text
    from hydra.core.override_parser.types import Quote, QuotedString

    return str(QuotedString(text, Quote.single).with_quotes())
