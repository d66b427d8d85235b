"""Text from records and logs made safe for a terminal.

A label, a reason or a log line may contain escape sequences that move the cursor, change the title or the
clipboard of a terminal, and characters that reverse the direction of text (Trojan Source, CVE-2021-42574).
"""

from __future__ import annotations

import re

# ECMA-48: CSI sequences; OSC, DCS, SOS, PM and APC strings up to their end; other escapes.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# Of a name that people wrote: also line ends, tabs, and bytes that are not UTF-8 (surrogates).
UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}]")


def escape_name(name: str) -> str:
    """Return a name as people wrote it, with unprintable characters percent-encoded."""
    return _UNPRINTABLE.sub(percent_encoded, name)


def percent_encoded(match: re.Match[str]) -> str:
    """Return the matched characters as percent-encoded UTF-8."""
    # "surrogateescape" gives back the bytes of a file name that is not UTF-8.
    try:
        data = match[0].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = match[0].encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in data)


def printable(value: object) -> str:
    """Return a value as text without escape sequences and control characters but tabs and line ends."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return _CONTROLS.sub("", _ESCAPES.sub("", text)).encode(errors="replace").decode()


def one_line(value: object) -> str:
    """Return a value as one printable line."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    text = printable(text)
    return text if text.isprintable() else " ".join(text.split())


MAX_WORD, MAX_LINE = 300, 1500  # characters of an error line; a file name has at most 255 bytes
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")


def error_line(error: object) -> str:
    """Return an error as one printable line, with long names and long lines cut in their middle.

    A name may come from an archive or a server and have thousands of characters, which would hide what to
    type instead.
    """
    line = _LONG_WORD.sub(lambda word: _cut(word[0], MAX_WORD), one_line(error))
    return _cut(line, MAX_LINE) if len(line) > MAX_LINE else line


def _cut(text: str, limit: int) -> str:
    """Return the first and last third of `limit` characters, with the number of those left out between."""
    kept = limit // 3
    return f"{text[:kept]}[…{len(text) - 2 * kept:,} characters…]{text[-kept:]}"
