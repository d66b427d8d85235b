"""Settings as typed in a shell, before Hydra parses them: keys given twice, paths, quoting.

Hydra's grammar gives meaning to characters that paths contain. The values of `PATH_SETTINGS` are therefore
taken as typed: `dataset.source=/data/my birds, 2020 (a=b)` needs quotes for the shell only.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from hpc_imagenet.config.schema import PATH_SETTINGS, Config
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home

# One value for the whole command.
_NOT_SWEPT = ("workspace", "wait", "dry_run", "price", "cluster", "tracker", "notify")
_FUNCTION = re.compile(r"(choice|sort|shuffle|tag|str)\(.*\)", re.DOTALL)  # of Hydra's grammar
_BEGINNING = re.compile(r"~|\.{0,2}/|[^/]+:")  # of a path or URL, rather than the rest of one


def key_of(word: str) -> str | None:
    """Return the name of the setting in `SETTING=VALUE`, without + in front; None for any other word."""
    key, equals, _ = word.partition("=")
    return key.lstrip("+") if equals and key[:1] not in ("-", "~") else None


def with_defaults(defaults: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return the overrides, after those of `defaults` that set something else."""
    given = {key_of(word) for word in overrides}
    return [*(word for word in defaults if key_of(word) not in given), *overrides]


def check_given_once(overrides: Sequence[str]) -> None:
    """Raise if a setting is given two values, of which Hydra would use the last.

    Raises:
        UserError: both, and the form of a sweep over them.
    """
    given: dict[str, str] = {}
    for word in overrides:
        key = key_of(word)
        if key is None:
            continue
        first, second = given.setdefault(key, word).partition("=")[2], word.partition("=")[2]
        if first != second:
            if "://" in word + given[key]:  # a URL may hold a secret by mistake
                raise UserError(f"{key} is set twice: write one of them")
            raise UserError(
                f"{given[key]} and {word} set {key} twice: {instead_of_several(key, [first, second])}"
            )


def instead_of_several(key: str, values: Sequence[str]) -> str:
    """Return what to write instead of several values of a setting."""
    if key == "stage":
        return "write one of them, or +stage=pipeline for download, process, upload and train"
    if key in _NOT_SWEPT or len(values) < 2:
        return f"write {' or '.join(f'{key}={value}' for value in values) or f'{key}=NAME'}"
    return f"write one of them, or -m {key}={','.join(values)} for a run with each"


def quote_paths(words: Sequence[str], multirun: bool = False) -> list[str]:
    """Return the words with those values quoted for Hydra that it would not read as they were typed.

    These are the values of `PATH_SETTINGS`, and of other text what Hydra cannot parse. Unchanged are null,
    interpolations (`${…}`), values in quotes, and sweeps: values with commas between paths.

    Args:
        words: overrides, in any order with other arguments.
        multirun: whether commas make a sweep of relative paths as well.
    """
    return [_quote(word, multirun) for word in words]


def _quote(word: str, multirun: bool) -> str:
    name, _, value = word.partition("=")
    key = key_of(word)
    if key is None or not (is_path(key) or is_text(key)):
        return word
    parsed = _parse(word)
    if not is_path(key):
        return word if parsed or value[:1] in ("'", '"') else f"{name}={_quoted(value)}"
    if value.lower() in ("", "null") or "${" in value or value[0] in ("'", '"') or _FUNCTION.fullmatch(value):
        return word
    if _is_sweep(value, multirun):
        return word if parsed else f"{name}={','.join(_quoted(part.strip()) for part in value.split(','))}"
    as_typed = parsed is not None and not parsed.is_sweep_override() and parsed.value() == value
    return word if as_typed else f"{name}={_quoted(value)}"


def _is_sweep(value: str, multirun: bool) -> bool:
    """Whether commas separate paths: `/a,/b`, or with -m `a,b`; not in `/a,b`, nor if that path exists."""
    first, *others = [part.strip() for part in value.split(",")]
    if not others or expand_home(value).exists():
        return False
    if not _BEGINNING.match(first):
        return multirun
    return all(_BEGINNING.match(part) or part == "null" for part in others)


def _parse(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _quoted(value: str) -> str:
    return str(QuotedString(value, Quote.single).with_quotes())


def quoted_form(word: str) -> str:
    """Return a setting as it is typed in a shell if its value is text: `"dataset.hint='a, b'"`.

    Of a list in brackets each element is quoted.
    """
    name, _, value = word.partition("=")
    if value[:1] == "[":
        parts = value[1:].removesuffix("]").split(",")
        text = f"{name}=[{','.join(_quoted(_unquoted(part.strip())) for part in parts)}]"
    else:
        text = f"{name}={_quoted(_unquoted(value))}"
    return shlex.quote(text) if re.search(r'["$`!]', text) else f'"{text}"'


def _unquoted(value: str) -> str:
    return value[1:].removesuffix(value[0]) if value[:1] in ("'", '"') else value


def is_path(key: str) -> bool:
    """Whether the value of a setting is a path or URL."""
    return key in PATH_SETTINGS or key.startswith("dataset.splits.")


def is_text(key: str) -> bool:
    """Whether a setting of the schema is text."""
    return _type_of(key) is str


def is_value(key: str) -> bool:
    """Whether the schema has a setting of that name which is no group."""
    found = _type_of(key)
    return found is not None and not dataclasses.is_dataclass(found)


def takes_quotes(key: str) -> bool:
    """Whether quotes make sense in the value of a setting: text, a list of texts, or a value of any type."""
    return _type_of(key) in (str, Any) or typing.get_origin(_type_of(key)) is list


def _type_of(key: str) -> Any:
    """Return the type of a setting, without `| None`; None for an unknown one."""
    found: Any = Config
    for part in key.split("."):
        if dataclasses.is_dataclass(found):
            found = typing.get_type_hints(found).get(part)
        elif typing.get_origin(found) is dict:
            found = typing.get_args(found)[1]
        elif found is not Any:
            return None
        if type(None) in typing.get_args(found):
            found = next(each for each in typing.get_args(found) if each is not type(None))
    return found
