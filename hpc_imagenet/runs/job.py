"""A planned job, and the signature that names its run folder.

A signature is the first eight hex digits of a hash of the settings that determine a job's result, so
submitting the same settings twice gives one run. It does not cover the cluster, paths and progress flags.
Which settings belong to it is declared by `Stage.identity`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hpc_imagenet.config.dataset import Dataset
from hpc_imagenet.config.schema import Cluster, Config, Datastore, Process

FindVersion = Callable[[Datastore], Datastore | None]
"""Lookup of a datastore: returns it with version and content set, or None if it has no version yet."""


@dataclass(frozen=True)
class Job:
    """One planned run.

    Attributes:
        needs: run ids of the jobs that make its input, whether they are part of the plan or not.
        cluster: cluster settings of its stage.
        config: the config to freeze into the run folder.
        processing_run: id of the process run whose dataset it writes or reads; of process and upload.
        alternatives: the same job with other cluster settings, of which one is to be chosen.
    """

    stage: str
    label: str
    signature: str
    needs: tuple[str, ...]
    model: str | None
    cluster: Cluster
    config: Config
    processing_run: str | None = None
    alternatives: tuple[Job, ...] = ()

    @property
    def run_id(self) -> str:
        """The run's id, which is also the name of its folder."""
        return f"{self.signature}-{self.label}"

    def frozen(self) -> dict[str, Any]:
        """Return the config as plain values for config.yaml."""
        return asdict(self.config)


def signature(*parts: Any) -> str:
    """Return the first eight hex digits of the SHA-256 of `parts` (JSON values)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def content_hash(dataset: Dataset, process: Process | None = None) -> str:
    """Return the signature of a dataset's images, as in the archives or, with `process`, as processed.

    Pinned MD5s or a revision identify the archives wherever they come from; without them the source is
    part of the signature.
    """
    pins = {split: archive.md5 for split, archive in dataset.archives.items()}
    pinned = dataset.revision or (all(pins.values()) and pins)
    changed = dataset.identity() | (process.image_identity() if process else {})
    return signature("content", dataset.name, pinned or dataset.source, *([changed] if changed else []))
