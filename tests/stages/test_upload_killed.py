"""Uploads that get SIGKILL at a random moment, and are asked for again."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from remote_house import House

from hpc_imagenet.datastore import versions

KILLS = int(os.environ.get("HPC_IMAGENET_TEST_KILLS", "3"))  # of each kind of place

pytestmark = pytest.mark.slow

fork = multiprocessing.get_context("fork")  # so that it inherits what a fixture has set


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(600 + 60 * KILLS)
def test_killed_at_any_moment_it_goes_on(remote_house: House, url: str, tmp_path: Path) -> None:
    house, seed = remote_house, random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    begin = time.monotonic()
    start(house, url, "whole").join()
    needs = time.monotonic() - begin
    assert versions.complete_versions(url, "whole") == [1]
    cut = kept = 0
    for number in range(10 * KILLS):
        if cut and number >= KILLS:
            break
        name = f"digits-{number}"
        child = start(house, url, name)
        time.sleep(moments.uniform(0, 0.8 * needs))
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            cut += 1
        else:  # the first had to warm up
            needs *= 0.8
        assert versions.complete_versions(url, name) in ([], [1])
        result = house.upload(url, name)
        assert result["version"] == 1
        kept += result["kept"] > 0
        assert house.verb(url, "verify", name) == 0
        house.holds(url, tmp_path / "here", name)
        assert house.verb(url, "delete", f"{name}@v1", "--yes") == 0
    print(f"{cut} were cut off, {kept} times something was there")
    assert cut  # else the kills came too late and this test tests nothing


def start(house: House, url: str, name: str) -> BaseProcess:
    child = fork.Process(target=house.upload, args=(url, name))
    child.start()
    return child
