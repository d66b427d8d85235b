"""The doctor's visit: ask on the login side, send a probe to the nodes, listen, and tell line by line.

The probe is a job like any training's or download's, by the same submission, and no run: it leaves its traces
in runs/.doctor/<time>/, which go when nothing was wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpc_imagenet import __version__
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Cluster, Config, cluster_for
from hpc_imagenet.doctor import cluster_checks
from hpc_imagenet.doctor.check_result import FAIL, CheckResult, ProbeReport
from hpc_imagenet.doctor.probe import Probe
from hpc_imagenet.doctor.probe_job import ProbeJob, finished_probes
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch import local_queue, sbatch, slurm

MINUTES = 5  # the probe's time limit; it takes seconds, but the first import of torch may take its time
PACKAGES = ("torch=torch", "torchvision=torchvision", "pytorch_lightning=pytorch-lightning")
_KEPT = 86_400.0  # s for which the traces of a probe that found something wrong are kept


def run_doctor(overrides: Sequence[str], config_dir: str | None, timeout: float, as_json: bool) -> int:
    """Examine the cluster that the overrides choose and print a line a matter.

    Args:
        overrides: settings, as for a submission.
        config_dir: a further folder of groups.
        timeout: seconds that the probe may wait in the queue.
        as_json: print one list of objects at the end instead.

    Returns:
        The exit code: 0 all well, 1 something is wrong, 130 interrupted.

    Raises:
        UserError: a setting that does not exist or makes no sense.
    """
    config, *others = compose(list(overrides), multirun=True, config_dir=config_dir)
    if others:
        raise UserError("the doctor looks at one combination: give each setting one value")
    report = _Report(as_json)
    try:
        with _signals():
            _examine(config, timeout, report)
    except KeyboardInterrupt:
        print("\ninterrupted: the probe was cancelled", file=sys.stderr)
        return 130
    report.end()
    return 1 if report.wrong else 0


class _Report:
    """The lines so far, each printed as it comes."""

    def __init__(self, as_json: bool) -> None:
        self.lines: list[CheckResult] = []
        self.as_json = as_json

    @property
    def wrong(self) -> int:
        """How many lines are."""
        return sum(line.status == FAIL for line in self.lines)

    def head(self, text: str) -> None:
        """Say what the next lines are about."""
        print(text, flush=True, file=sys.stderr if self.as_json else sys.stdout)

    def add(self, line: CheckResult) -> CheckResult:
        """Take a line in."""
        self.lines.append(line)
        if not self.as_json:
            print(line, flush=True)
        return line

    def end(self) -> None:
        """Say what it comes to."""
        if self.as_json:
            print(json.dumps([line.plain() for line in self.lines], indent=2, ensure_ascii=False))
        elif self.wrong:
            print(f"{self.wrong} {'line is' if self.wrong == 1 else 'lines are'} wrong")
        elif self.lines:
            print("all is well")


def _examine(config: Config, timeout: float, report: _Report) -> None:
    executor = config.cluster.executor
    report.head(f"cluster: {executor} · workspace: {config.workspace}")
    report.head("the login side" if executor == "slurm" else "this machine")
    clusters = {stage: cluster_for(config, stage) for stage in ("download", "process", "upload", "train")}
    able = dict.fromkeys(clusters, True)
    if executor == "slurm":
        if (
            report.add(cluster_checks.check_commands()).status == FAIL
            or report.add(cluster_checks.check_squeue()).status == FAIL
        ):
            able = {}
        else:
            report.add(cluster_checks.check_sacct())
            able = _ask_slurm(config, clusters, report)
    if report.add(cluster_checks.check_workspace(config)).status == FAIL:
        return
    probes = ["train"] if able.get("train") else []
    if executor == "slurm" and able.get("download") and clusters["download"] != clusters["train"]:
        probes.append("download")
    if not probes:
        return
    folder = Path(config.workspace) / "runs" / ".doctor" / time.strftime("%Y%m%d-%H%M%S")
    _sweep(folder.parent)
    folder = _new(folder)
    before, told = report.wrong, False
    try:
        _send_probes(config, clusters, probes, folder, timeout, report)
        told = report.wrong > before and any(log.stat().st_size for log in folder.glob("*/*_log.*"))
    finally:
        if not told:
            shutil.rmtree(folder, ignore_errors=True)
    if told:
        report.head(f"what the probe printed: {folder}")


def _ask_slurm(config: Config, clusters: dict[str, Cluster], report: _Report) -> dict[str, bool]:
    """Add the lines of the login side; return which stages Slurm would take."""
    known, settings = cluster_checks.partitions(), cluster_checks.slurm_settings()
    train = clusters["train"]
    report.add(cluster_checks.check_arrays(settings))
    report.add(cluster_checks.check_requeues(train, settings))
    report.add(cluster_checks.check_preemption(train, settings, known))
    folder = Path(config.workspace) / "runs" / ".doctor" / "test-only"
    able = {}
    for stage, cluster in clusters.items():
        overlaid = config.cluster.stage.get(stage, {})
        able[stage] = (
            report.add(cluster_checks.check_accepted(stage, cluster, overlaid, known, folder)).status != FAIL
        )
    return able


def _send_probes(
    config: Config,
    clusters: dict[str, Cluster],
    stages: Sequence[str],
    folder: Path,
    timeout: float,
    report: _Report,
) -> None:
    sent: list[ProbeJob] = []
    try:
        for stage in stages:
            probe = _sent(config, stage, clusters[stage], folder / stage, asks_source=stage == stages[-1])
            try:
                probe.start(_starter(probe.seen, folder / stage))
            except UserError as error:
                mend = (
                    f"look at {probe.seen.setting('qos')}, {probe.seen.setting('account')} and their limits"
                )
                report.add(probe.seen.result("probe", FAIL, str(error), mend))
            else:
                sent.append(probe)
        waits = [f"{probe.seen.stage}'s is job {probe.job_id}" for probe in sent if probe.job_id]
        if waits:
            report.head(f"probes: {', '.join(waits)}; at most {timeout:.0f} s in the queue")
        for probe in finished_probes(sent, timeout):
            report.head(f"the nodes of {probe.seen.stage}")
            for line in probe.results(config.workspace):
                report.add(line)
    finally:
        for probe in sent:
            probe.cancel()


def _sent(config: Config, stage: str, cluster: Cluster, folder: Path, asks_source: bool) -> ProbeJob:
    """Write down what a probe is to find out."""
    folder.mkdir(parents=True)
    train = stage == "train"
    source = config.dataset.source if asks_source else ""
    kind = urlsplit(source).scheme
    ask: dict[str, Any] = {}
    if train:
        ask |= {"scratch": cluster.scratch, "gpus": True, "packages": list(PACKAGES)}
    if kind in ("http", "https"):
        ask["url"] = source
    elif kind in ("", "file") and source:
        if config.dataset.make:  # the stage itself makes it
            source = ""
        else:
            ask["source"] = urlsplit(source).path
    write_json(folder / "ask.json", ask)
    seen = ProbeReport(
        stage=stage,
        cluster=cluster,
        overlaid=frozenset(config.cluster.stage.get(stage, {})),
        size=_tasks(stage, cluster),
        home=_home(PACKAGES if train else ()),
        archives=cluster_checks.archive_bytes(config),
        source=source,
    )
    return ProbeJob(seen, folder)


def _tasks(stage: str, cluster: Cluster) -> int:
    if cluster.executor == "foreground" and slurm.this_job():
        return int(os.environ.get("SLURM_NTASKS", 1))
    if cluster.executor != "slurm" or stage != "train":
        return 1
    return cluster.nodes * (cluster.tasks_per_node or cluster.gpus_per_node or 1)


def _home(packages: Sequence[str]) -> dict[str, Any]:
    """Return what the nodes should have as well; nothing is imported for it."""
    versions: dict[str, str | None] = {}
    for pair in packages:
        package = pair.partition("=")[2]
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "package": __version__,
        "code": str(Path(__file__).resolve().parents[1]),
        "versions": versions,
    }


def _starter(seen: ProbeReport, folder: Path) -> str | subprocess.Popen[bytes]:
    """Start the probe: as a job of the stage's kind, by srun in the allocation we are in, or as a process."""
    if seen.on_slurm:
        most = min(seen.cluster.time or MINUTES, MINUTES)
        part = sbatch.ArrayTask(
            "doctor", seen.stage, f"doctor-{seen.stage}", replace(seen.cluster, time=most), ()
        )
        return sbatch.submit_one(part, folder, Probe(str(folder)))
    command = [sys.executable, "-m", "hpc_imagenet.doctor.probe", str(folder)]
    if slurm.this_job():
        command = ["srun", "--kill-on-bad-exit=1", *seen.cluster.srun, *command]
    with (folder / "here_log.err").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=local_queue.job_environment(),
            start_new_session=True,  # ctrl-C is for us, and we end it
        )


def _new(folder: Path) -> Path:
    """Make a folder of this name, or of the next that is free."""
    for number in range(1000):
        place = folder if not number else folder.with_name(f"{folder.name}-{number}")
        with contextlib.suppress(FileExistsError):
            place.mkdir(parents=True)
            return place
    raise FileExistsError(folder)


def _sweep(folder: Path) -> None:
    """Take away what earlier probes left, when it is old."""
    for old in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _KEPT:
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Take the terminal's closing, and a polite kill, for a ctrl-C: the probe must not stay behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    kept = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
