"""The GPUs of this machine, found without torch."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

DEVICES = Path("/dev")


def available_gpus(devices: Path = DEVICES) -> list[str]:
    """Return the GPUs of this machine as CUDA_VISIBLE_DEVICES names them, without importing torch.

    A name is a number, `GPU-…` or `MIG-…`. Numbers count the existing devices: in a container with only
    /dev/nvidia3 that GPU is 0.

    Args:
        devices: folder of the device files.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]
    names = [name.strip() for name in visible.split(",")]
    # As in CUDA, the first invalid name, such as -1, ends the list.
    return list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names))
