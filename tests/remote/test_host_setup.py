"""Setting up a host, with a program in place of ssh, which runs commands on this machine."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpc_imagenet.config.host import Host
from hpc_imagenet.errors import UserError
from hpc_imagenet.remote import host_command
from hpc_imagenet.remote.host_setup import set_up_host
from hpc_imagenet.remote.parcels import Parcel
from hpc_imagenet.remote.shared_connection import CONNECTION_LOST, open_connection

# In place of Python on the host: `-m venv` makes a folder with this script in it, and with $NO_PIP fails
# then, as on a host without the package python3-venv.
PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv")
    [ "$3" = --clear ] && shift
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    [ -z "$NO_PIP" ] || { echo "ensurepip is not available" >&2; exit 1; }
    : > "$3/bin/pip" ;;
"-m pip") [ -e "${0%/*}/pip" ] || { echo "No module named pip" >&2; exit 1; } ;;
esac
"""


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def shell(tmp_path: Path) -> str:
    script = '#!/bin/bash\nshift; set -o pipefail; sh -c "$*" | cat\n'  # ssh has no terminal
    return str(write_program(tmp_path / "ssh", script))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "there").mkdir()
    return Host("host", str(tmp_path / "there"), str(write_program(tmp_path / "python", PYTHON)))


def code(**more: Path | bytes) -> Parcel:
    return Parcel("code", {"constraints.txt": b"torch\n", **more})


def test_others_cannot_write_what_is_sent_whatever_the_umask_here(
    tmp_path: Path, shell: str, host: Host
) -> None:
    (tmp_path / "user").mkdir()
    for name, mode in (("a.yaml", 0o664), ("b.yaml", 0o600)):
        (tmp_path / "user" / name).write_text("wait: true\n")
        (tmp_path / "user" / name).chmod(mode)
    files: dict[str, Path | bytes] = {f"user/{n}": tmp_path / "user" / n for n in ("a.yaml", "b.yaml")}
    parcel, before = Parcel("config", files), os.umask(0o002)
    try:
        set_up_host(host, shell, [code(), parcel])
    finally:
        os.umask(before)
    sent = Path(host.folder) / parcel.path
    modes = [path.stat().st_mode & 0o777 for path in (sent / "user", *sorted((sent / "user").iterdir()))]
    assert modes == [0o755, 0o644, 0o600]


def test_a_parcel_that_changes_while_it_is_sent_is_not_used(tmp_path: Path, shell: str, host: Host) -> None:
    source = tmp_path / "module.py"
    source.write_text("old\n")
    parcel = code(**{"module.py": source})
    source.write_text("new\n")
    with pytest.raises(UserError, match=r"^cluster\.host: code changed while it was sent: give the command"):
        set_up_host(host, shell, [parcel])
    sent = Path(host.folder) / parcel.path
    assert not (sent / ".sent").exists()
    source.write_text("old\n")
    set_up_host(host, shell, [parcel])
    assert (sent / ".sent").exists()
    assert (sent / "module.py").read_text() == "old\n"


def test_an_environment_without_pip_is_made_again(
    shell: str, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PIP", "yes")
    with pytest.raises(UserError, match="ensurepip is not available"):
        set_up_host(host, shell, [code()])
    monkeypatch.delenv("NO_PIP")
    set_up_host(host, shell, [code()])
    assert list(Path(host.folder).glob("venv/*/.made"))


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ("", ["ControlMaster=auto", "ControlPath=", "ControlPersist=3600"]),
        ("ControlPath /tmp/%C", ["ControlMaster=auto", "ControlPath=", "ControlPersist=3600"]),
        ("ControlMaster auto\nControlPath /tmp/%C", ["ControlPersist=3600"]),
        ("ControlMaster auto\nControlPath /tmp/%C\nControlPersist 60", []),
    ],
)
def test_a_shared_connection_outlives_the_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, added: list[str]
) -> None:
    (tmp_path / "config").write_text(config)
    script = f'#!/bin/sh\ncase " $* " in *" -G "*) exec ssh -F {tmp_path}/config "$@" ;; esac\n'
    program = write_program(tmp_path / "ssh", script)
    monkeypatch.setenv("RSYNC_RSH", str(program))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    words = shlex.split(open_connection(Host("host")))
    assert words[0] == str(program)
    assert words[1::2] == ["-o"] * len(added)
    assert [word.startswith(option) for word, option in zip(words[2::2], added, strict=True)] == [True] * len(
        added
    )


def test_after_a_lost_connection_the_typed_command_is_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Sequence[str]] = []

    def lose(host: Host, sending: host_command.Sending, run: object) -> int:
        sent.append(sending.arguments)
        return CONNECTION_LOST

    monkeypatch.setattr(host_command, "_carry_out", lose)
    words = ["logs", "run", "-f", "cluster=centre"]
    assert host_command.run_on_host(Host("host"), words, submits=False) == CONNECTION_LOST
    assert sent == [["logs", "run", "-f"]]
    assert capsys.readouterr().err.endswith(
        "look again with python -m hpc_imagenet logs run -f cluster=centre\n"
    )


def test_start_up_files_may_print_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write_program(tmp_path / "ssh", "#!/bin/sh\nprintf '\\377\\nreply\\n'\n")
    monkeypatch.setenv("RSYNC_RSH", str(program))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert host_command.output_on_host(Host("host"), ["pull"])[1].splitlines()[-1] == "reply"
