"""Score a trained network on a split: exact top-1, top-5 and loss over all ranks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only

from hpc_imagenet.cluster.dist_env import DistEnv, available_cpus
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.manifest import ClassNames
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader, SplitReader
from hpc_imagenet.errors import PeerLost, UserError
from hpc_imagenet.runs.checkpoints import check_fingerprint
from hpc_imagenet.runs.store import Progress, Run
from hpc_imagenet.training import distributed
from hpc_imagenet.training.fit import quiet_lightning
from hpc_imagenet.training.loading.datamodule import ImageDataModule
from hpc_imagenet.training.loading.sampler import BatchShare
from hpc_imagenet.training.metrics import write_class_accuracies
from hpc_imagenet.training.module import Classifier
from hpc_imagenet.training.trained import load_trained

MAX_BATCH = 256  # images at a time per rank


def score(config: Config, store: DatasetReader, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Evaluate `evaluate.checkpoint` on `evaluate.split` of `store`; every task calls this.

    Images are transformed as in the validation of a training with this config. Labels are those of the
    network: a class of the datastore is found by its id. `<split>_classes.csv` has the accuracy of each.

    Returns:
        top1 and top5 (0 to 1) and loss (mean cross-entropy); split; images (number); skipped (number of
        unreadable images); checkpoint (file name) and its step; seconds; parameters (number).

    Raises:
        UserError: bad input, such as a class that the network does not know, or another checkpoint than the
            one submitted.
        PeerLost: another task of the job has ended.
    """
    began = time.monotonic()
    device = distributed.device(config, dist_env)
    torch.set_num_threads(available_cpus(dist_env))
    rank_zero: Any = rank_zero_only
    rank_zero.rank = dist_env.rank
    name, path = config.evaluate.split or "", Path(config.evaluate.checkpoint or "")
    trained = load_trained(path, config=config)
    check_fingerprint(config, trained.fingerprint)  # a training that goes on replaces best.ckpt and last.ckpt
    split = _relabelled(store.open_split(name), store.manifest.classes, trained.classes, path)
    images = min(MAX_BATCH, config.recipe.global_batch)
    share = BatchShare(images * dist_env.size, dist_env.rank, dist_env.size)
    module = Classifier(
        trained.network,
        len(trained.classes),
        replace(config.recipe, ema=None),  # the network has the averaged weights
        config.seed,
        1,
        share,
        mean=trained.preprocessing.mean,
        std=trained.preprocessing.std,
    )
    # Only its val loader is used.
    data = ImageDataModule(config, split, split, share, dist_env, device)
    precision = distributed.precision(config.recipe.precision, device)
    if dist_env.is_rank_zero:
        print(f"{path.name} of step {trained.step} · {name}, {len(split)} images", flush=True)
        print(f"images: {trained.preprocessing}", flush=True)
        print(distributed.describe_device(device, precision, dist_env, available_cpus(dist_env)), flush=True)
    progress = _ImageProgress(run, len(split), share.batch)
    with quiet_lightning():
        trainer = pl.Trainer(
            **distributed.trainer_arguments(dist_env, device, precision, config.train.deterministic),
            callbacks=[progress] if dist_env.is_rank_zero else [],
            logger=False,
        )
        try:
            distributed.join_ranks(run, dist_env, device)
            (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
            skipped = len(data.skipped())
        except (RuntimeError, MemoryError) as error:
            if distributed.out_of_memory(error, device):
                fewer = max(1, images // 2)
                raise UserError(
                    distributed.joining_memory_error(dist_env, device)
                    or f"out of memory with {images} images at a time: set recipe.global_batch={fewer}"
                ) from None
            if message := distributed.nccl_setup_error(error):
                raise UserError(message) from None
            if dist_env.size > 1 and (message := distributed.peer_failure(error)):
                raise PeerLost(message) from error
            raise
    counts = module.val_metrics.compute()["counts"]
    if dist_env.is_rank_zero:
        write_class_accuracies(run.folder / f"{name}_classes.csv", trained.classes, counts)
    if dist.is_initialized():
        dist.destroy_process_group()
    return {
        **{key.removeprefix("val_"): float(value) for key, value in metrics.items()},
        "split": name,
        "images": len(split),
        "skipped": skipped,
        "checkpoint": path.name,
        "step": trained.step,
        "seconds": time.monotonic() - began,
        "parameters": sum(p.numel() for p in trained.network.parameters()),
    }


class _ImageProgress(pl.Callback):
    """Reports how many of `images` are evaluated; `batch`: images at a time over all ranks."""

    def __init__(self, run: Run, images: int, batch: int) -> None:
        self._progress, self._images, self._batch = Progress(run), images, batch

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._progress(min((batch_idx + 1) * self._batch, self._images), self._images, "images")


def _relabelled(
    split: SplitReader, classes: tuple[ClassNames, ...], known: tuple[ClassNames, ...], path: Path
) -> SplitReader:
    """Return the split with the labels of a network that knows the classes `known`.

    Raises:
        UserError: it does not know a class of the split.
    """
    label_of = {each.wnid: label for label, each in enumerate(known)}
    present = np.unique(split.index["label"]).tolist()
    unknown = [classes[label].wnid for label in present if classes[label].wnid not in label_of]
    if unknown:
        raise UserError(
            f"{path}: the network does not know {len(unknown)} of {len(present)} classes, such as "
            f"{unknown[0]}: evaluate it on a datastore with its classes"
        )
    labels = np.array([label_of.get(each.wnid, -1) for each in classes])
    index = np.array(split.index)
    index["label"] = labels[index["label"]]
    return SplitReader(split.store, index)
