"""Processes forked from a server without threads that has torch and the rest imported: they start at once."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["hpc_imagenet.stages.download", "hpc_imagenet.stages.process", "hpc_imagenet.training.fit", "scipy.io"]
)
