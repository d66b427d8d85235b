"""Write docs/settings.md, the reference of all settings: `python -m hpc_imagenet.config.settings_page`."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any

import yaml
from omegaconf import MISSING

from hpc_imagenet.config.compose import CONF
from hpc_imagenet.config.dataset import Archive
from hpc_imagenet.config.schema import Config

HEAD = """\
# Settings

Every setting with its type, valid values, default and meaning. Set any of them on the command line, such as
`recipe.epochs=30`; [configuration.md](configuration.md) explains groups, sweeps and your own files. The
default "group" is set by the chosen file of that group in `conf/`.

This page is generated: `python -m hpc_imagenet.config.settings_page > docs/settings.md`
"""


def page() -> str:
    """Return the page as Markdown."""
    values = yaml.safe_load((CONF / "config.yaml").read_text())
    types = typing.get_type_hints(Config)
    groups = [(entry.name, types[entry.name]) for entry in fields(Config) if is_dataclass(types[entry.name])]
    plain = [entry for entry in fields(Config) if not is_dataclass(types[entry.name])]
    parts = [HEAD, "## Top level\n", *_table("", Config, plain, values)]
    for name, schema in groups:
        note = (schema.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
        parts += [f"## {name}\n", f"{note}\n", *_table(f"{name}.", schema, fields(schema), values.get(name))]
    parts += ["## dataset.archives.train, .val, .devkit\n"]
    parts += _table("dataset.archives.train.", Archive, fields(Archive), None)
    return "\n".join(parts).rstrip() + "\n"


def _table(
    prefix: str, schema: Any, entries: typing.Iterable[Field[Any]], values: dict[str, Any] | None
) -> Iterator[str]:
    types = typing.get_type_hints(schema)
    rows = ["| setting | type | values | default | meaning |", "|---|---|---|---|---|"]
    for entry in entries:
        cells = (_type(types[entry.name]), _bounds(entry), _default(entry, values or {}))
        meaning = entry.metadata.get("meaning", "")
        rows.append(f"| `{prefix}{entry.name}` | {' | '.join(cells)} | {meaning} |")
    yield "\n".join(rows) + "\n"


def _type(hint: Any) -> str:
    if hint is Any:  # a number, or text that `parse` of the field converts
        return "number or text"
    names = {type(None): "null", str: "text", int: "integer", float: "number", bool: "true or false"}
    if typing.get_origin(hint) in (dict, list):
        return {dict: "mapping", list: "list"}[typing.get_origin(hint)]
    return " or ".join(names.get(each, "text") for each in typing.get_args(hint) or (hint,))


def _default(entry: Field[Any], values: dict[str, Any]) -> str:
    if entry.name in values:
        value = values[entry.name]
    elif entry.default is NO_DEFAULT:
        return "empty"
    elif entry.default == MISSING:
        return "group"
    else:
        value = entry.default
    if isinstance(value, str) and value.startswith("${oc.env:"):
        variable, _, otherwise = value[len("${oc.env:") : -1].partition(",")
        return f"`{variable}`, else `{otherwise}`"
    if value is None or value == "":
        return "null" if value is None else "empty"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _bounds(entry: Field[Any]) -> str:
    limits = entry.metadata
    if not limits:
        return ""
    if limits["choices"]:
        return ", ".join(limits["choices"])
    if limits["maximum"] is not None:
        return f"{limits['minimum']} to {limits['maximum']}"
    if limits["minimum"] is not None:
        return f"at least {limits['minimum']}"
    return f"more than {limits['above']}" if limits["above"] is not None else ""


if __name__ == "__main__":
    print(page(), end="")
