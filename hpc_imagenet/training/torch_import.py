"""Context in which torch is imported: faster, and with threads that sleep while they wait.

It does not import torch itself, so that a stage can use it before it knows whether it needs torch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def torch_import() -> Iterator[None]:
    """Import torch faster within this context, and let its threads sleep while they wait.

    Torch, torchvision and Lightning create a million objects that stay. Searching them for garbage again and
    again takes a fifth of the import, and would go on in the training.
    """
    # Spinning threads make a training on CPUs many times slower on a machine that is also used otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
