"""Group B of gpu.py: how fast a step, the loader and both together are, and what ingredients cost."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stage does

import torch
from end_to_end import WARM, Repeated, measure
from gpu_report import Options, report
from loader_data import pictures, treated, write_store
from train_step import Task, both, in_turns, plain, timm_rate

from hpc_imagenet.config import Config
from hpc_imagenet.training.data import Batches, Loader
from hpc_imagenet.training.gpu import check
from hpc_imagenet.training.sampler import Share, TrainSampler
from hpc_imagenet.training.transforms import TrainView

BATCH, SIZE = 256, 224  # images of a step, px
MOVED = {("resnet50", False): 469e6, ("resnet50", True): 330e6}  # bytes an image, read and written, in a step
LEAST = 2700  # images/s of resnet50, eager: what an A100 makes
TARGETS = {("resnet50", False): 3300, ("resnet50", True): 3800}  # images/s on an H100
ROWS = (("resnet50", 3, 12), ("resnet18", 3, 12), ("convnext_tiny", 2, 8), ("vit_b_16", 2, 8))
THREADS = (1, 4, 8, 15)


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


def step(options: Options) -> None:
    """B1: a step of ours beside one of a plain loop, eager and compiled."""
    known = options.folder / "machine.json"
    machine = json.loads(known.read_text()) if known.exists() else {"name": "", "copy": 3.0e12}
    rates: dict[str, float] = {}
    for name, windows, steps in ROWS[:1] if options.toy else ROWS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            for compiled in (False, True):
                one = task(options, name, compiled, steps)
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
    known = options.folder / "step.json"
    rates = json.loads(known.read_text()) if known.exists() else {}
    for name, compiled in (("resnet50", False), ("resnet50", True), ("vit_b_16", False)):
        one = task(options, name, compiled)
        one = replace(one, name="resnet18") if options.toy else one  # timm has no squeezenet
        try:
            rate = one.batch / timm_rate(options.timm, one)
        except RuntimeError as error:
            report(f"timm, {name}: {error}", ok=False)
            continue
        ours = rates.get(f"{name} {compiled}")
        beside = f"; ours / timm {ours / rate:.2f} (target 1.0)" if ours else ""
        form = "compiled" if compiled else "eager"
        report(f"timm, {name}, {form}: {rate:,.0f} images/s{beside}", rate=rate)


def photos(options: Options, kind: str) -> Path:
    """Return a datastore of different photos, made once for all items; `kind` as in `loader_data.treated`."""
    folder = options.folder / f"photos-{kind}"
    if not folder.exists():
        images, note = treated(pictures(8 if options.toy else 96), kind)
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
    report(f"nvJPEG at the start of a run: {check(device, max(1, cores - 1))}")
    for kind in ("archive", "tiled", "short256"):
        folder = photos(options, kind)
        rates = [_loader_rate(options, folder, count, False, seconds) for count in threads]
        line = " ".join(f"{rate:,.0f}" for rate in rates)
        by = ", ".join(map(str, threads))
        report(f"loader, {kind}: {line} images/s with {by} threads", rates=rates)
        if kind != "short256":
            rate = _loader_rate(options, folder, threads[-1], True, 1.5 * seconds)
            report(f"loader, {kind}, nvJPEG: {rate:,.0f} images/s", rate=rate)


def _loader_rate(options: Options, folder: Path, threads: int, on_gpu: bool, seconds: float) -> float:
    """Return images/s, from the third batch on."""
    batch, size = (8, 32) if options.toy else (BATCH, SIZE)
    split = Repeated(folder, 1000 * batch).split("train")
    batches = Batches(split, TrainView(size, 0.08, 0.5), 0, on_gpu=on_gpu)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    made = iter(Loader(batches, TrainSampler(len(split), 0, Share(batch)), threads, device))
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
        folder = photos(options, kind)
        one = replace(task(options, name, steps=15), warm=1 if options.toy else WARM)
        rates = measure(one, folder, 1 if options.toy else 2, decode, workers)
        alone, device, together = (statistics.median(rates[way]) for way in ("loader", "device", "ours"))
        share = together / min(alone, device)
        line = f"{name}, {kind}, decode={decode}: loader {alone:,.0f}, device {device:,.0f}"
        goal = ", target 9,000" if (name, kind) == ("resnet18", "short256") else ""
        report(
            f"{line}, together {together:,.0f} images/s{goal}; {share:.3f} of the slower one (target 0.97)",
            loader=alone,
            device=device,
            together=together,
        )


def ingredients(options: Options) -> None:
    """B5: what precision, batch size and a recipe's ingredients cost; and where resnet18's time goes."""

    def modern(config: Config) -> None:
        config.recipe.augment, config.recipe.erase = "trivial", 0.1
        config.recipe.mixup, config.recipe.cutmix = 0.2, 1.0

    def exhaustive(config: Config) -> None:
        torch.backends.cudnn.benchmark_limit = 0  # time all algorithms; torch's default is 10

    def recipe(name: str, value: Any) -> Callable[[Config], None]:
        return lambda config: setattr(config.recipe, name, value)

    half = "bf16-mixed" if options.toy else "16-mixed"
    ways: tuple[tuple[str, int, Callable[[Config], None]], ...] = (
        ("bf16", BATCH, lambda config: None),
        ("fp16", BATCH, recipe("precision", half)),
        ("blurpool", BATCH, recipe("blurpool", not options.toy)),  # the toy has nothing to blur
        ("modern's augmentation", BATCH, modern),
        ("train.deterministic", BATCH, lambda config: setattr(config.train, "deterministic", True)),
        ("batch 512", 512, lambda config: None),
        ("batch 1024", 1024, lambda config: None),
        ("benchmark_limit 0", BATCH, exhaustive),
    )
    base = None
    for name, batch, change in ways:
        one = task(options, "resnet50", steps=8, batch=batch)
        config = one.config()
        change(config)
        try:
            (seconds,) = in_turns(one, 1, {}, config)["ours"]
        except Exception as error:  # the others are measured all the same
            line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            report(f"resnet50, {name}: {line}", ok=False)
            continue
        finally:
            torch.use_deterministic_algorithms(False)
        rate = one.batch / seconds
        base = base or rate
        report(f"resnet50, {name}: {rate:,.0f} images/s, {rate / base:.2f} of bf16", rate=rate)
    _profile(options)


def _profile(options: Options) -> None:
    """Report the kernels that a plain step of resnet18 spends most of its time in."""
    one = task(options, "resnet18", steps=5)
    windows = plain(one, 2)
    next(windows)
    with torch.profiler.profile() as profile:
        seconds = next(windows)
    key = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    report(f"{one.name}, plain: {1000 * seconds:.1f} ms a step; by kernel:")
    for event in events[:8]:
        report(f"  {getattr(event, key) / total:5.1%} {event.count:5} x {event.key[:80]}")
