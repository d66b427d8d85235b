"""Text from elsewhere made printable: control characters, and names of thousands of characters."""

from __future__ import annotations

import pytest

from hpc_imagenet.io.printable import MAX_LINE, MAX_WORD, error_line, one_line


def test_error_line_cuts_long_names_and_keeps_what_to_type() -> None:
    line = error_line(f"x.tar: two members are called {'a' * 5000}.JPEG; set dataset.source")
    assert len(line) < 400
    assert line.startswith("x.tar: two members are called aaaa")
    assert line.endswith(".JPEG; set dataset.source")
    assert "[…4,806 characters…]" in line


def test_error_line_cuts_a_long_name_with_spaces() -> None:
    line = error_line("bad " + "a b " * 5000 + "; set x=1")
    assert len(line) < MAX_LINE
    assert line.endswith("; set x=1")


@pytest.mark.parametrize("text", ["/a" * (MAX_WORD // 2), "short", "one\ntwo", "\x1b[1mx\x1b[0m"])
def test_ordinary_lines_are_not_cut(text: str) -> None:
    assert error_line(text) == one_line(text)
