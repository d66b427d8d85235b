"""Group A of gpu.py: checks that the code works on a GPU as it does on a CPU.

The checks of decoding, steps, resume and NCCL are tests (tests/training/test_cuda*.py), so that `make test`
runs them on any machine with a GPU; here each item runs one group of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from gpu_report import Options, report

from hpc_imagenet.cluster.gpus import available_gpus
from hpc_imagenet.report.jobs_table import job_rows
from hpc_imagenet.runs.store import RunStore

TESTS = Path(__file__).resolve().parents[1] / "tests" / "training"
PATIENCE = 150  # s, for two trainings of the digits; below the item's limit, so that a hang is explained
TOP1 = 0.95  # of the digits, on bf16
SEEDS = (0, 1)
NETWORKS = (("resnet50", "resnet18"), ("convnext_tiny", "vit_b_16"))  # compiled side by side, 40 GB each


def machine(options: Options) -> None:
    """A0: report hardware and versions, and how fast the GPU copies and multiplies."""
    import torch
    import torchvision

    cores, handed_out = len(os.sched_getaffinity(0)), available_gpus()
    files = len(list(Path("/dev").glob("nvidia[0-9]*")))
    try:
        ctypes.CDLL("libnvcuvid.so.1")
        video = "yes"
    except OSError:
        video = "no"
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    smi = _smi("--query-gpu=driver_version,memory.total,compute_mode")
    report(f"{name}; {smi or 'no nvidia-smi'}; {cores} cores", name=name)
    cudnn = torch.backends.cudnn.version()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, cuDNN {cudnn}"
    report(f"{versions}, Python {sys.version.split()[0]}")
    report(f"/dev/nvidia*: {files}, to be handed out {handed_out}, libnvcuvid {video}")
    if options.device == "cuda":
        report("the local queue finds the GPU", ok=len(handed_out) >= 1)
    size, side = (2**20, 128) if options.toy else (2**32, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    one = torch.randn(side, side, dtype=torch.bfloat16, device=options.device)
    copied = 2 * size / _seconds(lambda: target.copy_(source), options)  # read and written
    multiplied = 2 * side**3 / _seconds(lambda: one @ one, options)
    line = f"copy {copied / 1e12:.2f} TB/s, bf16 {multiplied / 1e12:.0f} TFLOP/s"
    report(line, bytes_per_second=copied, flops=multiplied)
    (options.folder / "machine.json").write_text(json.dumps({"name": name, "copy": copied}))


def _seconds(work: Callable[[], Any], options: Options, times: int = 5) -> float:
    """Return the s that the device needs for `work`, the median of five."""
    import torch

    took = []
    for _ in range(times + 1):
        if options.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if options.device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def _smi(*words: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--format=csv,noheader", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return ""


class Workspace:
    """The command line on a private workspace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str) -> str:
        """Run `python -m hpc_imagenet WORDS`; return what it prints.

        Raises:
            RuntimeError: it failed.
        """
        command = [sys.executable, "-m", "hpc_imagenet", *words, f"workspace={self.folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def trainings(self) -> list[dict[str, Any]]:
        """Return the rows of the trainings as `jobs` has them, within milliseconds; oldest first."""
        found = job_rows(RunStore(self.folder).all())
        return sorted((row for row in found if row["stage"] == "train"), key=lambda row: row["run"])


def queue(options: Options) -> None:
    """A1: train the digits by the local queue, kill one training between two epochs, and retry it."""
    home = Workspace(options.folder / "queue")
    # On a GPU an epoch takes less than a second: enough epochs to hit one between two polls.
    length = ("recipe.epochs=4", "model.name=shufflenet_v2_x0_5") if options.toy else ("recipe.epochs=24",)
    place = ("cluster=local", "cluster.parallel=2", f"seed={','.join(map(str, SEEDS))}", *length)
    home("-m", "+stage=pipeline", "dataset=digits", "model=resnet18", *place)
    try:
        _watch(options, home)
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(home.folder) in " ".join(process.cmdline()):
                    process.kill()


def _watch(options: Options, home: Workspace) -> None:
    there = max(1, len(available_gpus())) if options.device == "cuda" else 2
    most, killed_at, retried, handed_out = 0, 0, False, set()
    patience = 3 * PATIENCE if options.toy else PATIENCE
    end = time.monotonic() + patience
    while True:
        if time.monotonic() > end:
            logs = [path.read_text()[-500:] for path in home.folder.glob("runs/.user-*/queue/*/worker.log")]
            report(f"after {patience} s: {home('jobs')!r}; worker: {logs!r}", ok=False)
            return
        table = home.trainings()
        most = max(most, sum(row["state"] == "running" for row in table))
        for row in table:
            note = Path(row["dir"]) / "attempts" / str(row["attempt"]) / "process.json"
            with contextlib.suppress(FileNotFoundError, ValueError):
                handed_out |= set(map(str, json.loads(note.read_text()).get("gpus", ())))
        victim = next((row for row in table if _seed(row["dir"]) == SEEDS[1]), None)
        if victim and not killed_at and _between_epochs(victim):
            killed_at = victim["progress"]["done"]
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if victim["dir"] in " ".join(process.cmdline()) or _runs(process, victim):
                        process.kill()
        if victim and killed_at and not retried and victim["state"] == "failed":
            home("retry", victim["run"])
            retried = True
            continue
        states = [row["state"] for row in table]
        if table and all(state == "finished" for state in states):
            break
        if any(state in ("failed", "cancelled") for state in states) and retried:
            reasons = [f"{row['run']}: {row['state']} ({row['reason']})" for row in table]
            report("; ".join(reasons), ok=False)
            return
        time.sleep(0.05)
    on_gpu = options.device == "cuda"
    device = f"GPUs handed out {sorted(handed_out)}" if on_gpu else "CPUs"
    ok = most <= there and bool(handed_out) == on_gpu
    report(f"queue: {device}, at most {most} trainings at a time", ok=ok)
    log = home("logs", victim["run"]) if victim else ""
    went_on = re.findall(r"resuming from step (\d+)", log)
    report(
        f"killed after {killed_at} images, went on from step {went_on[-1] if went_on else 'nothing'}",
        ok=bool(killed_at and retried and went_on),
    )
    accuracies = [row["top1"] for row in table]
    least = 0.0 if options.toy else TOP1
    line = ", ".join(f"{value:.1%}" for value in accuracies)
    report(f"top-1 {line} (at least {least:.0%})", ok=min(accuracies) >= least, top1=accuracies)
    lines = re.findall(r"device: .*", log) or ["no device is named in the log"]
    report(lines[-1], ok=lines[-1].startswith("device: ") and ("bf16-mixed" in lines[-1]) == on_gpu)


def _between_epochs(row: dict[str, Any]) -> bool:
    """Whether a training has finished an epoch and has another to go."""
    epoch = re.match(r"epoch (\d+)/(\d+)", str(row["progress"].get("note", "")))
    return row["state"] == "running" and epoch is not None and 1 < int(epoch[1]) < int(epoch[2])


@functools.cache
def _seed(folder: str) -> int:
    """Return the seed of a run, from its frozen config."""
    import yaml

    return int(yaml.safe_load((Path(folder) / "config.yaml").read_text())["seed"])


def _runs(process: psutil.Process, row: dict[str, Any]) -> bool:
    """Whether a process belongs to a run's current attempt."""
    note = Path(row["dir"]) / "attempts" / str(row["attempt"]) / "process.json"
    mine = {json.loads(note.read_text())["pid"]} if note.exists() else set()
    return bool(mine & {process.pid, *(parent.pid for parent in process.parents())})


def decoding(options: Options) -> None:
    """A2: nvJPEG's pixels, and batches beside a busy stream."""
    _pytest(options, "test_cuda_decode.py", "nvjpeg")


def steps(options: Options) -> None:
    """A3: no hidden waits, the loss, a first step that overflows, out of memory."""
    _pytest(options, "test_cuda.py", "step")


def resume(options: Options) -> None:
    """A4: resuming a run."""
    _pytest(options, "test_cuda.py", "resume")


def nccl(options: Options) -> None:
    """A5: DDP with one rank."""
    _pytest(options, "test_cuda.py", "nccl")


def _pytest(options: Options, file: str, word: str) -> None:
    """Run tests in this process; they report their own lines.

    Raises:
        SystemExit: a test failed, or none was found.
    """
    import pytest

    device = "rehearsal" if options.device == "cpu" else "not rehearsal"
    # Without the project's pytest options, whose plugins may be missing.
    plain = ["-q", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]
    code = pytest.main([*plain, str(TESTS / file), "-k", f"{word} and {device}"])
    if code:
        sys.exit(int(code))


def compiled(options: Options) -> None:
    """A6: compile four networks in two processes, which fills the cache for B1; count graphs."""
    networks = (("squeezenet1_1",),) if options.toy else NETWORKS
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(networks), context) as pool:
        for done in [pool.submit(_compile, options, names) for names in networks]:
            done.result()
        pool.submit(_sizes, options).result()


def _compile(options: Options, names: tuple[str, ...]) -> None:
    """Train a few steps of each network, compiled as B1 has it."""
    from gpu_speed import cheap_compiler, task
    from torch._dynamo.utils import counters
    from train_step import both

    cheap_compiler(options)
    for name in names:
        counters.clear()
        began = time.perf_counter()
        seconds = both(task(options, name, compiled=True, steps=1), 1)
        took = time.perf_counter() - began
        graphs, broken = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        ok = graphs >= 2 and not broken and len(seconds["ours"]) == 1
        line = f"{name}: compiled and warm after {took:.0f} s, {graphs} graphs for ours and a plain loop"
        report(f"{line}, {broken} graph breaks", ok=ok, seconds=took)


def _sizes(options: Options) -> None:
    """Count the graphs of a training that grows from one size to another and validates."""
    import torch
    from gpu_speed import cheap_compiler
    from torch._dynamo.utils import counters

    from hpc_imagenet.config.compose import compose
    from hpc_imagenet.training.loading.sampler import BatchShare
    from hpc_imagenet.training.models import build
    from hpc_imagenet.training.module import Classifier

    name, sizes, batch = ("squeezenet1_1", (32, 48), 2) if options.toy else ("resnet18", (160, 192), 64)
    words = [
        "cluster=foreground",
        "dataset=digits",
        "recipe=fast16",
        f"model.name={name}",
        "model.stem=standard",
    ]
    recipe = compose(words)[0].recipe
    cheap_compiler(options)
    module = Classifier(
        build.build_model(name, 10, stem="standard", size=sizes[0]), 10, recipe, 0, 10, BatchShare(batch)
    )
    module.to(options.device)
    module.compile_networks(max(1, len(os.sched_getaffinity(0)) - 1))
    counters.clear()
    on_gpu = options.device == "cuda"
    with torch.autocast(options.device, torch.bfloat16, enabled=on_gpu):
        for size in (*sizes, *sizes):
            images = torch.randn(batch, 3, size, size, device=options.device)
            module.model(images.contiguous(memory_format=torch.channels_last)).float().sum().backward()
        module.eval()
        with torch.inference_mode():
            images = torch.randn(batch, 3, sizes[1], sizes[1], device=options.device)
            module.model(images.contiguous(memory_format=torch.channels_last))
    graphs = counters["stats"]["unique_graphs"]
    report(f"{name}: {graphs} graphs for {len(sizes)} sizes and validation", ok=graphs == len(sizes) + 1)
