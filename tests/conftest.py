"""Fixtures of all tests. pytest also puts the folder of this file on the import path."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from command_line import Cli, Gate
from hypothesis import settings

# The duration of an example depends on the load of the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Error messages of other programs are compared in English.
os.environ["LC_ALL"] = "C.UTF-8"

# Settings that the user of this machine has stored do not apply to tests.
_NO_SETTINGS = tempfile.TemporaryDirectory(prefix="config-")
Path(_NO_SETTINGS.name).chmod(0o755)  # tests that give up root's rights look into it too
os.environ["XDG_CONFIG_HOME"] = _NO_SETTINGS.name
os.environ.pop("HPC_IMAGENET_CLUSTER", None)

# Spinning threads make a training many times slower on a busy machine. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Tests start hundreds of processes, which would compile the package again and again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell starts background processes with SIGINT ignored, and child processes would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    forked.listen()


def pytest_unconfigure() -> None:
    """Remove temporary folders here: the processes of xdist run no exit handlers."""
    forked.stop()
    _NO_SETTINGS.cleanup()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Search for garbage neither while torch and the tests are imported, nor later among what that leaves."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest tests first if several processes share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: next((i for i, name in enumerate(LONG) if _share(item.nodeid) == name), 99)
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Assign whole files to each process, and those of the Slurm lab to two of them."""
    from xdist.scheduler import LoadFileScheduling

    class Shares(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _share(nodeid)

    return Shares(config, log)


SLURM = "tests/slurm"
# About half of the time of the tests on the lab. They have a lab of their own, beside that of the others.
INTERRUPTIONS = ("interruptions", "slurm_search", "slurm_session", "slurm_shared_loader", "slurm_sites")
LONG = (  # files of minutes, the longest first: begun last, they would keep one process busy alone
    SLURM,
    f"{SLURM}/interruptions",
    "tests/test_docs.py",
    "tests/training/test_shared_trainings.py",
    "tests/search/test_search_workers.py",
    "tests/benchmarks/test_gpu_benchmark.py",
    "tests/search/test_search_command.py",
    "tests/training/test_cuda.py",
    "tests/cli/test_main.py",
    "tests/stages/test_upload_remote.py",
    "tests/datastore/backends/test_backend_contract.py",
    "tests/training/export/test_exporter.py",
    "tests/hostile/test_hostile_inputs.py",
    "tests/stages/test_upload_faults.py",
    "tests/test_second_user.py",
    "tests/cli/test_price_command.py",
    "tests/stages/test_upload_killed.py",
    "tests/stages/test_process_killed.py",
)


def _share(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    if not file.startswith(f"{SLURM}/"):
        return file
    return f"{SLURM}/interruptions" if Path(file).stem.removeprefix("test_") in INTERRUPTIONS else SLURM


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path / "workspace")
    yield cli
    cli.close()


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A temporary folder that all users can read; pytest's tmp_path is private to root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def gate() -> Iterator[tuple[Gate, str]]:
    """A server that blocks its clients until the test opens it, and its URL."""
    gate = Gate()
    with gate.serve() as url:
        yield gate, url
