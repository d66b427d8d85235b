"""Multiprocessing context that forks from a server with torch imported, so that processes start fast."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hpc_imagenet.stages.work.download",
        "hpc_imagenet.stages.work.process",
        "hpc_imagenet.training.fit",
        "scipy.io",
    ]
)
