"""The report page as one HTML file: template, styles, scripts and data in one, so that it loads nothing.

All text from runs reaches the page as JSON, in which `<` and `>` are escaped, and the script inserts it
as text, never as HTML. A Content-Security-Policy allows only the scripts of this package, by their hashes,
and no request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import atomic_write
from hpc_imagenet.report.html.page_data import collect
from hpc_imagenet.report.json_text import finite
from hpc_imagenet.runs.store import RunStore

_FOLDER = Path(__file__).parent
_SCRIPTS = ("elements.js", "charts.js", "details.js", "search.js", "page.js")
_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_page(store: RunStore, path: Path, with_images: bool = True) -> tuple[int, int]:
    """Write the page of a workspace.

    Args:
        store: the runs of the workspace.
        path: the file to create or replace.
        with_images: whether thumbnails of val images are part of it.

    Returns:
        Number of trainings, and size of the page in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: type a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist: create it, or type another file")
    data = collect(store, with_images)
    page = render_page(data)
    try:
        with atomic_write(path) as file:
            file.write(page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): type another file") from None
    return len(data["runs"]), len(page)


def render_page(data: dict[str, Any], live: str | None = None, plots: bool = True) -> bytes:
    """Return the HTML of a page.

    Args:
        data: value of `page_data.collect`.
        live: URL from which the page fetches its data again, every few seconds; None: it makes no request.
        plots: whether BokehJS is part of the page, if Bokeh is installed.
    """
    scripts = [*(_plot_scripts() if plots else ()), *(_read(name) for name in _SCRIPTS)]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if live else "")
    parts = {
        "POLICY": policy,
        "LIVE": live or "",
        "STYLES": _read("page.css"),
        "SCRIPTS": "\n".join(f"<script>{script}</script>" for script in scripts),
        "DATA": encode_data(data),
    }
    before, *rest = _read("page.html").split("@@")
    text = before + "".join(parts[part] if number % 2 == 0 else part for number, part in enumerate(rest))
    return text.encode()


def has_plots() -> bool:
    """Whether Bokeh is installed, without which a page has no plots."""
    return importlib.util.find_spec("bokeh") is not None


@functools.cache
def _plot_scripts() -> tuple[str, ...]:
    """Return the scripts of BokehJS, whose head comments hold its license; none if it is not installed."""
    if not has_plots():
        return ()
    from bokeh.resources import Resources

    scripts: list[str] = Resources(mode="inline", components=["bokeh", "bokeh-api"], log_level="error").js_raw
    return tuple(scripts)


def encode_data(data: dict[str, Any]) -> str:
    """Return data as JSON that is safe within <script>."""
    text = json.dumps(finite(data), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.translate(_ESCAPED).encode(errors="replace").decode()


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
