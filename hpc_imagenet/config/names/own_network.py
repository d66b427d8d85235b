"""A user's own network, `my.package:factory`: find its source without running it, check it, and freeze it.

The factory is called as `factory(num_classes=…, **model.options)`. At submission the text of its file, and of
the user's other files that this one imports, goes into `model.source`, so that later edits change no queued
job. A package in site-packages is not copied: a job compares its hash instead.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc_imagenet.config.names.backbones import TIMM, is_own
from hpc_imagenet.config.recipe import Model
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.io.ownership import read_own

MAX_BYTES = 1 << 20  # of frozen source
_PACKAGE = __name__.partition(".")[0]
_INSTALLED = ("site-packages", "dist-packages")


def freeze(model: Model) -> None:
    """Set `source` and `source_hash` of an own network; others, and one that is frozen already, stay.

    Raises:
        UserError: there is no such module or factory, or the factory does not take these options.
    """
    if not is_own(model.name) or model.source_hash is not None:
        return
    setting = f"model.name={model.name}"
    module, factory = split_name(model.name)
    root, file = _find(module, setting)
    check_factory(_text(file, setting), factory, file.name, model.options, setting)
    if is_installed(file):
        model.source_hash = file_hash(file)
    else:
        model.source = _imported_files(root, module, setting)
        model.source_hash = _hash(json.dumps(model.source, sort_keys=True).encode())


def split_name(name: str) -> tuple[str, str]:
    """Return the module and the factory of `my.package:factory`.

    Raises:
        UserError: it has another form.
    """
    module, _, factory = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), factory)) or module.endswith(".py"):
        meant = f"{module.removesuffix('.py').strip('./').replace('/', '.')}:{factory}"
        if "hub" in module:  # hf-hub:timm/NAME of timm, whose published weights are tags here
            meant = f"{TIMM}{factory.rpartition('/')[2]}"
        fix = f": write {meant}" if "/" in name or module.endswith(".py") else ""
        raise UserError(f"model.name={name} is not of the form my.package:factory{fix}")
    return module, factory


def is_installed(file: Path) -> bool:
    """Whether a file belongs to an installed package rather than to the user's own files."""
    return any(part in _INSTALLED for part in file.parts)


def file_hash(file: Path) -> str:
    """Return the hash of the bytes of a file."""
    return _hash(file.read_bytes())


def check_factory(text: str, factory: str, file: str, options: Mapping[str, Any], setting: str) -> None:
    """Check a factory in the text of its module; what only running it would show is not checked.

    Args:
        text: source of the module.
        factory: name of a function or class.
        file: name of the file, for errors.
        options: arguments besides num_classes.
        setting: the user's input, for errors.

    Raises:
        UserError: a syntax error, no such factory, or it does not take num_classes and the options.
    """
    body = _parse(text, file, setting).body
    found = next((node for node in _definitions(body) if node.name == factory), None)
    if found is None:
        if {factory, "*", "__getattr__"} & {*_other_names(body), *(node.name for node in _definitions(body))}:
            return  # only running the module shows it
        names = [node.name for node in _definitions(body) if not node.name.startswith("_")]
        raise UserError(f"{setting}: {file} has no {factory}{did_you_mean(factory, names)}")
    if isinstance(found, ast.ClassDef):
        constructor = [node for node in _definitions(found.body) if node.name == "__init__"]
        if not constructor or found.decorator_list:
            return
        found = constructor[0]
    if isinstance(found, ast.ClassDef) or found.decorator_list:
        return
    _check_arguments(found, factory, f"{file} line {found.lineno}", options, setting)


def _check_arguments(
    found: ast.FunctionDef | ast.AsyncFunctionDef,
    factory: str,
    place: str,
    options: Mapping[str, Any],
    setting: str,
) -> None:
    arguments = found.args
    positional = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args)]
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [
        arg.arg
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    if found.name == "__init__":
        positional, required = positional[1:], required[1:]
    accepted = {*positional, *(arg.arg for arg in arguments.kwonlyargs)}
    accepted -= {arg.arg for arg in arguments.posonlyargs}
    call = f"{setting}: {place}: {factory} is called as {factory}(num_classes=…, **model.options)"
    given = {"num_classes", *options}
    if arguments.kwarg is None and (unknown := sorted(given - accepted)):
        known = ", ".join(sorted(accepted - given)) or "none"
        fix = "" if unknown[0] == "num_classes" else f"; its options: {known}"
        raise UserError(f"{call} and takes no {unknown[0]}{fix}")
    if missing := [name for name in required if name not in given]:
        raise UserError(f"{call} and needs {missing[0]}: add +model.options.{missing[0]}=VALUE")


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    return (node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))


def _other_names(body: list[ast.stmt]) -> set[str]:
    """Return the names that imports and assignments anywhere in a module may define; "*" stands for all."""
    names: set[str] = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node is not statement:
                names.add(node.name)  # within an if or try
    return names


def _parse(text: str, file: str, setting: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's text
            return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{setting}: {file}{line} is not Python: {getattr(error, 'msg', error)}") from None


def _imported_files(root: Path, module: str, setting: str) -> dict[str, str]:
    """Return the text of a module and of all files below `root` that it imports, by path below `root`.

    Raises:
        UserError: a file is no Python, imports what does not exist, or all files together are too large.
    """
    files: dict[str, str] = {}
    queue = [*_parents(module), module]
    while queue:
        name = queue.pop()
        path = _file(root, name)
        if path is None or (key := path.relative_to(root).as_posix()) in files:
            continue
        files[key] = _text(path, setting)
        if sum(map(len, files.values())) > MAX_BYTES:
            raise UserError(
                f"{setting} imports more than {MAX_BYTES >> 20} MiB of source in {root}:"
                " install it as a package"
            )
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = _parse(files[key], key, setting)
        _check_imports(tree, package, root, key, setting)
        for node in ast.walk(tree):
            for base, parts in _imports(node, package):
                queue += [*_parents(base), base, *(f"{base}.{part}" for part in parts)]
    return dict(sorted(files.items()))


def _check_imports(tree: ast.Module, package: str, root: Path, file: str, setting: str) -> None:
    """Raise if a module imports what does not exist; imports within a function or a try may fail."""
    for node in tree.body:
        for name, _ in _imports(node, package):
            if name.startswith(".") or not _exists(root, name):
                line = f"{file} line {getattr(node, 'lineno', 0)}"
                raise UserError(f"{setting}: {line} imports {name}, which is neither in {root} nor installed")


def _imports(node: ast.AST, package: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, names imported from it) of one statement in a module of `package`."""
    found: list[tuple[str, list[str]]] = []
    if isinstance(node, ast.Import):
        found = [(alias.name, []) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        parts = package.split(".") if package else []
        if node.level > len(parts):  # there is no such package
            base = "." * node.level + base
        elif node.level:
            base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
        found = [(base, [alias.name for alias in node.names])] if base else []
    return ((name, names) for name, names in found if name.partition(".")[0] != _PACKAGE)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _find(module: str, setting: str) -> tuple[Path, Path]:
    """Return the folder that holds the top-level package of a module, and the file of the module.

    The current folder comes first, then what is installed. Nothing is imported.

    Raises:
        UserError: no such module.
    """
    for root in (Path.cwd(), *_installed_roots(module.partition(".")[0])):
        if file := _file(root, module):
            return root, file
    raise UserError(
        f"{setting}: no module {module} in the current folder {Path.cwd()}, and none is installed:"
        " submit from the folder that holds it"
    )


def _exists(root: Path, module: str) -> bool:
    """Whether a module exists below `root`, or its top-level package is installed."""
    top = module.partition(".")[0]
    if _file(root, top):
        path = root.joinpath(*module.split("."))
        return path.is_dir() or any(path.parent.glob(f"{path.name}.*"))
    return top in sys.stdlib_module_names or any(_installed_roots(top)) or (root / top).is_dir()


def _installed_roots(top: str) -> Iterator[Path]:
    """Yield the folders that hold an installed top-level package or module."""
    for finder in sys.meta_path:
        spec = finder.find_spec(top, None)
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or ():
            yield Path(folder).parent
        if spec.submodule_search_locations is None and spec.origin and spec.has_location:
            yield Path(spec.origin).parent


def _file(root: Path, module: str) -> Path | None:
    """Return the source file of a module below a folder, if it has one."""
    path = root.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in candidates if file.is_file()), None)


def _text(file: Path, setting: str) -> str:
    try:
        if is_installed(file):
            return file.read_text(encoding="utf-8-sig")
        text = read_own(file, file.parent, f"{setting} is not executed").decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads it
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}: {file} cannot be read ({error})") from None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
