"""Trainings on a GPU; without one, each check is rehearsed on the CPU at the smallest size.

    python -m pytest -s tests/training/test_cuda.py

`-s` shows the figures. benchmarks/gpu.py runs these checks as items A3 (`-k step`), A4 (`-k resume`) and A5
(`-k nccl`), those of test_cuda_decode.py as A2.
"""

from __future__ import annotations

import functools
import gc
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONTEXT
from gpu_report import report
from outcomes import begin, lines, saved, train
from tiny_training import tiny_config, write_store
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.launch.dist_env import DistEnv
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training import distributed
from hpc_imagenet.training.callbacks.checkpoint import CheckpointCallback
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.fit import backbone
from hpc_imagenet.training.loading.sampler import BatchShare
from hpc_imagenet.training.models.build import build_model
from hpc_imagenet.training.module import Classifier


def on(device: torch.device, config: Config) -> Config:
    """Place a tiny training on the device, with a network of the usual kind."""
    config.cluster.gpus_per_node = int(device.type == "cuda")
    config.model.name = "resnet18"
    return config


# A3: steps without hidden waits, the loss, and too little memory.


class Waits:
    """Forbids steps `first` to `last` (from 1) to wait for the device; on a CPU only notes when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: torch.device, first: int, last: int) -> None:
        self.modes: list[str] = []
        self._on_gpu = device.type == "cuda"
        before, behind = ProgressReporter.on_train_batch_start, ProgressReporter.on_train_batch_end

        def begins(account: ProgressReporter, trainer: Any, *rest: Any) -> None:
            before(account, trainer, *rest)
            if trainer.global_step + 1 == first:
                self.set("error")

        def ends(account: ProgressReporter, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == last:
                self.set("default")
            behind(account, trainer, *rest)

        monkeypatch.setattr(ProgressReporter, "on_train_batch_start", begins)
        monkeypatch.setattr(ProgressReporter, "on_train_batch_end", ends)
        # What clears up behind an error waits as well, and would hide it.
        monkeypatch.setattr(ProgressReporter, "on_exception", lambda *_: self.set("default"))

    def set(self, mode: str) -> None:
        self.modes.append(mode)
        if not self._on_gpu:
            return
        torch.cuda.set_sync_debug_mode(mode)
        if mode == "error":
            with pytest.raises(RuntimeError):  # a wait is seen
                float(torch.zeros((), device="cuda"))


def place_of(error: BaseException) -> str:
    """Return the innermost lines that an error has gone through."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory: pytest.TempPathFactory) -> DatasetReader:
    return write_store(tmp_path_factory.mktemp("ten") / "v1", {"train": 80, "val": 8})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["standard90", "fast16", "modern", "finetune"])
def test_a_step_waits_for_nothing(
    device: torch.device,
    ten_steps: DatasetReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    """Each wait that is not needed costs a GPU what the host needs to catch up."""
    small = {"epochs": 1, "global_batch": 8, "size": 32, "val_size": 32, "val_resize": 32, "warmup_epochs": 0}
    words = [f"recipe.{name}={value}" for name, value in small.items()]
    words += ["recipe.start_size=32"] if recipe == "fast16" else []
    place = [
        "dataset=digits",
        "cluster=foreground",
        "loader.workers=2",
        f"recipe={recipe}",
        "recipe.precision=auto",
    ]
    config = on(device, compose([*place, *words, "model=resnet18"])[0])
    waits = Waits(monkeypatch, device, first=4, last=9)  # the tenth is logged
    try:
        result = train(config, ten_steps, begin(tmp_path / "run"))
    except RuntimeError as error:
        report(f"{recipe}: {str(error).splitlines()[0]} ({place_of(error)})", ok=False)
        raise
    finally:
        waits.set("default")
    assert waits.modes == ["error", "default", "default"]
    report(f"{recipe}: steps 4 to 9 do not wait for {device}", ok=True)
    assert result["loss"] > 0


def classifier(**recipe: Any) -> Classifier:
    config = tiny_config(**recipe)
    return Classifier(build_model("squeezenet1_1", 10, stem="small"), 10, config.recipe, 0, 10, BatchShare(8))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_step_is_that_of_double_precision(
    device: torch.device, soft: bool, smoothing: float
) -> None:
    torch.manual_seed(0)
    module = classifier(label_smoothing=smoothing)
    logits = (8 * torch.randn(256, 10, device=device)).to(torch.bfloat16)
    labels = torch.randint(0, 10, (256,), device=device)
    if soft:
        labels = 0.7 * F.one_hot(labels, 10).float() + 0.3 * F.one_hot(labels.flip(0), 10).float()
    with torch.autocast(device.type, torch.bfloat16):
        loss = module._cross_entropy(logits, labels)
    exact = F.cross_entropy(logits.double(), labels.double() if soft else labels, label_smoothing=smoothing)
    off = abs(float(loss) / float(exact) - 1)
    report(
        f"loss from bf16 logits, soft {soft}, smoothing {smoothing}: off {off:.1e}", ok=off < 1e-6, off=off
    )
    assert off < 1e-6


class Types(TorchDispatchMode):
    """Notes the type of what every log-softmax gets."""

    def __init__(self) -> None:
        super().__init__()
        self.of_softmax: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "log_softmax" in str(func):
            self.of_softmax.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_the_loss_of_a_step_on_a_gpu_is_float32() -> None:
    """Autocast leaves cross-entropy alone on a GPU. Tensors without data show it where there is none."""
    module = classifier(label_smoothing=0.1)
    with FakeTensorMode(allow_non_fake_inputs=True), Types() as types:
        logits = torch.empty(8, 10, dtype=torch.bfloat16, device="cuda")
        module._cross_entropy(logits, torch.zeros(8, dtype=torch.int64, device="cuda"))
        module._cross_entropy(logits, torch.zeros(8, 10, device="cuda"))
    assert types.of_softmax
    assert set(types.of_softmax) == {torch.float32}


def peak(config: Config, store: DatasetReader, run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the bytes on the GPU that a step needs, the search for cuDNN's algorithms left out."""
    original = ProgressReporter.on_train_batch_start

    def begins(account: ProgressReporter, trainer: Any, *rest: Any) -> None:
        original(account, trainer, *rest)
        if trainer.global_step == 1:  # the first step has done the search
            torch.cuda.reset_peak_memory_stats()

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReporter, "on_train_batch_start", begins)
        train(config, store, run)
    return torch.cuda.max_memory_allocated()


def limited(device: torch.device, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process so many bytes of the GPU, as if there were no more."""
    gc.collect()  # trainers of before lie in cycles
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda *_: (limit - torch.cuda.memory_reserved(device), limit)
    )


@pytest.mark.slow
def test_a_step_without_memory_is_one_line(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part of what a step needs, and with about as much, where cuDNN finds none for its algorithms."""
    on_gpu = device.type == "cuda"
    batch, size = (256, 224) if on_gpu else (8, 16)
    store = write_store(tmp_path / "v1", {"train": 2 * batch, "val": 8})
    config = on(device, tiny_config(epochs=1, global_batch=batch, size=size, val_size=16, val_resize=16))
    config.model.stem = "standard"
    needed = peak(config, store, begin(tmp_path / "peak"), monkeypatch) if on_gpu else 0
    full = torch.OutOfMemoryError("CUDA out of memory")
    failed = []
    for room in (0.3, 0.9, 0.97, 1.03) if on_gpu else (0.3, 1.03):
        try:
            with monkeypatch.context() as patch:
                if on_gpu:
                    limited(device, int(room * needed), patch)
                elif room < 1:
                    patch.setattr(Classifier, "training_step", lambda *_: (_ for _ in ()).throw(full))
                train(config, store, begin(tmp_path / f"run-{room}"))
            line, ok = "trained all the same", room > 0.3  # by algorithms that need less memory
        except UserError as error:
            line = str(error)
            ok = "out of memory at step " in line and "train.accumulate=2" in line
        except RuntimeError as error:
            line, ok = f"{str(error).splitlines()[0]} ({place_of(error)})", False
        finally:
            if on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0, device)
        report(f"{room:.0%} of the {needed / 2**30:.1f} GiB of a step: {line}", ok=ok)
        failed += [] if ok else [line]
    gc.collect()
    assert not failed


# A4: a run that goes on, on the same device and on another one.


def apart(one: Run, other: Run, config: Config) -> float:
    """Return how far the weights of two runs are from each other, as a share of how far they have come.

    Two unlike trainings are about 1 apart. Rounding grows fast at these few images a step, so the rates of
    learning here are low.
    """
    a, b = (saved(run)["state_dict"] for run in (one, other))
    first = backbone(config, 10, fresh=True)
    squares = torch.zeros(2, dtype=torch.double)
    for name, value in first.named_parameters():
        here, there = (state[f"model.{name}"].cpu().double() for state in (a, b))
        squares += torch.stack([(here - there).square().sum(), (here - value.detach()).square().sum()])
    return float((squares[0] / squares[1]).sqrt())


def same(one: Run, other: Run) -> bool:
    """Whether all weights, averages and statistics of two runs are equal, and their lines of metrics."""
    a, b = (saved(run)["state_dict"] for run in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a) and lines(one) == lines(other)


def resumed(config: Config, store: Path, run: Run) -> None:
    """Go on with a training in a process of its own, which chooses cuDNN's algorithms anew."""
    train(config, DatasetReader(store), run)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_resume_gives_the_weights_of_an_undisturbed_run(
    device: torch.device, tiny: DatasetReader, tmp_path: Path, signal_at, deterministic: bool
) -> None:
    config = on(device, tiny_config(optimizer="adamw", learning_rate=1e-4, ema=0.8))
    config.train.deterministic = deterministic
    whole, run = begin(tmp_path / "whole"), begin(tmp_path / "run")
    try:
        train(config, tiny, whole)
        signal_at(4)
        with pytest.raises(Preempted):
            train(config, tiny, run)
    finally:
        torch.use_deterministic_algorithms(False)
    assert saved(run)["global_step"] == 4
    process = CONTEXT.Process(target=resumed, args=(config, tiny.folder, run))
    process.start()
    process.join(90)
    code = process.exitcode
    process.kill()
    assert code == 0
    assert saved(run)["global_step"] == 10
    exact, far = same(whole, run), apart(whole, run, config)
    line = f"resume on {device}, train.deterministic={str(deterministic).lower()}: weights {far:.1e} apart"
    needed = deterministic or device.type == "cpu"
    report(f"{line}{', all the same' if exact else ''}", ok=exact if needed else far < 0.7, apart=far)
    assert exact if needed else far < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("order", ["cpu first", "cpu last"])
def test_resume_on_another_device(
    device: torch.device, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch, order: str
) -> None:
    cpu = torch.device("cpu")
    first, second = (cpu, device) if order == "cpu first" else (device, cpu)
    run = begin(tmp_path / "run")
    signal_at(4)
    with pytest.raises(Preempted):
        train(on(first, tiny_config(ema=0.8)), tiny, run)
    monkeypatch.undo()
    result = train(on(second, tiny_config(ema=0.8)), tiny, run)
    assert saved(run)["global_step"] == 10
    report(f"resume: from {first} on {second}, loss {result['loss']:.3f}", ok=True)


# A5: one rank of NCCL.


def of_one_rank(device: str, compiled: bool) -> Config:
    config = on(torch.device(device), tiny_config(epochs=4, learning_rate=1e-5))
    config.train.deterministic = True
    config.model.compile = compiled
    return config


def one_rank(device: str, store: Path, run: Run, way: str, compiled: bool) -> None:
    """Train in a process of its own: alone, or as DDP's only rank with gradients in float32 or bf16."""
    torch.set_num_threads(1)
    config = of_one_rank(device, compiled)
    if compiled and device == "cpu":  # without the minute that a C++ compiler takes
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # type: ignore[method-assign]
    if way != "alone":
        original, starts = distributed.trainer_arguments, CheckpointCallback.on_train_start

        def placement(
            dist_env: DistEnv, place: torch.device, accumulate: int, precision: str
        ) -> dict[str, Any]:
            strategy = original(DistEnv(0, 2, 0, 2), place, accumulate, precision)["strategy"]
            strategy._ddp_comm_hook = bf16_compress_hook if way == "bf16" else None  # as between nodes
            return original(dist_env, place, accumulate, precision) | {"strategy": strategy}

        def start(boundary: CheckpointCallback, trainer: Any, module: Any) -> None:
            starts(boundary, trainer, module)
            boundary._group = torch.distributed.new_group(backend="gloo")  # beside NCCL, as with more ranks

        distributed.trainer_arguments = placement
        CheckpointCallback.on_train_start = start  # type: ignore[method-assign]
    train(config, DatasetReader(store), run)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "compiled", "limit"), [("float32", False, 0.1), ("bf16", True, 0.5)])
def test_nccl_with_one_rank_trains_as_without(
    device: torch.device, tiny: DatasetReader, tmp_path: Path, way: str, compiled: bool, limit: float
) -> None:
    runs = {name: begin(tmp_path / name) for name in ("alone", way)}
    processes = [
        CONTEXT.Process(target=one_rank, args=(str(device), tiny.folder, run, name, compiled))
        for name, run in runs.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]  # None: it does not end
    far = apart(runs["alone"], runs[way], of_one_rank(str(device), compiled))
    backend = "NCCL" if device.type == "cuda" else "gloo"
    form = "compiled" if compiled else "eager"
    # Lightning registers the hook on GPUs only.
    ok = far < limit and (far > 0 or device.type == "cpu" or way == "float32")
    report(f"{backend}, one rank, gradients in {way}, {form}: weights {far:.1e} apart", ok=ok, apart=far)
    assert ok
