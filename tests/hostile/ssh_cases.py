"""Hostile hosts behind ssh: names that a shell would run, banners, connections that end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import servers
from cases import Case
from remote_workspace import Workspace
from sample_dataset import make_dataset

from hpc_imagenet.datastore import catalog, versions
from hpc_imagenet.datastore.backends import ssh_connection


def run(name: str = "stores", shell: str = "") -> Callable[[Path], str]:
    """Return the work of a case: upload a dataset to a folder of this name, and verify it.

    Args:
        name: of the folder; `{owned}` becomes a path that must not exist afterwards.
        shell: script in place of ssh; `{ssh}` becomes the command that connects.
    """

    def work(folder: Path) -> str:
        workspace = Workspace.__new__(Workspace)
        workspace.root, workspace.dataset = folder / "workspace", folder / "workspace/datasets/digits"
        workspace.manifest = make_dataset(workspace.root, images=2, image_bytes=100)
        (folder / "sshd").mkdir()
        owned = folder / "owned"
        with servers.sshd(folder / "sshd") as command:
            if shell:
                script = folder / "shell"
                script.write_text(f"#!/bin/bash\n{shell.format(ssh=command)}\n")
                script.chmod(0o755)
                command = str(script)
            url = f"there:{folder}/{name.format(owned=owned)}"
            waits = {"FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.01, "MAX_FAILURES": 2}
            with (
                mock.patch.dict(os.environ, {"RSYNC_RSH": command}),
                mock.patch.multiple(ssh_connection, **waits),
            ):
                try:
                    workspace.upload(url)
                    backend = versions.open_backend(url)
                    problems = catalog.verify_version(
                        backend, catalog.find_version(backend, "digits"), 2, lambda *_: None
                    )
                finally:
                    assert not owned.exists(), "a name was run as a command"
                    assert not Path("owned").exists()
        assert not problems, problems
        return "uploaded and verified"

    return work


_UPLOADED = "ok: uploaded and verified"
_NOISE = 'echo "*** WELCOME ***"; exec {ssh} "$@"'

_INPUTS: list[tuple[str, Callable[[Path], str], str]] = [
    ("a name with quotes", run('it\'s "odd" names'), _UPLOADED),
    ("a name with a command", run("$(touch owned)"), _UPLOADED),
    ("a name with backticks", run("`touch owned`"), _UPLOADED),
    ("a name with a semicolon", run("x; touch owned"), _UPLOADED),
    ("a name with a wildcard", run("x*y?[z]"), _UPLOADED),
    ("a name with a tilde and a dollar", run("~$HOME"), _UPLOADED),
    ("a name with a backslash", run("a\\nb"), _UPLOADED),
    ("a name that begins with dashes", run("--delete"), _UPLOADED),
    ("a banner on the standard error", run(shell='echo "*** WELCOME ***" >&2; exec {ssh} "$@"'), _UPLOADED),
    ("a banner on the standard output", run(shell=_NOISE), "is your shell clean?"),
    ("a banner of escape sequences", run(shell="printf '\\e[2J\\e]0;x\\a' >&2; exit 255"), "datastore.url="),
    ("a host that ends every connection", run(shell="exit 255"), "datastore.url="),
    ("a host that answers nonsense", run(shell="head -c 5000 /dev/urandom"), "datastore.url="),
    (
        "a host without rsync",
        run(shell='[[ "$*" == *rsync* ]] && exit 127; exec {ssh} "$@"'),
        "datastore.url=",
    ),
]

CASES = [Case("ssh", name, work, expected) for name, work, expected in _INPUTS]
