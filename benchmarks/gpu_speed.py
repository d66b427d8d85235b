"""Group B of gpu.py: how fast a step, the loader and both together are, and what ingredients cost."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stage does

import torch
from end_to_end import WARM, Repeated, measure
from gpu_report import Options, report
from loader_data import as_processed, make_images, write_store
from train_step import Task, both, in_turns, plain, timm_rate

from hpc_imagenet.training.loading.batch_loader import BatchBuilder, BatchLoader
from hpc_imagenet.training.loading.crop import RandomResizedCrop
from hpc_imagenet.training.loading.device_prefetch import check_gpu_decode
from hpc_imagenet.training.loading.sampler import BatchShare, TrainSampler

BATCH, SIZE = 256, 224  # images of a step, px
MOVED = {("resnet50", False): 469e6, ("resnet50", True): 330e6}  # bytes an image, read and written, in a step
LEAST = 2700  # images/s of resnet50, eager: what an A100 makes
TARGETS = {("resnet50", False): 3300, ("resnet50", True): 3800}  # images/s on an H100
ROWS = (("resnet50", 3, 12), ("resnet18", 3, 12), ("convnext_tiny", 2, 8), ("vit_b_16", 2, 8))
THREADS = (1, 4, 8, 15)
# A process keeps the algorithms that cuDNN has chosen for a shape, and reads CUBLAS_WORKSPACE_CONFIG once:
# the second group needs a fresh one. What needs most memory comes last.
WAYS = (
    ("bf16", "fp16", "blurpool", "modern's augmentation", "batch 512"),
    ("train.deterministic", "benchmark_limit 0", "batch 1024"),
)
KERNELS = 8  # that the profile names


def task(options: Options, name: str, compiled: bool = False, steps: int = 12, batch: int = BATCH) -> Task:
    """Return a step to be measured; a toy has its own network and sizes."""
    if options.toy:
        return Task("squeezenet1_1", 4, 32, torch.device("cpu"), 1, compiled, warm=1)
    return Task(name, batch, SIZE, torch.device("cuda", 0), steps, compiled, warm=3)


def cheap_compiler(options: Options) -> None:
    """Let torch.compile trace only, in a rehearsal: the C++ compiler takes a minute."""
    if options.toy:
        compiles = functools.partialmethod(torch.nn.Module.compile, backend="eager")
        torch.nn.Module.compile = compiles  # type: ignore[method-assign]


@contextlib.contextmanager
def by_itself(title: str) -> Iterator[None]:
    """Report an error as a failed line, and go on with what comes next."""
    try:
        yield
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        report(f"{title}: {line}", ok=False)


def step(options: Options) -> None:
    """B1: a step of ours beside one of a plain loop, eager and compiled."""
    known = options.folder / "machine.json"
    if known.exists():
        machine = json.loads(known.read_text())
    else:  # A0 was left out
        name = torch.cuda.get_device_name() if options.device == "cuda" else ""
        machine = {"name": name, "copy": 3.0e12}
    rates: dict[str, float] = {}
    for name, windows, steps in ROWS[:1] if options.toy else ROWS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            for compiled in (False, True):
                one = task(options, name, compiled, steps)
                with by_itself(f"{name}, {'compiled' if compiled else 'eager'}"):
                    seconds = fresh.submit(_both, options, one, 1 if options.toy else windows).result()
                    ours, other = (statistics.median(seconds[way]) for way in ("ours", "plain PyTorch"))
                    rates[f"{name} {compiled}"] = one.batch / ours
                    _report_step(one, ours, other, machine)
                    (options.folder / "step.json").write_text(json.dumps(rates))


def _both(options: Options, one: Task, windows: int) -> dict[str, list[float]]:
    cheap_compiler(options)
    return both(one, windows)


def _report_step(one: Task, ours: float, other: float, machine: dict[str, Any]) -> None:
    key, form = (one.name, one.compiled), "compiled" if one.compiled else "eager"
    rate = one.batch / ours
    line = f"{one.name}, {one.batch} x {one.size}, {form}: ours {1000 * ours:.1f} ms {rate:,.0f} images/s"
    line += f"; plain {1000 * other:.1f} ms; ours / plain {ours / other:.3f} (target 1.01)"
    if key in MOVED:
        line += f"; floor {1000 * MOVED[key] * one.batch / machine['copy']:.1f} ms by bytes moved"
    hopper = any(name in machine["name"] for name in ("H100", "H200"))
    if hopper and key in TARGETS:
        line += f"; target {TARGETS[key]:,} images/s {'met' if rate >= TARGETS[key] else 'missed'}"
    report(line, rate=rate, ours=ours, plain=other)
    if hopper and key == ("resnet50", False):
        report(f"resnet50 is above an A100's {LEAST:,} images/s", ok=rate >= LEAST)


def timm(options: Options) -> None:
    """B2: timm's own benchmark of the same networks."""
    if options.timm is None:
        report("timm's benchmark.py was not given (--timm FILE)")
        return
    if importlib.util.find_spec("timm") is None:
        report("timm is not installed")
        return
    known = options.folder / "step.json"
    rates = json.loads(known.read_text()) if known.exists() else {}
    # Compiled comes last: it may not fit into the time.
    for name, compiled in (("resnet50", False), ("vit_b_16", False), ("resnet50", True)):
        one, form = task(options, name, compiled), "compiled" if compiled else "eager"
        one = replace(one, name="resnet18") if options.toy else one  # timm has no squeezenet
        with by_itself(f"timm, {name}, {form}"):
            rate = one.batch / timm_rate(options.timm, one)
            ours = rates.get(f"{name} {compiled}")
            beside = f"; ours / timm {ours / rate:.2f} (target 1.0)" if ours else ""
            report(f"timm, {name}, {form}: {rate:,.0f} images/s{beside}", rate=rate)


def photos(options: Options, kind: str) -> Path:
    """Return a datastore of different photos, made once for all items; `kind`: see `as_processed`."""
    folder = options.folder / f"photos-{kind}"
    if not folder.exists():
        images, note = as_processed(make_images(8 if options.toy else 96), kind)
        new = folder.with_suffix(f".{os.getpid()}")
        write_store(new, [(data, number % 10) for number, data in enumerate(images)])
        new.rename(folder)
        size = statistics.mean(map(len, images)) / 1e3
        report(f"{kind}: {len(images)} photos of {size:.0f} kB{note}")
    return folder


def loader(options: Options) -> None:
    """B3: the loader alone, by number of threads and kind of shards; then nvJPEG."""
    device, cores = torch.device(options.device), len(os.sched_getaffinity(0))
    threads = sorted({min(count, max(1, cores - 1)) for count in THREADS})
    seconds = 0.1 if options.toy else 2.0
    with by_itself("nvJPEG at the start of a run"):
        report(f"nvJPEG at the start of a run: {check_gpu_decode(device, max(1, cores - 1))}")
    for kind in ("archive", "tiled", "short256"):
        folder = photos(options, kind)
        rates = [_loader_rate(options, folder, count, False, seconds) for count in threads]
        line = " ".join(f"{rate:,.0f}" for rate in rates)
        by = ", ".join(map(str, threads))
        report(f"loader, {kind}: {line} images/s with {by} threads", rates=rates)
        if kind != "short256":
            with by_itself(f"loader, {kind}, nvJPEG"):
                rate = _loader_rate(options, folder, threads[-1], True, 1.5 * seconds)
                report(f"loader, {kind}, nvJPEG: {rate:,.0f} images/s", rate=rate)


def _loader_rate(options: Options, folder: Path, threads: int, on_gpu: bool, seconds: float) -> float:
    """Return images/s, from the third batch on."""
    batch, size = (8, 32) if options.toy else (BATCH, SIZE)
    split = Repeated(folder, 1000 * batch).open_split("train")
    batches = BatchBuilder(split, RandomResizedCrop(size, 0.08, 0.5), 0, on_gpu=on_gpu)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    made = iter(BatchLoader(batches, TrainSampler(len(split), 0, BatchShare(batch)), threads, device))
    next(made), next(made)
    began, images = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        images += len(next(made)[0])
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
    return images / took


def end_to_end(options: Options) -> None:
    """B4: loader and device together, beside each alone."""
    rows = (
        ("resnet50", "archive", "cpu"),
        ("resnet50", "archive", "gpu"),
        ("resnet18", "archive", "cpu"),
        ("resnet18", "short256", "cpu"),
    )
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    for name, kind, decode in rows[:1] if options.toy else rows:
        title = f"{name}, {kind}, decode={decode}"
        with by_itself(title):
            folder = photos(options, kind)
            one = replace(task(options, name, steps=15), warm=1 if options.toy else WARM)
            rates = measure(one, folder, 1 if options.toy else 2, decode, workers)
            alone, device, together = (statistics.median(rates[way]) for way in ("loader", "device", "ours"))
            share, slower = together / min(alone, device), "loader" if alone < device else "device"
            goal = ", target 9,000" if (name, kind) == ("resnet18", "short256") else ""
            alone_each = f"loader {alone:,.0f}, device {device:,.0f}"
            line = f"{title}: {alone_each}, together {together:,.0f} images/s{goal}"
            report(
                f"{line}; {share:.3f} of the {slower}, the slower one (target 0.97)",
                loader=alone,
                device=device,
                together=together,
            )


def ingredients(options: Options) -> None:
    """B5: what precision, batch size and a recipe's ingredients cost; and where resnet18's time goes."""
    base = None
    for names in WAYS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            for name in names:
                with by_itself(f"resnet50, {name}"):
                    rate = fresh.submit(_ingredient, options, name).result()
                    base = base or (rate if name == "bf16" else None)
                    beside = f", {rate / base:.2f} of bf16" if base else ""
                    report(f"resnet50, {name}: {rate:,.0f} images/s{beside}", rate=rate)
            if names == WAYS[0]:
                with by_itself("profile"):
                    fresh.submit(_profile, options).result()


def _ingredient(options: Options, name: str) -> float:
    """Return the images/s of resnet50, eager, with one thing changed; `name` as in WAYS."""
    batch = int(name.split()[1]) if name.startswith("batch ") else BATCH
    one = task(options, "resnet50", steps=8, batch=batch)
    config = one.config()
    recipe = config.recipe
    if name == "fp16":
        recipe.precision = "bf16-mixed" if options.toy else "16-mixed"
    elif name == "blurpool":
        recipe.blurpool = not options.toy  # the toy has nothing to blur
    elif name == "modern's augmentation":
        recipe.augment, recipe.erase, recipe.mixup, recipe.cutmix = "trivial", 0.1, 0.2, 1.0
    elif name == "train.deterministic":
        config.train.deterministic = True
    elif name == "benchmark_limit 0":
        torch.backends.cudnn.benchmark_limit = 0  # time all algorithms
    try:
        (seconds,) = in_turns(one, 1, {}, config)["ours"]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark_limit = 10  # torch's default
        torch.cuda.empty_cache()
    return one.batch / seconds


def _profile(options: Options) -> None:
    """Report in which kernels a plain step of resnet18 spends its time; on a CPU, in which operators."""
    one, on_gpu = task(options, "resnet18", steps=5), options.device == "cuda"
    torch.backends.cudnn.benchmark = on_gpu
    windows = plain(one, 2)
    next(windows)
    with torch.profiler.profile(acc_events=True) as profile:
        began = time.perf_counter()
        next(windows)
        took = time.perf_counter() - began
    longest = busiest(profile.key_averages(), on_gpu)
    steps, total = one.warm + one.steps, sum(spent for spent, _, _ in longest)
    what, each = "kernel" if on_gpu else "operator", 1000 * took / steps
    report(
        f"{one.name}, plain, profiled: {each:.1f} ms a step, of which {what}s {1000 * total / steps:.1f} ms, "
        f"{total / took:.0%}; by {what}:"
    )
    for spent, count, name in longest[:KERNELS]:
        report(f"  {spent / total:5.1%} {count / steps:5.1f} x {name[:80]}")


def busiest(events: Iterable[Any], on_gpu: bool) -> list[tuple[float, int, str]]:
    """Return the kernels of a profile, or its operators: s, number of calls and name; the longest first.

    On a GPU an operator has the time of its kernels once more, and so has an annotation such as the
    optimizer's.
    """
    times = []
    for event in events:
        if event.is_user_annotation or event.key.startswith("Optimizer."):
            continue
        if not on_gpu:
            times.append((1e-6 * event.self_cpu_time_total, event.count, event.key))
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            times.append((1e-6 * event.self_device_time_total, event.count, event.key))
    return sorted(times, reverse=True)
