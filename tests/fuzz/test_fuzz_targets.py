"""Every fuzz target survives its seeds and some random damage; `tests/fuzz/run.py` goes on from there."""

from __future__ import annotations

import random

import pytest
from targets import TARGETS

TIMES = 60  # damaged inputs of each target


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_seeds_raise_nothing_but_documented_errors(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.read(seed)
    number = random.SystemRandom().randrange(10**6)
    print(f"seed {number}")
    draw = random.Random(number)
    for _ in range(TIMES):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                data[at : at + draw.randint(1, 9)] = b""
            elif kind == 2:
                data[at:at] = draw.randbytes(draw.randint(1, 9))
            else:
                data[at : at + 4] = draw.choice((b"\xff" * 4, b"null", b"-1e9", b"9999", b"\0\0\0\0"))
            if not data:
                break
        target.read(bytes(data))
