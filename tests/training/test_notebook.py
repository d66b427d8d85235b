"""The notebook of a session needs nothing of this package but its API, and its cells run in order."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import write_store

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks/prototype.py"


def test_imports_the_api_alone() -> None:
    imported = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(NOTEBOOK.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert imported == ["hpc_imagenet", "time", "IPython.display"]


@pytest.mark.slow
def test_cells_run_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "workspace/datastores/digits/v1"
    write_store(folder, {"train": 700, "val": 100})
    (tmp_path / "datastore").symlink_to(folder)
    text = NOTEBOOK.read_text()
    for long, short in (
        ('CLUSTER = "auto"', 'CLUSTER = "foreground"'),
        ("seconds=10", "seconds=1"),
        ("MINUTES = 1", "MINUTES = 0.02"),
        ("model=resnet18,mobilenet_v3_small", "model=mobilenet_v3_small"),
        ('"seed=0"', '"seed=0", "recipe.epochs=1"'),
    ):
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    (tmp_path / "cells.py").write_text(text)
    environment = {
        **os.environ,
        "HPC_IMAGENET_WORKSPACE": str(tmp_path / "workspace"),
        "HPC_IMAGENET_DATASTORE": str(tmp_path / "datastore"),
        "HPC_IMAGENET_DATASTORE_URL": str(tmp_path / "workspace/datastores"),
    }
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: 700 images of 10 classes" in done.stdout
    assert "mobilenet_v3_small" in done.stdout
    assert " → " in done.stdout
    (readme,) = tmp_path.glob("export-*/README.md")
    assert "mobilenet\\_v3\\_small trained on digits" in readme.read_text()
