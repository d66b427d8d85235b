from __future__ import annotations

import gc
import os
import random
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
from sample_images import jpeg

from hpc_imagenet.data.ilsvrc import ilsvrc_writer, scan
from hpc_imagenet.data.ilsvrc.devkit import read_devkit
from hpc_imagenet.data.ilsvrc.ilsvrc_writer import Synset
from hpc_imagenet.errors import UserError
from hpc_imagenet.io import process_pool


def double(number: int) -> int:
    return 2 * number


def fail_on_three(number: int) -> int:
    if number == 3:
        raise UserError("three")
    return number


def kill_self(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def array_of(number: int) -> np.ndarray:
    return np.full(3, number)


def test_one_worker_runs_in_this_process() -> None:
    pids = process_pool.map_in_order(lambda _: os.getpid(), [1, 2], 1)
    assert list(pids) == [os.getpid()] * 2
    assert list(process_pool.map_in_order(double, [], 4)) == []


@pytest.mark.slow
def test_map_in_order_keeps_the_order() -> None:
    assert list(process_pool.map_in_order(double, range(20), 2)) == [2 * i for i in range(20)]


@pytest.mark.slow
def test_worker_errors_are_raised_in_the_parent() -> None:
    with pytest.raises(UserError, match="three"):
        list(process_pool.map_in_order(fail_on_three, range(8), 2))
    with pytest.raises(UserError, match=r"process\.workers"):
        list(process_pool.map_in_order(kill_self, range(8), 2))


@pytest.mark.slow
@pytest.mark.parametrize("check", [scan.HEADER, scan.DECODE])
def test_parallel_scan_equals_serial_scan(tmp_path: Path, check: str) -> None:
    bits = random.Random(1)
    synsets = [Synset(i + 1, f"n{i}", "x") for i in range(4)]
    train, val, kit = (tmp_path / name for name in ("train.tar", "val.tar", "kit.tar.gz"))
    ilsvrc_writer.write_train(train, [(s.wnid, [jpeg(bits, 900) for _ in range(5)]) for s in synsets])
    ilsvrc_writer.write_val(val, [jpeg(bits) for _ in range(9)])
    ilsvrc_writer.write_devkit(kit, synsets, [1] * 9)
    devkit = read_devkit(kit)
    serial_scan, parallel_scan = (
        scan.scan(train, val, devkit, check=check, workers=workers, parallel_bytes=0, decode_chunk=4)
        for workers in (1, 2)
    )
    assert list(serial_scan.splits) == ["train", "val"]
    for split in serial_scan.splits:
        for expected, parallel in zip(
            (serial_scan.splits, serial_scan.facts, serial_scan.names),
            (parallel_scan.splits, parallel_scan.facts, parallel_scan.names),
            strict=True,
        ):
            np.testing.assert_array_equal(expected[split], parallel[split])


@pytest.mark.slow
def test_a_result_that_was_taken_is_not_kept() -> None:
    results = process_pool.map_in_order(array_of, [1, 2, 3], 2)
    first = weakref.ref(next(results))
    assert next(results).tolist() == [2, 2, 2]
    gc.collect()
    assert first() is None
    assert next(results).tolist() == [3, 3, 3]
