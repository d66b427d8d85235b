"""The report command: the leaderboard in the terminal, as CSV, as Markdown, or as an HTML page."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import socket

from hpc_imagenet.cli.command import Command, say_left_out
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.runs.store import RunStore


def _report(store: RunStore, options: argparse.Namespace) -> int:
    if options.html is None and not options.serve and (options.no_images or options.port is not None):
        raise UserError("report: --no-images and --port belong to --html FILE or --serve: add one of them")
    if options.port is not None and not options.serve:
        raise UserError("report: --port belongs to --serve: add it, or drop --port")
    if options.html is not None:
        return _write_page(store, options)
    if options.serve:
        return _serve(store, options)
    from hpc_imagenet.report import leaderboard
    from hpc_imagenet.report.jobs_table import terminal
    from hpc_imagenet.report.json_text import json_text
    from hpc_imagenet.report.terminal_text import print_lines

    rows = leaderboard.leaderboard_rows(store)
    if options.json:
        print(json_text(rows))
    elif options.csv:
        print(leaderboard.format_csv(rows), end="")
    elif options.markdown:
        print(leaderboard.format_markdown(rows), end="")
    elif not rows:
        print(f"no trainings in {store.folder}")
    else:
        console = terminal()
        width = console.width if console.is_terminal else None
        print_lines(leaderboard.leaderboard_lines(rows, width), console)
    say_left_out(store)
    return 0


def _write_page(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report.html.page import has_plots, write_page

    path = expand_home(options.html).absolute()
    trainings, size = write_page(store, path, not options.no_images)
    plural = "" if trainings == 1 else "s"
    print(f"wrote {path}: {trainings:,} training{plural}, {size / 1e6:.1f} MB; open it in a browser")
    if not has_plots():
        print("it has no plots: install Bokeh with pip install -c constraints.txt -e '.[report]'")
    say_left_out(store)
    return 0


def _serve(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.report.html.live_server import ReportServer

    with ReportServer(store, options.port or 0, not options.no_images) as server:
        port = server.server_port
        print(f"browser  {server.url}")
        print(f"tunnel   ssh -N -L {port}:127.0.0.1:{port} {_login(store)}")
        print("on another machine: start the tunnel there first. Ctrl+C ends the server", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _login(store: RunStore) -> str:
    """Return user@host of this machine, by the name that `cluster.login` of the newest run gives it."""
    host = None
    with contextlib.suppress(OSError, UserError, LookupError, TypeError, ValueError):
        host = [run for run in store.all() if run.is_mine][-1].cluster().login
    return f"{getpass.getuser()}@{host or socket.gethostname()}"


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError(text)
    return port


_port.__name__ = "port"  # argparse names it in its error


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON objects instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--html", metavar="FILE", help="write one HTML file with curves, classes and data")
    form.add_argument("--serve", action="store_true", help="serve that page on 127.0.0.1, always up to date")
    parser.add_argument("--port", type=_port, metavar="N", help="port of --serve; default: any free one")
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="leave out the sample images, for a page that is passed on: ImageNet's terms forbid copies",
    )


COMMANDS = {
    "report": Command(
        "Print the leaderboard of all trainings, or write it as a page.",
        _report,
        _add_arguments,
        needs_runs=False,
    )
}
