"""Trainings on a GPU; without one, the CPU rehearses each check at the smallest size.

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
from outcomes import lines, new_run, saved, train
from tiny_training import tiny_config, write_store
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.runs.store import Run
from hpc_imagenet.training import distributed
from hpc_imagenet.training.callbacks.checkpoint import CheckpointCallback
from hpc_imagenet.training.callbacks.progress import ProgressReporter
from hpc_imagenet.training.loading.sampler import BatchShare
from hpc_imagenet.training.models.build import build_model
from hpc_imagenet.training.models.networks import build_network
from hpc_imagenet.training.models.optim import build_optimizer
from hpc_imagenet.training.module import Classifier


def on(device: torch.device, config: Config) -> Config:
    """Change a config to train resnet18 on the device."""
    config.cluster.gpus_per_node = int(device.type == "cuda")
    config.model.name = "resnet18"
    return config


# A3: steps without synchronization, the loss, a first step that overflows, and too little memory.


class SyncDetector:
    """Makes synchronizations in steps `first` to `last` (from 1) an error; a CPU only records the modes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: torch.device, first: int, last: int) -> None:
        self.modes: list[str] = []
        self._on_gpu = device.type == "cuda"
        start, end = ProgressReporter.on_train_batch_start, ProgressReporter.on_train_batch_end

        def on_start(reporter: ProgressReporter, trainer: Any, *args: Any) -> None:
            start(reporter, trainer, *args)
            if trainer.global_step + 1 == first:
                self.set("error")

        def on_end(reporter: ProgressReporter, trainer: Any, *args: Any) -> None:
            if trainer.global_step == last:
                self.set("default")
            end(reporter, trainer, *args)

        monkeypatch.setattr(ProgressReporter, "on_train_batch_start", on_start)
        monkeypatch.setattr(ProgressReporter, "on_train_batch_end", on_end)
        # The teardown after an error synchronizes too, which would hide the error.
        monkeypatch.setattr(ProgressReporter, "on_exception", lambda *_: self.set("default"))

    def set(self, mode: str) -> None:
        self.modes.append(mode)
        if not self._on_gpu:
            return
        torch.cuda.set_sync_debug_mode(mode)
        if mode == "error":
            with pytest.raises(RuntimeError):  # the mode works
                float(torch.zeros((), device="cuda"))


def location(error: BaseException) -> str:
    """Return the innermost lines of an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory: pytest.TempPathFactory) -> DatasetReader:
    return write_store(tmp_path_factory.mktemp("ten") / "v1", {"train": 80, "val": 8})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["standard90", "fast16", "modern", "finetune"])
def test_step_does_not_synchronize(
    device: torch.device,
    ten_steps: DatasetReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    """After each synchronization the GPU is idle until the host has submitted more work."""
    small = {"epochs": 1, "global_batch": 8, "size": 32, "val_size": 32, "val_resize": 32, "warmup_epochs": 0}
    overrides = [f"recipe.{name}={value}" for name, value in small.items()]
    overrides += ["recipe.start_size=32"] if recipe == "fast16" else []
    setup = [
        "dataset=digits",
        "cluster=foreground",
        "loader.workers=2",
        f"recipe={recipe}",
        "recipe.precision=auto",
    ]
    config = on(device, compose([*setup, *overrides, "model=resnet18"])[0])
    detector = SyncDetector(monkeypatch, device, first=4, last=9)  # the tenth is logged
    try:
        result = train(config, ten_steps, new_run(tmp_path / "run"))
    except RuntimeError as error:
        report(f"{recipe}: {str(error).splitlines()[0]} ({location(error)})", ok=False)
        raise
    finally:
        detector.set("default")
    assert detector.modes == ["error", "default", "default"]
    report(f"{recipe}: steps 4 to 9 do not synchronize with {device}", ok=True)
    assert result["loss"] > 0


def classifier(**recipe: Any) -> Classifier:
    config = tiny_config(**recipe)
    return Classifier(build_model("squeezenet1_1", 10, stem="small"), 10, config.recipe, 0, 10, BatchShare(8))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_step_loss_matches_double_precision(device: torch.device, soft: bool, smoothing: float) -> None:
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


class DtypeRecorder(TorchDispatchMode):
    """Records the dtype of the input of every log-softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax_inputs: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "log_softmax" in str(func):
            self.softmax_inputs.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_step_loss_on_a_gpu_is_computed_in_float32() -> None:
    """Autocast does not cast cross-entropy on a GPU. Fake tensors show it without a GPU."""
    module = classifier(label_smoothing=0.1)
    with FakeTensorMode(allow_non_fake_inputs=True), DtypeRecorder() as recorder:
        logits = torch.empty(8, 10, dtype=torch.bfloat16, device="cuda")
        module._cross_entropy(logits, torch.zeros(8, dtype=torch.int64, device="cuda"))
        module._cross_entropy(logits, torch.zeros(8, 10, device="cuda"))
    assert recorder.softmax_inputs
    assert set(recorder.softmax_inputs) == {torch.float32}


def peak(config: Config, store: DatasetReader, run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the GPU memory that a step needs without cuDNN's benchmark of algorithms, bytes."""
    original = ProgressReporter.on_train_batch_start

    def reset_peak(reporter: ProgressReporter, trainer: Any, *args: Any) -> None:
        original(reporter, trainer, *args)
        if trainer.global_step == 1:  # the benchmark runs in the first step
            torch.cuda.reset_peak_memory_stats()

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReporter, "on_train_batch_start", reset_peak)
        train(config, store, run)
    return torch.cuda.max_memory_allocated()


def limit_memory(device: torch.device, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit this process to `limit` bytes of GPU memory, as if the GPU had no more."""
    gc.collect()  # earlier trainers are in reference cycles
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda *_: (limit - torch.cuda.memory_reserved(device), limit)
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_step_overflow_is_skipped(device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda each, **_: torch.full_like(each, float("nan")))
    module = classifier(optimizer=name, learning_rate=1e-3, optimizer_options={"fused": True}).to(device)
    optimizer, scaler = build_optimizer(module, module.recipe), torch.amp.GradScaler(device.type)
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    for step in range(10):
        with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16):
            loss = module.model(torch.rand(8, 3, 32, 32, device=device)).logsumexp(1).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == 0:
            next(module.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, module.parameters(), weights)) == (step == 0)
    finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    report(f"{name}: finite weights after ten steps, of which the first overflows", ok=finite)
    assert finite


@pytest.mark.slow
def test_step_out_of_memory_is_one_error_line(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With much less memory than a step needs, and with about as much, where cuDNN's algorithms find none."""
    on_gpu = device.type == "cuda"
    batch, size = (256, 224) if on_gpu else (8, 16)
    store = write_store(tmp_path / "v1", {"train": 2 * batch, "val": 8})
    config = on(device, tiny_config(epochs=1, global_batch=batch, size=size, val_size=16, val_resize=16))
    config.model.stem = "standard"
    needed = peak(config, store, new_run(tmp_path / "peak"), monkeypatch) if on_gpu else 0
    full = torch.OutOfMemoryError("CUDA out of memory")
    failed = []
    for share in (0.3, 0.9, 0.97, 1.03) if on_gpu else (0.3, 1.03):
        try:
            with monkeypatch.context() as patch:
                if on_gpu:
                    limit_memory(device, int(share * needed), patch)
                elif share < 1:
                    patch.setattr(Classifier, "training_step", lambda *_: (_ for _ in ()).throw(full))
                train(config, store, new_run(tmp_path / f"run-{share}"))
            line, ok = "trained", share > 0.3  # with algorithms that need less memory
        except UserError as error:
            line = str(error)
            ok = "out of memory at step " in line and "train.accumulate=2" in line
        except RuntimeError as error:
            line, ok = f"{str(error).splitlines()[0]} ({location(error)})", False
        finally:
            if on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0, device)
        report(f"{share:.0%} of the {needed / 2**30:.1f} GiB of a step: {line}", ok=ok)
        failed += [] if ok else [line]
    gc.collect()
    assert not failed


# A4: a resumed run, on the same device and on another one.


def distance(one: Run, other: Run, config: Config) -> float:
    """Return the distance of the weights of two runs, relative to the distance from their initial weights.

    It is about 1 for two different trainings. With so few images per step, rounding errors grow fast, so the
    learning rates here are low.
    """
    a, b = (saved(run)["state_dict"] for run in (one, other))
    initial = build_network(config, 10, fresh=True)
    squares = torch.zeros(2, dtype=torch.double)
    for name, value in initial.named_parameters():
        x, y = (state[f"model.{name}"].cpu().double() for state in (a, b))
        squares += torch.stack([(x - y).square().sum(), (x - value.detach()).square().sum()])
    return float((squares[0] / squares[1]).sqrt())


def identical(one: Run, other: Run) -> bool:
    """Whether all weights, EMA weights, batch norm statistics and metrics of two runs are equal."""
    a, b = (saved(run)["state_dict"] for run in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a) and lines(one) == lines(other)


def resume(config: Config, store: Path, run: Run) -> None:
    """Resume a training; in a new process cuDNN benchmarks its algorithms again."""
    train(config, DatasetReader(store), run)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_resume_gives_the_weights_of_an_uninterrupted_run(
    device: torch.device, tiny: DatasetReader, tmp_path: Path, signal_at, deterministic: bool
) -> None:
    config = on(device, tiny_config(optimizer="adamw", learning_rate=1e-4, ema=0.8))
    config.train.deterministic = deterministic
    reference, run = new_run(tmp_path / "reference"), new_run(tmp_path / "run")
    try:
        train(config, tiny, reference)
        signal_at(4)
        with pytest.raises(Preempted):
            train(config, tiny, run)
    finally:
        torch.use_deterministic_algorithms(False)
    assert saved(run)["global_step"] == 4
    process = CONTEXT.Process(target=resume, args=(config, tiny.folder, run))
    process.start()
    process.join(300)
    code = process.exitcode
    process.kill()
    assert code == 0
    assert saved(run)["global_step"] == 10
    exact, far = identical(reference, run), distance(reference, run, config)
    line = (
        f"resume on {device}, train.deterministic={str(deterministic).lower()}: weights differ by {far:.1e}"
    )
    must_be_exact = deterministic or device.type == "cpu"
    report(f"{line}{', identical' if exact else ''}", ok=exact if must_be_exact else far < 0.7, apart=far)
    assert exact if must_be_exact else far < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("order", ["cpu first", "cpu last"])
def test_resume_on_another_device(
    device: torch.device, tiny: DatasetReader, tmp_path: Path, signal_at, monkeypatch, order: str
) -> None:
    cpu = torch.device("cpu")
    first, second = (cpu, device) if order == "cpu first" else (device, cpu)
    run = new_run(tmp_path / "run")
    signal_at(4)
    with pytest.raises(Preempted):
        train(on(first, tiny_config(ema=0.8)), tiny, run)
    monkeypatch.undo()
    result = train(on(second, tiny_config(ema=0.8)), tiny, run)
    assert saved(run)["global_step"] == 10
    report(f"resume: from {first} on {second}, loss {result['loss']:.3f}", ok=True)


# A5: one rank of NCCL.


def one_rank_config(device: str, compiled: bool) -> Config:
    config = on(torch.device(device), tiny_config(epochs=4, learning_rate=1e-5))
    config.train.deterministic = True
    config.model.compile = compiled
    return config


def train_one_rank(device: str, store: Path, run: Run, mode: str, compiled: bool) -> None:
    """Train without DDP (`mode` alone), or as DDP's only rank with gradients in float32 or bf16."""
    torch.set_num_threads(1)
    config = one_rank_config(device, compiled)
    if compiled and device == "cpu":  # saves a minute of C++ compilation
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # type: ignore[method-assign]
    if mode != "alone":
        original, on_start = distributed.trainer_arguments, CheckpointCallback.on_train_start

        def with_ddp(dist_env: DistEnv, *rest: Any, **options: Any) -> dict[str, Any]:
            strategy = original(DistEnv(0, 2, 0, 2), *rest, **options)["strategy"]
            strategy._ddp_comm_hook = bf16_compress_hook if mode == "bf16" else None  # as between nodes
            return original(dist_env, *rest, **options) | {"strategy": strategy}

        def with_group(callback: CheckpointCallback, trainer: Any, module: Any) -> None:
            on_start(callback, trainer, module)
            callback._group = torch.distributed.new_group(backend="gloo")  # beside NCCL, as with more ranks

        distributed.trainer_arguments = with_ddp
        CheckpointCallback.on_train_start = with_group  # type: ignore[method-assign]
    train(config, DatasetReader(store), run)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "compiled", "limit"), [("float32", False, 0.1), ("bf16", True, 0.5)])
def test_nccl_with_one_rank_matches_training_without_ddp(
    device: torch.device, tiny: DatasetReader, tmp_path: Path, mode: str, compiled: bool, limit: float
) -> None:
    runs = {name: new_run(tmp_path / name) for name in ("alone", mode)}
    processes = [
        CONTEXT.Process(target=train_one_rank, args=(str(device), tiny.folder, run, name, compiled))
        for name, run in runs.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]  # None: still running
    far = distance(runs["alone"], runs[mode], one_rank_config(str(device), compiled))
    backend = "NCCL" if device.type == "cuda" else "gloo"
    form = "compiled" if compiled else "eager"
    # Lightning registers the hook on GPUs only.
    ok = far < limit and (far > 0 or device.type == "cpu" or mode == "float32")
    report(f"{backend}, one rank, gradients in {mode}, {form}: weights differ by {far:.1e}", ok=ok, apart=far)
    assert ok
