"""Group B of benchmarks/gpu.py runs on a CPU at the smallest size, and one failure costs one line."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_speed
import loader_data
from gpu_report import MARK, Options
from train_step import Task, timm_rate

from hpc_imagenet.training.loading.decode import EncodedImage

# A stub of timm's benchmark.py: 200 images/s, or a failure for one network.
TIMM = """
import json, sys
words = sys.argv[1:]
model = words[words.index("--model") + 1]
if model == "vit_base_patch16_224":
    print("Traceback", "RuntimeError: no such model", sep="\\n", file=sys.stderr)
    sys.exit(1)
if model == "convnext_tiny":
    print("--result\\n" + json.dumps({"model": model, "error": "out of memory"}))
    sys.exit()
print("some words\\n--result\\n" + json.dumps({"train_samples_per_sec": 200.0}, indent=4) + "\\nand more")
"""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    script = tmp_path / "benchmark.py"
    script.write_text(TIMM)
    return Options("cpu", True, tmp_path, script)


@pytest.fixture
def reports(capfd: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    """Return what was reported until now, by this process and those that it started."""

    def read() -> list[dict[str, Any]]:
        lines = capfd.readouterr().out.splitlines()
        return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]

    return read


def fake_pools(answer: Callable[..., Any]) -> tuple[type, list[list[tuple[Any, ...]]]]:
    """Return a class in place of ProcessPoolExecutor, and what each of its pools was given to do."""
    pools: list[list[tuple[Any, ...]]] = []

    class Pool:
        def __init__(self, *_: Any) -> None:
            self.given: list[tuple[Any, ...]] = []
            pools.append(self.given)

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def submit(self, *arguments: Any) -> Future[Any]:
            self.given.append(arguments)
            done: Future[Any] = Future()
            try:
                done.set_result(answer(*arguments))
            except Exception as error:
                done.set_exception(error)
            return done

    return Pool, pools


@pytest.mark.slow
def test_a_step_is_measured_eager_and_compiled(options: Options, reports) -> None:
    gpu_speed.step(options)
    eager, compiled = reports()
    assert ", eager: ours" in eager["line"]
    assert ", compiled: ours" in compiled["line"]
    assert min(eager["rate"], eager["plain"], compiled["rate"], compiled["plain"]) > 0
    assert eager["ok"] is compiled["ok"] is None
    rates = json.loads((options.folder / "step.json").read_text())
    assert rates == {"resnet50 False": eager["rate"], "resnet50 True": compiled["rate"]}


def both(ours: float, plain: float) -> dict[str, list[float]]:
    return {"ours": [ours], "plain PyTorch": [plain]}


@pytest.mark.parametrize(
    ("name", "ours", "checks"),
    [("NVIDIA H100 80GB HBM3", 0.08, [True]), ("NVIDIA H200", 0.1, [False]), ("NVIDIA L4", 0.5, [])],
)
def test_resnet50_is_judged_on_a_hopper_gpu_only(
    options: Options, reports, monkeypatch, name: str, ours: float, checks: list[bool]
) -> None:
    pool, _ = fake_pools(lambda *_: both(ours, ours / 1.25))
    monkeypatch.setattr(gpu_speed, "ProcessPoolExecutor", pool)
    (options.folder / "machine.json").write_text(json.dumps({"name": name, "copy": 3e12}))
    gpu_speed.step(Options("cuda", False, options.folder))
    lines = reports()
    assert [report["ok"] for report in lines if report["ok"] is not None] == checks
    assert sum("ours / plain 1.250" in report["line"] for report in lines) == 8
    floor = "floor 40.0 ms by bytes moved"  # 256 x 469 MB at 3 TB/s
    assert floor in lines[0]["line"]


def test_a_network_that_fails_does_not_stop_the_others(options: Options, reports, monkeypatch) -> None:
    def answer(_: Any, __: Any, one: Task, windows: int) -> dict[str, list[float]]:
        if (one.name, one.compiled) == ("resnet50", True):
            raise RuntimeError("no\ncompiler")
        return both(0.1 * windows, 0.1)

    pool, pools = fake_pools(answer)
    monkeypatch.setattr(gpu_speed, "ProcessPoolExecutor", pool)
    (options.folder / "machine.json").write_text(json.dumps({"name": "", "copy": 3e12}))
    gpu_speed.step(Options("cuda", False, options.folder))
    wrong = [report["line"] for report in reports() if report["ok"] is False]
    assert wrong == ["resnet50, compiled: RuntimeError: no compiler"]
    assert [len(given) for given in pools] == [2, 2, 2, 2]  # a process a network
    rates = json.loads((options.folder / "step.json").read_text())
    assert len(rates) == 7
    assert rates["vit_b_16 True"] == 256 / 0.2


@pytest.mark.slow
def test_timm_is_compared_with_ours(options: Options, reports, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    (options.folder / "step.json").write_text(json.dumps({"resnet50 False": 250.0, "resnet50 True": 300.0}))
    gpu_speed.timm(options)
    lines = [report["line"] for report in reports()]
    assert lines[0] == "timm, resnet50, eager: 200 images/s; ours / timm 1.25 (target 1.0)"
    assert lines[2] == "timm, resnet50, compiled: 200 images/s; ours / timm 1.50 (target 1.0)"


def test_timm_left_out_is_reported_and_no_failure(options: Options, reports, monkeypatch) -> None:
    gpu_speed.timm(Options("cpu", True, options.folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    gpu_speed.timm(options)
    assert [(report["line"], report["ok"]) for report in reports()] == [
        ("timm's benchmark.py was not given (--timm FILE)", None),
        ("timm is not installed", None),
    ]


def test_timm_runs_with_its_own_model_names_and_reports_errors_in_one_line(options: Options) -> None:
    cpu = torch.device("cpu")
    assert options.timm
    assert timm_rate(options.timm, Task("resnet18", 4, 32, cpu, 1)) == 4 / 200
    # The stub fails for the name that timm has for this network, and for no other.
    with pytest.raises(RuntimeError, match=r"benchmark\.py: RuntimeError: no such model$"):
        timm_rate(options.timm, Task("vit_b_16", 4, 32, cpu, 1))
    with pytest.raises(RuntimeError, match="out of memory"):
        timm_rate(options.timm, Task("convnext_tiny", 4, 32, cpu, 1))


@pytest.mark.slow
def test_the_loader_and_both_together_are_measured_on_the_same_photos(options: Options, reports) -> None:
    gpu_speed.loader(options)
    lines = {report["line"].partition(":")[0]: report for report in reports()}
    assert all(report["ok"] is None for report in lines.values()), lines
    kinds = ("archive", "tiled", "short256")
    assert all(lines[f"loader, {kind}"]["rates"][0] > 0 for kind in kinds)
    assert all(lines[f"loader, {kind}, nvJPEG"]["rate"] > 0 for kind in kinds[:2])
    assert {path.name for path in options.folder.glob("photos-*")} == {f"photos-{kind}" for kind in kinds}
    gpu_speed.end_to_end(options)
    (report,) = reports()  # so the photos were not made again
    assert report["ok"] is None
    assert min(report["loader"], report["device"], report["together"]) > 0


def test_the_loader_is_measured_where_the_gpu_does_not_decode(options: Options, reports, monkeypatch) -> None:
    def rate(_: Options, folder: Path, threads: int, on_gpu: bool, seconds: float) -> float:
        if on_gpu:
            raise RuntimeError("nvJPEG")
        return 100.0

    def check(*_: Any) -> str:
        raise RuntimeError("libnvjpeg.so")

    monkeypatch.setattr(gpu_speed, "_loader_rate", rate)
    monkeypatch.setattr(gpu_speed, "check_gpu_decode", check)
    monkeypatch.setattr(gpu_speed, "photos", lambda options, kind: options.folder / kind)
    gpu_speed.loader(options)
    lines = reports()
    assert sum("rates" in report for report in lines) == 3
    assert [report["line"] for report in lines if report["ok"] is False] == [
        "nvJPEG at the start of a run: RuntimeError: libnvjpeg.so",
        "loader, archive, nvJPEG: RuntimeError: nvJPEG",
        "loader, tiled, nvJPEG: RuntimeError: nvJPEG",
    ]


@pytest.mark.slow
def test_ingredients_are_measured_and_a_step_is_profiled(options: Options, reports) -> None:
    gpu_speed.ingredients(options)
    lines = reports()
    assert all(report["ok"] is None for report in lines), lines
    measured = [report["line"].split(", ")[1].split(":")[0] for report in lines if "rate" in report]
    assert measured == [name for names in gpu_speed.WAYS for name in names]
    profiled = [report["line"] for report in lines if "rate" not in report]
    assert "by operator:" in profiled[0]
    assert len(profiled) == 1 + gpu_speed.KERNELS
    assert any("convolution" in line for line in profiled[1:])


def test_what_a_process_decides_once_is_measured_in_a_fresh_one(
    options: Options, reports, monkeypatch
) -> None:
    def answer(work: Callable[..., Any], _: Options, name: str = "") -> float:
        if name == "fp16":
            raise RuntimeError("no fp16")
        return 50.0 if name == "blurpool" else 100.0

    pool, pools = fake_pools(answer)
    monkeypatch.setattr(gpu_speed, "ProcessPoolExecutor", pool)
    gpu_speed.ingredients(options)
    lines = [report["line"] for report in reports()]
    assert lines[:3] == [
        "resnet50, bf16: 100 images/s, 1.00 of bf16",
        "resnet50, fp16: RuntimeError: no fp16",
        "resnet50, blurpool: 50 images/s, 0.50 of bf16",
    ]
    by_process = [{name for _, _, *rest in given for name in rest} for given in pools]
    (process,) = [names for names in by_process if "bf16" in names]
    assert not process & {"train.deterministic", "benchmark_limit 0"}


def test_a_profile_counts_kernels_and_not_the_operators_that_start_them() -> None:
    kinds = torch.autograd.DeviceType

    def event(key: str, device: Any, spent: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            device_type=device,
            self_device_time_total=spent,
            self_cpu_time_total=10.0,
            count=3,
            is_user_annotation=annotation,
        )

    events = [
        event("aten::cudnn_convolution", kinds.CPU, 5e6),
        event("add_kernel", kinds.CUDA, 1e6),
        event("sm90_xmma_fprop", kinds.CUDA, 4e6),
        event("Optimizer.step#SGD.step", kinds.CUDA, 9e6),
        event("an annotation", kinds.CUDA, 9e6, annotation=True),
    ]
    assert gpu_speed.busiest(events, on_gpu=True) == [(4.0, 3, "sm90_xmma_fprop"), (1.0, 3, "add_kernel")]


def test_tiled_photos_without_jpegtran_have_restart_markers(monkeypatch) -> None:
    pool = loader_data.make_images(1)
    monkeypatch.setattr(loader_data.shutil, "which", lambda _: None)
    (tiled,), note = loader_data.as_processed(pool, "tiled")
    assert "jpegtran is missing" in note
    assert pool[0].count(b"\xff\xd3") == 0
    assert tiled.count(b"\xff\xd3") == 32 * 24 / 8  # an eighth of the blocks
    assert Image.open(io.BytesIO(tiled)).size == (loader_data.WIDTH, loader_data.HEIGHT)
    assert EncodedImage(tiled).plain
    (same,), note = loader_data.as_processed(pool, "archive")
    assert (same, note) == (pool[0], "")
