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


def printable(value: object) -> str:
    """Return a value as text without escape sequences and control characters but tabs and line ends."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return _CONTROLS.sub("", _ESCAPES.sub("", text)).encode(errors="replace").decode()


def one_line(value: object) -> str:
    """Return a value as one printable line."""
    text = printable(value)
    return text if text.isprintable() else " ".join(text.split())
