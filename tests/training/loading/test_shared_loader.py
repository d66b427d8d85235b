"""The shared loader: one process decodes, several readers take the batches at their own speed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from command_line import eventually
from tiny_training import tiny_config

from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import UserError
from hpc_imagenet.training.loading.batch_loader import CPU, BatchLoader
from hpc_imagenet.training.loading.batch_ring import SLOTS, BatchRing
from hpc_imagenet.training.loading.batch_sequence import BatchSequence
from hpc_imagenet.training.loading.datamodule import batch_sequence, builders
from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler, ValSampler
from hpc_imagenet.training.loading.shared_decoder import SharedDecoder
from hpc_imagenet.training.loading.shared_loader import SharedBatches, SharedBatchLoader

EPOCHS = 4
TRAIN, VAL = 20, 7  # batches of 2 images in an epoch of the tiny store


def sequence(store: DatasetReader, accumulate: int = 1, **recipe: Any) -> BatchSequence:
    config = tiny_config(epochs=EPOCHS, global_batch=2 * accumulate, **recipe)
    share = BatchShare(config.recipe.global_batch, accumulate=accumulate)
    train, val = builders(config, store.open_split("train"), store.open_split("val"))
    return batch_sequence(config, train, val, share)


class Sharing:
    """A decoder in a thread of this process, and readers that the test moves step by step."""

    def __init__(self, store: DatasetReader, runs: int, patience: float = 60, **settings: Any) -> None:
        self.store, self.settings = store, settings
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(runs)]
        self._memory = os.memfd_create("ring")  # mapped by all, so it may be closed first
        self.decoder = SharedDecoder(
            sequence(store, **settings),
            EPOCHS,
            {str(number): pair[0] for number, pair in enumerate(pairs)},
            self._memory,
            2,
            patience,
        )
        self._ends, self._sockets = zip(*pairs, strict=True)
        self._thread = threading.Thread(target=self.decoder.run)
        self._thread.start()

    def reader(self, number: int, **recipe: Any) -> SharedBatches:
        own = sequence(self.store, **{**self.settings, **recipe})
        return SharedBatches(self._sockets[number], self._memory, own, EPOCHS, CPU)

    def end(self) -> None:
        for each in self._ends:  # as the process that has started the runs does
            with contextlib.suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        self.end()
        for each in self._sockets:
            each.close()
        os.close(self._memory)


@contextlib.contextmanager
def sharing(*arguments: Any, **settings: Any) -> Iterator[Sharing]:
    made = Sharing(*arguments, **settings)
    try:
        yield made
    finally:
        made.stop()


def take(reader: SharedBatches, *positions: int) -> list[bool]:
    """Request batches, compare each with what the run itself decodes, and return which ones were shared."""
    found = []
    for position in positions:
        builder, key_lists, _ = next(iter(reader.sequence.parts(position)))
        keys = next(key_lists)
        batch = reader.batch(position, keys, builder)
        found.append(batch is not None)
        if batch is not None:
            own = builder.allocate(keys)
            builder.fill(own, keys, range(len(keys)))
            assert torch.equal(batch[0], own[0])
            assert torch.equal(batch[1], own[1])
            assert batch[0].is_contiguous(memory_format=torch.channels_last)
    return found


def together(*calls: Any) -> list[Any]:
    """Make calls at once, in a thread each, and return their results."""
    results: list[Any] = [None] * len(calls)

    def call(number: int) -> None:
        results[number] = calls[number]()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


@pytest.mark.slow
def test_each_batch_is_decoded_once_for_all_runs(tiny: DatasetReader) -> None:
    end = EPOCHS * (TRAIN + VAL)
    with sharing(tiny, 3, start_size=8, grow_from=0, grow_to=3) as made:
        readers = [made.reader(number) for number in range(3)]
        calls = [lambda reader=reader: take(reader, *range(end)) for reader in readers]
        assert together(*calls) == [[True] * end] * 3
        for reader in readers:
            reader.close()
    builders_of_all = made.decoder._sequence.train, made.decoder._sequence.val
    assert sum(builder.work[0] for builder in builders_of_all) == 2 * end


def test_threads_that_read_ahead_end_with_their_part(tiny: DatasetReader, monkeypatch) -> None:
    """A part is the training of an epoch, or its validation."""
    monkeypatch.setitem(globals(), "EPOCHS", 8)

    def running() -> int:
        return sum(thread.name.startswith("page-prefetcher") for thread in threading.enumerate())

    before = running()
    with sharing(tiny, 1) as made:
        assert all(take(made.reader(0), *range(EPOCHS * (TRAIN + VAL))))
        assert running() <= before + SLOTS


@pytest.mark.slow
def test_parts_of_a_step_are_shared(tiny: DatasetReader) -> None:
    with sharing(tiny, 2, accumulate=2) as made:
        readers = [made.reader(number) for number in range(2)]
        calls = [lambda reader=reader: take(reader, *range(3, 30)) for reader in readers]
        assert together(*calls) == [[True] * 27] * 2


@pytest.mark.parametrize("window", [None, 8])
def test_loader_yields_what_a_loader_of_its_own_yields(tiny: DatasetReader, window: int | None) -> None:
    """Also from the middle of an epoch, and when the decoder ends in the middle."""
    with sharing(tiny, 1, shuffle_window=window) as made:
        shared = made.reader(0)
        builder, split = shared.sequence.train, shared.sequence.train.split
        for epoch, start, stop in ((1, 5, False), (2, 0, True)):
            sampler = TrainSampler(len(split), 3, BatchShare(2), epoch, start, window)
            position = shared.sequence.train_position(epoch, start)
            loader = SharedBatchLoader(builder, sampler, 0, shared=shared, begin=lambda at=position: at)
            own = BatchLoader(builder, sampler, 0)
            for number, (one, other) in enumerate(zip(loader, own, strict=True)):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])
                if stop and number == 3:
                    made.end()
        val = ValSampler(len(shared.sequence.val.split), 2)
        loader = SharedBatchLoader(shared.sequence.val, val, 0, shared=shared, begin=lambda: 0)
        assert len(list(loader)) == VAL


def test_runs_have_their_own_speed_within_the_ring(tiny: DatasetReader) -> None:
    with sharing(tiny, 2) as made:
        fast, slow = made.reader(0), made.reader(1)
        together(lambda: take(fast, 0), lambda: take(slow, 0))
        assert take(fast, *range(1, SLOTS)) == [True] * (SLOTS - 1)  # while the slow one does nothing
        assert take(slow, *range(1, SLOTS + 3)) == [True] * (SLOTS + 2)
        assert take(fast, SLOTS, SLOTS + 1) == [True] * 2


@pytest.mark.slow
def test_run_that_falls_behind_does_not_stop_the_others(tiny: DatasetReader) -> None:
    with sharing(tiny, 2, patience=0.2) as made:
        fast, slow = made.reader(0), made.reader(1)
        together(lambda: take(fast, 0), lambda: take(slow, 0))
        assert all(take(fast, *range(1, TRAIN + VAL)))
        assert take(slow, 1) == [False]
        # At the next epoch it is still behind; it follows again when it has caught up.
        assert all(take(fast, *range(TRAIN + VAL, TRAIN + VAL + 4)))
        assert take(slow, TRAIN + VAL) == [False]
        ahead = 2 * (TRAIN + VAL)
        assert all(take(fast, *range(TRAIN + VAL + 4, ahead + 2)))
        assert take(slow, ahead + 3, ahead + 4) == [True, True]


def test_run_that_stops_while_it_copies_never_uses_the_slot(tiny: DatasetReader, monkeypatch) -> None:
    """Its slot may have been overwritten when it goes on."""
    with sharing(tiny, 2, patience=0.2) as made:
        fast, stopped = made.reader(0), made.reader(1)
        together(lambda: take(fast, 0), lambda: take(stopped, 0))
        halted = []

        original = BatchRing.batch

        def halt(ring: BatchRing, *arguments: Any) -> Any:
            monkeypatch.setattr(BatchRing, "batch", original)
            halted.append(all(take(fast, *range(1, 2 * SLOTS + 2))))
            return original(ring, *arguments)

        made.decoder._ring.batch = partial(original, made.decoder._ring)  # type: ignore[method-assign]
        monkeypatch.setattr(BatchRing, "batch", halt)
        assert take(stopped, 1) == [False]
        assert halted == [True]
        assert take(stopped, 2, TRAIN + VAL) == [False, False]  # for good


def test_run_that_ends_is_forgotten(tiny: DatasetReader) -> None:
    with sharing(tiny, 3) as made:
        readers = [made.reader(number) for number in range(3)]
        together(*(lambda reader=reader: take(reader, 0) for reader in readers))
        readers[0].close()
        made._sockets[1].close()  # as a killed process does
        assert all(take(readers[2], *range(1, 2 * SLOTS)))


@pytest.mark.slow
def test_runs_that_resume_at_different_positions(tiny: DatasetReader) -> None:
    """Most follow; one far behind and one far ahead take their own loaders."""
    with sharing(tiny, 4, patience=3) as made:
        one, two, behind, ahead = (made.reader(number) for number in range(4))
        calls = [(one, 30), (two, 31), (behind, 3), (ahead, 60)]
        shared = together(*(lambda each=each: take(*each) for each in calls))
        assert shared == [[True], [True], [False], [False]]
        assert all(together(lambda: take(one, *range(31, 54)), lambda: take(two, *range(32, 54)))[0])
        # At the next epoch they wait for the one that is behind.
        calls = [(one, *range(54, 65)), (two, *range(54, 65))]
        waiting = [threading.Thread(target=take, args=call) for call in calls]
        for thread in waiting:
            thread.start()
        eventually(lambda: all(reader.waits for reader in made.decoder._followers()))
        assert take(behind, *range(54, 65)) == [True] * 11
        for thread in waiting:
            thread.join(60)


def test_run_with_other_images_takes_its_own_loader(tiny: DatasetReader, capsys) -> None:
    with sharing(tiny, 2) as made:
        other = made.reader(1, crop_scale=0.9, flip=0.0)
        assert take(other, 0) == [False]
        assert all(take(made.reader(0), *range(SLOTS + 2)))
    assert "own loader: it differs from the other runs in crop_scale, flip" in capsys.readouterr().out


@pytest.mark.slow
def test_unreadable_image_is_the_error_of_every_run(tiny: DatasetReader, monkeypatch) -> None:
    with sharing(tiny, 2) as made:
        readers = [made.reader(number) for number in range(2)]
        damaged = [next(next(iter(readers[0].sequence.parts(5)))[1])[1][1]]
        read = type(tiny.open_split("train")).read

        def damage(self: Any, index: int) -> Any:
            data, label = read(self, index)
            is_train = len(self) == 40
            return (data[:60] if is_train and index in damaged else data), label

        monkeypatch.setattr(type(tiny.open_split("train")), "read", damage)
        monkeypatch.setattr(type(tiny.open_split("train")), "reread", lambda self, index, data: data)

        def train(reader: SharedBatches) -> str:
            builder = reader.sequence.train
            sampler = TrainSampler(len(builder.split), 3, BatchShare(2))
            with pytest.raises(UserError) as error:
                list(SharedBatchLoader(builder, sampler, 0, shared=reader, begin=lambda: 0))
            return str(error.value)

        messages = together(*(lambda reader=reader: train(reader) for reader in readers))
        assert f"image train_{damaged[0]:04d}.JPEG cannot be read" in messages[0]
        assert messages[0] == messages[1]
        # With loader.on_corrupt=skip each run counts the image.
    with sharing(tiny, 2) as made:
        made.decoder._sequence.train.skip = True
        readers = [made.reader(number) for number in range(2)]
        for reader in readers:
            reader.sequence.train.skip = True

        def names(reader: SharedBatches) -> set[str]:
            builder = reader.sequence.train
            sampler = TrainSampler(len(builder.split), 3, BatchShare(2))
            list(SharedBatchLoader(builder, sampler, 0, shared=reader, begin=lambda: 0))
            return builder.skipped

        found = together(*(lambda reader=reader: names(reader) for reader in readers))
        assert found == [{f"train_{damaged[0]:04d}.JPEG"}] * 2


def test_decoder_ends_with_its_last_run(tiny: DatasetReader) -> None:
    made = Sharing(tiny, 2)
    for number in range(2):
        made.reader(number).close()
    eventually(lambda: not made._thread.is_alive())
