"""Uploads that are killed with SIGKILL at a random moment, and resumed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from remote_workspace import Workspace

from hpc_imagenet.datastore import versions

KILLS = int(os.environ.get("HPC_IMAGENET_TEST_KILLS", "3"))  # for each kind of backend

pytestmark = pytest.mark.slow

fork = multiprocessing.get_context("fork")  # inherits the settings of fixtures


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(600 + 60 * KILLS)
def test_upload_resumes_after_a_kill_at_any_moment(
    remote_workspace: Workspace, url: str, tmp_path: Path
) -> None:
    workspace, seed = remote_workspace, random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    begin = time.monotonic()
    start_upload(workspace, url, "complete").join()
    duration = time.monotonic() - begin
    assert versions.complete_versions(url, "complete") == [1]
    killed = kept = 0
    for number in range(10 * KILLS):
        if killed and number >= KILLS:
            break
        name = f"digits-{number}"
        child = start_upload(workspace, url, name)
        time.sleep(moments.uniform(0, 0.8 * duration))
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            killed += 1
        else:  # it finished first: the first upload was slower, with cold caches
            assert child.exitcode == 0
            duration *= 0.8
        assert versions.complete_versions(url, name) in ([], [1])
        result = workspace.upload(url, name)
        assert result["version"] == 1
        kept += result["kept"] > 0
        assert workspace.command(url, "verify", name) == 0
        workspace.assert_stored(url, tmp_path / "here", name)
        assert workspace.command(url, "delete", f"{name}@v1", "--yes") == 0
    print(f"{killed} uploads were killed, {kept} resumed with files kept")
    assert killed  # else the kills came too late to test anything


def start_upload(workspace: Workspace, url: str, name: str) -> BaseProcess:
    child = fork.Process(target=workspace.upload, args=(url, name))
    child.start()
    return child
