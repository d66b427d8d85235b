"""From keys to batches: read by address, decode, resize, each image written once into its batch.

Threads do it, not processes: reading, decoding and resizing leave Python free, so that a batch is made where
it is wanted, in page-locked memory where there is a GPU. Nothing is pickled, copied or left in /dev/shm, and
the index is there once. `python benchmarks/loader.py` measures both.
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
from hpc_imagenet.datastore.reader.prefetch import Prefetcher
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.distributed import out_of_memory
from hpc_imagenet.training.loading import device_prefetch
from hpc_imagenet.training.loading.crop import CropBox, CropPolicy, apply_crop
from hpc_imagenet.training.loading.decode import EncodedImage
from hpc_imagenet.training.loading.device_prefetch import PendingImage
from hpc_imagenet.training.loading.sampler import PADDING, Key

Read = Callable[[int], tuple[bytes, int]]
Batch = tuple[Tensor, Tensor]  # uint8 [images, 3, size, size] in channels_last order, int64 [images]
_Prepared = tuple[Batch, list[Key], list[PendingImage]]  # a batch, what it is of, what is left to be decoded

AHEAD = 2  # batches in the making while one is worked on, or as many as keep all threads busy
CPU = torch.device("cpu")
PART = 8  # images that a thread takes at a time, so that all work on the batch that is wanted next
SAMPLED = 1 / 64  # share of the images left to the device that a CPU decodes as well, to find damaged ones
NAMED = 5  # images refused by the device that are printed; further ones are only counted


class BatchBuilder:
    """A split of which batches are made.

    Args:
        split: the images.
        view: what of each is looked at; or several, one an epoch.
        seed: of its randomness.
        skip: whether an image that cannot be read becomes black, with the label of padding, which counts
            nowhere; or is an error.
        on_gpu: whether ordinary JPEGs are left to be decoded on the device.

    Attributes:
        skipped: names of the images that could not be read.
        refused: indices of the images that the device could not decode, and CPUs do.
        spent: images so far, and the seconds that threads have worked on them, added up.
        awaited: seconds that whoever takes the batches has waited for them.
    """

    def __init__(
        self,
        split: SplitReader,
        view: CropPolicy | Sequence[CropPolicy],
        seed: int,
        skip: bool = False,
        on_gpu: bool = False,
    ) -> None:
        self.split, self.seed, self.skip, self.on_gpu = split, seed, skip, on_gpu
        self._views = view
        self.skipped: set[str] = set()
        self.refused: set[int] = set()
        self.spent = 0, 0.0
        self.awaited = 0.0
        self._lock = threading.Lock()

    def view(self, epoch: int) -> CropPolicy:
        """Return what is looked at in an epoch."""
        return self._views[epoch] if isinstance(self._views, Sequence) else self._views

    def empty(self, keys: Sequence[Key], pin: bool = False) -> Batch:
        """Return a batch that `fill` has still to write; `pin`: in page-locked memory, for a GPU.

        Its images are of one epoch, and so of one size.

        Raises:
            UserError: the host has no page-locked memory left.
        """
        size = self.view(keys[0][0]).size
        # Whoever asks may be in inference mode, as Lightning is; the threads that write the batch are not.
        with torch.inference_mode(False):
            try:
                pixels = torch.empty(len(keys), size, size, 3, dtype=torch.uint8, pin_memory=pin)
                labels = torch.full((len(keys),), PADDING, pin_memory=pin)
            except RuntimeError as error:
                if not (pin and out_of_memory(error)):
                    raise
                # CUDA says "out of memory" here as well, though it is not the GPU's.
                raise UserError(
                    f"the host has no page-locked memory for a batch of {len(keys)} images of {size} px: "
                    "raise cluster.memory_gb, or set train.accumulate"
                ) from None
        return pixels.permute(0, 3, 1, 2), labels  # a view: channels_last without a copy

    def fill(
        self,
        batch: Batch,
        keys: Sequence[Key],
        places: Sequence[int],
        read: Read | None = None,
    ) -> list[PendingImage]:
        """Write the images of `places` into their batch; padding is black and has the label -1.

        Args:
            batch: as `empty` made it.
            keys: of all its images.
            places: in the batch, of the images to be written.
            read: returns an image and its label, by its number; None: the split does.

        Returns:
            those that are left to be decoded on the device.

        Raises:
            UserError: an image that cannot be read, by its name.
        """
        begin, (pixels, labels) = time.perf_counter(), batch
        left: list[PendingImage] = []
        for place in places:
            (_, index), out = keys[place], pixels[place : place + 1]
            if index == PADDING:
                out.zero_()
                continue
            data, label = (read or self.split.read)(index)
            try:
                try:
                    crop = self._render(data, keys[place], out)
                except ValueError:  # a copy of the shard on this node may be damaged, and not the image
                    whole = self.split.reread(index, data)
                    if whole == data:
                        raise
                    data, crop = whole, self._render(whole, keys[place], out)
                if crop:
                    left.append(PendingImage(place, data, crop))
                labels[place] = label
            except ValueError as error:
                self._corrupt(index, str(error))
                out.zero_()
                labels[place] = PADDING
        with self._lock:
            images, seconds = self.spent
            self.spent = images + len(places), seconds + time.perf_counter() - begin
        return left

    def refuse(self, indices: Sequence[int], device: torch.device) -> None:
        """Leave images that the device could not decode to CPUs from now on; print the first few."""
        for index in indices:
            if index not in self.refused and len(self.refused) < NAMED:
                name = self.split.name(index)
                print(f"warning: {device} cannot decode image {name}; a CPU decodes it", flush=True)
            self.refused.add(index)

    def _render(self, data: bytes, key: Key, out: Tensor) -> CropBox | None:
        """Write one image, or return what the device has to look at of it.

        Raises:
            ValueError: it cannot be decoded.
        """
        epoch, index = key
        image = EncodedImage(data)
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        crop = self.view(epoch)(image.width, image.height, rng)
        if self.on_gpu and image.plain and index not in self.refused:
            if rng.random() < SAMPLED:  # the device decodes damaged data without an error
                image.pixels((0, 0, image.width, image.height))
            return crop
        apply_crop(torch.from_numpy(image.pixels(crop.source)).permute(2, 0, 1)[None], crop, out)
        return None

    def _corrupt(self, index: int, reason: str) -> None:
        name = self.split.name(index)
        told = f"{self.split.store.folder}: image {name} cannot be read ({reason})"
        if not self.skip:
            raise UserError(
                f"{told}: the archive it came from is damaged; download and process it again, or leave out"
                " what cannot be read: loader.on_corrupt=skip"
            ) from None
        with self._lock:
            if name not in self.skipped:
                self.skipped.add(name)
                print(f"{told}: left out", flush=True)


class BatchLoader:
    """The batches of a sampler in its order, whatever the number of threads.

    Args:
        batches: the images.
        sampler: which make up each batch; Lightning tells it the epoch.
        workers: threads that decode; 0: the one that asks for a batch does.
        device: where the batches are wanted.
        bound: CPUs that the threads keep to; none: wherever the process may run.
    """

    batch_sampler = None  # Lightning asks whoever has a sampler

    def __init__(
        self,
        batches: BatchBuilder,
        sampler: Sampler[list[Key]],
        workers: int,
        device: torch.device = CPU,
        bound: frozenset[int] = frozenset(),
    ) -> None:
        self.batches, self.sampler, self.workers = batches, sampler, workers
        self.device, self.bound = device, bound
        self._threads: ThreadPoolExecutor | None = None  # they stay over epochs

    def __len__(self) -> int:
        """Batches an epoch."""
        sampler: Any = self.sampler
        return len(sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from where the sampler begins.

        Raises:
            UserError: an image that cannot be read, by its name.
        """
        if self.device.type == "cuda":
            made = device_prefetch.prefetch_to_device(self._prepared(), self.device, self._finish)
        else:
            made = map(self._finish, self._prepared())
        while True:
            begin = time.perf_counter()
            batch = next(made, None)
            self.batches.awaited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def _prepared(self) -> Iterator[_Prepared]:
        """Yield batches on the host, as far as they are made there."""
        split = self.batches.split
        if not split.store.shards.is_remote():
            yield from self._made(iter(self.sampler), split.read)
            return
        ahead = Prefetcher(split)
        try:
            known = ((keys, [index for _, index in keys if index != PADDING]) for keys in self.sampler)
            yield from self._made(ahead.batches(known), ahead.read)
        finally:
            ahead.close()

    def _made(self, wanted: Iterator[list[Key]], read: Read) -> Iterator[_Prepared]:
        if not self.workers:
            for keys in wanted:
                batch = self._empty(keys)
                yield batch, keys, self.batches.fill(batch, keys, range(len(keys)), read)
            return
        begun: deque[tuple[Batch, list[Key], list[Future[list[PendingImage]]]]] = deque()
        try:
            while True:
                while self._more([parts for _, _, parts in begun]) and (keys := next(wanted, [])):
                    begun.append(self._begin(keys, read))
                if not begun:
                    return
                batch, keys, parts = begun.popleft()
                yield batch, keys, [piece for part in parts for piece in part.result()]
        finally:  # whoever asked may have had enough
            for _, _, parts in begun:
                for part in parts:
                    part.cancel()

    def _more(self, begun: list[list[Future[list[PendingImage]]]]) -> bool:
        """Whether to begin a further batch: some are made ahead, and so many that each thread has a part."""
        return len(begun) <= AHEAD or sum(map(len, begun)) < self.workers

    def _begin(
        self, keys: list[Key], read: Read
    ) -> tuple[Batch, list[Key], list[Future[list[PendingImage]]]]:
        if self._threads is None:
            self._threads = _threads(self.workers, self.bound)
        batch, places = self._empty(keys), range(len(keys))
        parts = [places[at : at + PART] for at in range(0, len(keys), PART)]
        fill = self.batches.fill
        return batch, keys, [self._threads.submit(fill, batch, keys, part, read) for part in parts]

    def _empty(self, keys: list[Key]) -> Batch:
        return self.batches.empty(keys, self.device.type == "cuda")

    def _finish(self, prepared: _Prepared) -> Batch:
        """Copy a batch to its device, and decode there what is left of it."""
        (batch, keys, pieces), device = prepared, self.device
        labels = batch[1].to(device, non_blocking=True)
        if len(pieces) == len(keys):  # nothing is written yet
            pixels = torch.empty_like(batch[0], device=device)
        else:
            pixels = batch[0].to(device, non_blocking=True)
        refused = device_prefetch.decode_on_gpu(pieces, pixels)
        if refused:
            places = [piece.place for piece in refused]
            self.batches.refuse([keys[place][1] for place in places], device)
            self._decode_on_cpus(batch, keys, places)
            pixels[places] = batch[0][places].to(device)
            labels = batch[1].to(device)
        return pixels, labels

    def _decode_on_cpus(self, batch: Batch, keys: list[Key], places: Sequence[int]) -> None:
        """Write images that the device refused into their batch on the host, by all threads."""
        if self._threads is None:
            self.batches.fill(batch, keys, places)
            return
        parts = [places[at : at + PART] for at in range(0, len(places), PART)]
        for part in [self._threads.submit(self.batches.fill, batch, keys, part) for part in parts]:
            part.result()


def _threads(count: int, bound: frozenset[int]) -> ThreadPoolExecutor:
    """Return threads that decode: on their CPUs, and without threads of torch's own behind each."""
    threads, before = ThreadPoolExecutor(count, "loader"), torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def settle() -> None:
        torch.set_num_threads(1)
        if bound:
            os.sched_setaffinity(0, bound)  # 0: the thread that calls
        ready.wait()

    for _ in range(count):
        threads.submit(settle)
    ready.wait()
    torch.set_num_threads(before)  # it is a thread's own, but new ones get what was set last
    return threads
