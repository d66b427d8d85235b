"""Make each notebook of this folder from the script of its name: python notebooks/make.py.

A cell begins with `# %%` or, where it is text, `# %% [markdown]`. Notebooks are kept without outputs.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent


def notebook(script: str) -> str:
    """Return the notebook that a script describes, as JSON."""
    cells = []
    for kind, text in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", script, re.MULTILINE):
        text = text.strip("\n")
        if kind.strip() == "[markdown]":
            cell = nbformat.v4.new_markdown_cell(re.sub(r"^# ?", "", text, flags=re.MULTILINE))
        else:
            cell = nbformat.v4.new_code_cell(text)
        cell["id"] = f"cell-{len(cells)}"  # by default drawn anew each time
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def scripts() -> list[Path]:
    """Return the scripts that notebooks are made from."""
    return [path for path in sorted(HERE.glob("*.py")) if path.name != "make.py"]


if __name__ == "__main__":
    for path in scripts():
        path.with_suffix(".ipynb").write_text(notebook(path.read_text()))
