"""Multi-threaded batch loader: read, decode and resize images, each written once into its batch.

It uses threads instead of processes: reading, decoding and resizing release the GIL, so each image is written
directly into its batch, in page-locked memory for a GPU. Nothing is pickled, copied or left in /dev/shm, and
the index is in memory once. `python benchmarks/loader.py` compares threads with processes.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from hpc_imagenet.datastore.reader.dataset_reader import SplitReader
from hpc_imagenet.datastore.reader.window_reader import open_prefetcher
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.distributed import out_of_memory
from hpc_imagenet.training.loading import device_prefetch
from hpc_imagenet.training.loading.crop import CropBox, CropPolicy, apply_crop
from hpc_imagenet.training.loading.decode import EncodedImage
from hpc_imagenet.training.loading.device_prefetch import PendingImage
from hpc_imagenet.training.loading.sampler import PADDING, Key, TrainSampler

ReadImage = Callable[[int], tuple[bytes, int]]
Batch = tuple[Tensor, Tensor]  # uint8 [images, 3, size, size] in channels_last order, int64 [images]
HostBatch = tuple[Batch, list[Key], list[PendingImage]]  # batch, its keys, images left to the device

PREFETCHED = 2  # batches prepared in advance; more if that leaves threads idle
CPU = torch.device("cpu")
IMAGES_PER_TASK = 8  # of a thread: small, so that all threads work on the next batch
CPU_CHECKED = 1 / 64  # share of the device's images that a CPU decodes too, to find damaged ones
MAX_WARNINGS = 5  # images refused by the device that are printed; further ones are only counted


class BatchBuilder:
    """Builds batches from the images of a split.

    Args:
        split: images and labels.
        crop: crop policy; or a sequence of them, one per epoch.
        seed: seed of the random crops.
        skip: replace unreadable images by black ones with the label `PADDING`, which is ignored everywhere;
            else they are an error.
        on_gpu: leave the decoding of ordinary JPEGs to the device.
        cpu_checked: share of the device-decoded images that a CPU decodes too, to detect damaged ones.

    Attributes:
        skipped: names of unreadable images.
        refused: indices of the images that the device cannot decode or resize, and CPUs do.
        work: number of images filled in so far, and the seconds of thread time that this took.
        waited: seconds that the consumer has waited for batches.
    """

    def __init__(
        self,
        split: SplitReader,
        crop: CropPolicy | Sequence[CropPolicy],
        seed: int,
        skip: bool = False,
        on_gpu: bool = False,
        cpu_checked: float = CPU_CHECKED,
    ) -> None:
        self.split, self.seed, self.skip, self.on_gpu = split, seed, skip, on_gpu
        self._crops, self._cpu_checked = crop, cpu_checked
        self.skipped: set[str] = set()
        self.refused: set[int] = set()
        self.work = 0, 0.0
        self.waited = 0.0
        self._lock = threading.Lock()

    def crop_policy(self, epoch: int) -> CropPolicy:
        """Return the crop policy of an epoch."""
        return self._crops[epoch] if isinstance(self._crops, Sequence) else self._crops

    def allocate(self, keys: Sequence[Key], pin: bool = False) -> Batch:
        """Allocate a batch for `fill`.

        Args:
            keys: keys of its images, all of one epoch and therefore of one size.
            pin: use page-locked memory, for a GPU.

        Raises:
            UserError: the host has no page-locked memory left.
        """
        size = self.crop_policy(keys[0][0]).size
        # Lightning validates in inference mode; the threads that write the batch are not in that mode.
        with torch.inference_mode(False):
            try:
                pixels = torch.empty(len(keys), size, size, 3, dtype=torch.uint8, pin_memory=pin)
                labels = torch.full((len(keys),), PADDING, pin_memory=pin)
            except RuntimeError as error:
                if not (pin and out_of_memory(error)):
                    raise
                # CUDA also reports "out of memory" for page-locked host memory.
                raise UserError(
                    f"the host has no page-locked memory for a batch of {len(keys)} images of {size} px: "
                    "raise cluster.memory_gb, or set train.accumulate"
                ) from None
        return pixels.permute(0, 3, 1, 2), labels  # a view: channels_last without a copy

    def fill(
        self,
        batch: Batch,
        keys: Sequence[Key],
        positions: Sequence[int],
        read: ReadImage | None = None,
    ) -> list[PendingImage]:
        """Write the images at some positions of a batch; padding is black and has the label -1.

        Args:
            batch: batch from `allocate`.
            keys: keys of all its images.
            positions: positions in the batch to write.
            read: returns the bytes and the label of an image by its index; default: `SplitReader.read`.

        Returns:
            images that are left to be decoded on the device.

        Raises:
            UserError: an image is unreadable; the message has its name.
        """
        begin, (pixels, labels) = time.perf_counter(), batch
        pending: list[PendingImage] = []
        for position in positions:
            (_, index), out = keys[position], pixels[position : position + 1]
            if index == PADDING:
                out.zero_()
                continue
            data, label = (read or self.split.read)(index)
            try:
                try:
                    crop = self._decode_and_crop(data, keys[position], out)
                except ValueError:  # perhaps only this node's copy of the shard is damaged
                    original = self.split.reread(index, data)
                    if original == data:
                        raise
                    data, crop = original, self._decode_and_crop(original, keys[position], out)
                if crop:
                    pending.append(PendingImage(position, data, crop))
                labels[position] = label
            except ValueError as error:
                self._skip_or_raise(index, str(error))
                out.zero_()
                labels[position] = PADDING
        with self._lock:
            images, seconds = self.work
            self.work = images + len(positions), seconds + time.perf_counter() - begin
        return pending

    def refuse(self, indices: Sequence[int], device: torch.device) -> None:
        """Decode these images on CPUs from now on, since the device cannot; print the first few."""
        for index in indices:
            if index not in self.refused and len(self.refused) < MAX_WARNINGS:
                name = self.split.name(index)
                print(f"warning: {device} cannot decode or resize image {name}; a CPU does", flush=True)
            self.refused.add(index)

    def _decode_and_crop(self, data: bytes, key: Key, out: Tensor) -> CropBox | None:
        """Write one image into `out`, or return the crop that the device has to decode.

        Raises:
            ValueError: the image cannot be decoded.
        """
        epoch, index = key
        image = EncodedImage(data)
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        crop = self.crop_policy(epoch)(image.width, image.height, rng)
        if self.on_gpu and image.plain and index not in self.refused:
            if rng.random() < self._cpu_checked:  # the device decodes damaged data without an error
                image.pixels((0, 0, image.width, image.height))
            return crop
        apply_crop(torch.from_numpy(image.pixels(crop.source)).permute(2, 0, 1)[None], crop, out)
        return None

    def note_skipped(self, keys: Sequence[Key], labels: Tensor) -> None:
        """Count the images that another process has skipped in a batch: those without a label."""
        for position in torch.nonzero(labels == PADDING).flatten().tolist():
            if (index := keys[position][1]) != PADDING:
                self._add_skipped(self.split.name(index), "in the shared loader")

    def _skip_or_raise(self, index: int, reason: str) -> None:
        name = self.split.name(index)
        if not self.skip:
            raise UserError(
                f"{self._unreadable(name, reason)}: its archive is damaged; download and process it "
                "again, or skip unreadable images with loader.on_corrupt=skip"
            ) from None
        self._add_skipped(name, reason)

    def _add_skipped(self, name: str, reason: str) -> None:
        with self._lock:
            if name not in self.skipped:
                self.skipped.add(name)
                print(f"{self._unreadable(name, reason)}: skipped", flush=True)

    def _unreadable(self, name: str, reason: str) -> str:
        return f"{self.split.store.folder}: image {name} cannot be read ({reason})"


class BatchLoader:
    """Iterable over the batches of a sampler, in its order for any number of threads.

    Args:
        batches: builder of the batches.
        sampler: yields the keys of each batch; Lightning sets its epoch.
        workers: number of decoding threads; 0: decode in the calling thread.
        device: device of the batches.
        cpus: CPUs that the threads are pinned to; empty: all CPUs of the process.
    """

    batch_sampler = None  # Lightning reads it from any loader that has a sampler

    def __init__(
        self,
        batches: BatchBuilder,
        sampler: Sampler[list[Key]],
        workers: int,
        device: torch.device = CPU,
        cpus: frozenset[int] = frozenset(),
    ) -> None:
        self.batches, self.sampler, self.workers = batches, sampler, workers
        self.device, self.cpus = device, cpus
        self._threads: ThreadPoolExecutor | None = None  # kept between epochs

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        sampler: Any = self.sampler
        return len(sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the sampler.

        Raises:
            UserError: an image is unreadable; the message has its name.
        """
        if self.device.type == "cuda":
            batches = device_prefetch.prefetch_to_device(self._host_batches(), self.device, self._to_device)
        else:
            batches = map(self._to_device, self._host_batches())
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.batches.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def _host_batches(self) -> Iterator[HostBatch]:
        """Yield batches in host memory, with the images that are left to the device."""
        return self._own_batches(iter(self.sampler))

    def _own_batches(self, key_lists: Iterator[list[Key]], taken: int = 0) -> Iterator[HostBatch]:
        """Yield the batches of these keys, which this loader decodes.

        Args:
            key_lists: keys of the sampler's batches.
            taken: batches of the sampler before them.
        """
        split, sampler = self.batches.split, self.sampler
        windows = sampler.windows(taken) if isinstance(sampler, TrainSampler) else None
        prefetcher = open_prefetcher(split, windows)
        try:
            indexed = ((keys, image_indices(keys)) for keys in key_lists)
            yield from self._fill_batches(prefetcher.batches(indexed), prefetcher.read)
        finally:
            prefetcher.close()

    def _fill_batches(self, key_lists: Iterator[list[Key]], read: ReadImage) -> Iterator[HostBatch]:
        if not self.workers:
            for keys in key_lists:
                batch = self._allocate(keys)
                yield batch, keys, self.batches.fill(batch, keys, range(len(keys)), read)
            return
        queue: deque[tuple[Batch, list[Key], list[Future[list[PendingImage]]]]] = deque()
        try:
            while True:
                while self._has_capacity([tasks for _, _, tasks in queue]) and (keys := next(key_lists, [])):
                    queue.append(self._submit(keys, read))
                if not queue:
                    return
                batch, keys, tasks = queue.popleft()
                yield batch, keys, [image for task in tasks for image in task.result()]
        finally:  # also if the consumer stops early
            for _, _, tasks in queue:
                for task in tasks:
                    task.cancel()

    def _has_capacity(self, queued: list[list[Future[list[PendingImage]]]]) -> bool:
        """Whether to queue another batch: up to `PREFETCHED`, or until each thread has a task."""
        return len(queued) <= PREFETCHED or sum(map(len, queued)) < self.workers

    def _submit(
        self, keys: list[Key], read: ReadImage
    ) -> tuple[Batch, list[Key], list[Future[list[PendingImage]]]]:
        if self._threads is None:
            self._threads = start_threads(self.workers, self.cpus)
        batch, fill = self._allocate(keys), self.batches.fill
        chunks = in_chunks(range(len(keys)))
        return batch, keys, [self._threads.submit(fill, batch, keys, chunk, read) for chunk in chunks]

    def _allocate(self, keys: list[Key]) -> Batch:
        return self.batches.allocate(keys, self.device.type == "cuda")

    def _to_device(self, host_batch: HostBatch) -> Batch:
        """Copy a batch to the device, and decode its pending images there."""
        (batch, keys, pending), device = host_batch, self.device
        labels = batch[1].to(device, non_blocking=True)
        if len(pending) == len(keys):  # the host batch has no pixels yet
            pixels = torch.empty_like(batch[0], device=device)
        else:
            pixels = batch[0].to(device, non_blocking=True)
        refused = device_prefetch.decode_on_gpu(pending, pixels)
        if refused:
            positions = [image.position for image in refused]
            self.batches.refuse([keys[position][1] for position in positions], device)
            self._decode_on_cpus(batch, keys, positions)
            pixels[positions] = batch[0][positions].to(device)
            labels = batch[1].to(device)
        return pixels, labels

    def _decode_on_cpus(self, batch: Batch, keys: list[Key], positions: Sequence[int]) -> None:
        """Write images that the device refused into the host batch, with all threads."""
        if self._threads is None:
            self.batches.fill(batch, keys, positions)
            return
        chunks, fill = in_chunks(positions), self.batches.fill
        for task in [self._threads.submit(fill, batch, keys, chunk) for chunk in chunks]:
            task.result()


def image_indices(keys: Sequence[Key]) -> list[int]:
    """Return the indices of the images of a batch, without padding."""
    return [index for _, index in keys if index != PADDING]


def in_chunks(positions: Sequence[int]) -> list[Sequence[int]]:
    """Divide the positions of a batch among the tasks of the threads."""
    return [positions[i : i + IMAGES_PER_TASK] for i in range(0, len(positions), IMAGES_PER_TASK)]


def start_threads(count: int, cpus: frozenset[int]) -> ThreadPoolExecutor:
    """Start decoding threads that are pinned to `cpus` and use one torch thread each.

    Raises:
        RuntimeError: the system starts no more threads.
        OSError: a thread cannot be pinned.
    """
    threads, torch_threads = ThreadPoolExecutor(count, "loader"), torch.get_num_threads()
    started = threading.Barrier(count)  # so that each thread takes one of the tasks

    def initialize() -> None:
        started.wait()
        torch.set_num_threads(1)
        if cpus:
            os.sched_setaffinity(0, cpus)  # 0: the calling thread

    try:
        for task in [threads.submit(initialize) for _ in range(count)]:
            task.result()
    except (OSError, RuntimeError):
        started.abort()  # the interpreter waits for the threads at its exit
        threads.shutdown(wait=False)
        raise
    torch.set_num_threads(torch_threads)  # the setting is per thread, but new threads inherit the last one
    return threads
