"""docs/security.md lists every place of the package that unpickles, loads or executes, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hpc_imagenet"
# Names, as they are written with what they are imported from, and what the page calls them.
KINDS = {
    r"pickle\.(Unpickler|loads?)|(dill|joblib|shelve|marshal|cloudpickle)\..*": "pickle",
    r"torch\.(load|jit\.load|hub\.load)|safetensors\.torch\.load_file": "torch.load",
    r"(torch\.distributed|dist)\.(all_gather|broadcast|gather|scatter|recv)_object\w*": "objects of ranks",
    r"(np|numpy)\.load": "numpy.load",
    r"exec|eval|compile|runpy\..*": "exec",
    r"importlib\.import_module|import_module|__import__|hydra\.main|hydra\.utils\..*": "import",
    r"importlib\.util\.(spec_from|module_from).*|.*exec_module": "import",
    r"yaml\.(safe_load|load|full_load|unsafe_load)(_all)?|(omegaconf\.)?OmegaConf\.load": "yaml",
    r"subprocess\.(run|Popen|call|check_call|check_output)": "process",
    r"os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)": "process",
    r"sh\.Command|submitit\.\w+Executor|pty\.spawn": "process",
    r"ctypes\.(CDLL|cdll.*|PyDLL)": "C library",
}


def found_in(path: Path) -> Iterator[str]:
    """Yield what a module does, by the names of `KINDS`; twice if it does so twice."""
    tree = ast.parse(path.read_text())
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.keyword) and node.arg == "shell" and not _is_false(node.value):
            yield "shell"
    for node in ast.walk(tree):
        name = _name(node)
        first, dot, rest = name.partition(".")
        name = imported.get(first, first) + dot + rest
        for pattern, kind in KINDS.items():
            if re.fullmatch(pattern, name):
                yield kind


def _name(node: ast.AST) -> str:
    """Return the dotted name of an attribute, of a called name or of a base class; else an empty string."""
    if isinstance(node, ast.Call):
        return node.func.id if isinstance(node.func, ast.Name) else ""
    if isinstance(node, ast.Attribute):
        inner = node.value.id if isinstance(node.value, ast.Name) else _name(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def listed() -> dict[str, set[str]]:
    """Return the kinds by module, as the table of the page lists them."""
    page = (ROOT / "docs/security.md").read_text()
    rows = re.findall(r"^\| `([\w/]+\.py)` \| ([^|]+) \|[^|]+\|[^|]+\|$", page, re.MULTILINE)
    return {name: {kind.strip() for kind in kinds.split(",")} for name, kinds in rows}


@pytest.mark.slow
def test_every_place_that_loads_or_executes_is_listed() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    found = {path.relative_to(PACKAGE).as_posix(): set(found_in(path)) for path in modules}
    found = {name: kinds for name, kinds in found.items() if kinds}
    assert len(found) > 30
    missing = {name: kinds for name, kinds in found.items() if listed().get(name) != kinds}
    assert not missing, f"add to the table of docs/security.md, with who could have written it: {missing}"
    assert listed().keys() == found.keys(), (
        "the table of docs/security.md lists a module that does none of it"
    )


def test_all_kinds_are_found(tmp_path: Path) -> None:
    lines = {
        "import pickle\npickle.load(f)": "pickle",
        "import pickle\nclass A(pickle.Unpickler): pass": "pickle",
        "from pickle import loads\nloads(b)": "pickle",
        "import torch\ntorch.load(p)": "torch.load",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)": "objects of ranks",
        "import numpy as np\nnp.load(p)": "numpy.load",
        "exec(compile(t, p, 'exec'))": "exec",
        "from importlib import import_module\nimport_module(n)": "import",
        "import yaml\nyaml.load(t, Loader=L)": "yaml",
        "import subprocess\nsubprocess.run(c)": "process",
        "import os\nos.execvp(a, b)": "process",
        "run(c, shell=True)": "shell",
    }
    for text, kind in lines.items():
        (tmp_path / "module.py").write_text(text)
        assert kind in set(found_in(tmp_path / "module.py")), text
    for text in ("model.eval()", "importlib.metadata.version(n)", "re.compile(p)", "run(c, shell=False)"):
        (tmp_path / "module.py").write_text(text)
        assert not set(found_in(tmp_path / "module.py")), text


def test_nothing_is_loaded_with_unsafe_options() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for call in re.findall(r"torch\.load\(([^)]*)\)", text):
            assert "weights_only=True" in call, f"{path}: torch.load({call})"
        for call in re.findall(r"np\.load\(([^)]*)\)", text):
            assert "allow_pickle=False" in call, f"{path}: np.load({call})"
        assert not re.search(r"yaml\.(full_load|unsafe_load)|Loader=yaml\.(Full|Unsafe)?Loader", text), path
