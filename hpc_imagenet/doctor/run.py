"""The doctor: checks on the login node, then a probe job on the nodes; prints one line per check.

The probe is submitted like the job of a stage, but it is not a run. Its files are in runs/.doctor/<time>/
and are removed unless a check failed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.compose import compose
from hpc_imagenet.config.schema import Config, cluster_for
from hpc_imagenet.doctor import cluster_checks
from hpc_imagenet.doctor.check_result import FAIL, OK, WARN, Finding, ProbeReport, StageCluster, fail
from hpc_imagenet.doctor.probe import installation, package_version, run_probe
from hpc_imagenet.doctor.probe_job import ProbeJob, finished_probes
from hpc_imagenet.doctor.whole_nodes import check_whole_nodes
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.slurm_jobs import sbatch

PACKAGES = ("torch=torch", "torchvision=torchvision", "pytorch_lightning=pytorch-lightning")  # module=package
_TIME_LIMIT = 10  # minutes of a probe; it takes seconds, but the first import of torch may take minutes
_KEEP_SECONDS = 86_400.0  # s that the files of a probe with a failed check are kept
_MARKS = {OK: "✓", WARN: "\N{EN DASH}", FAIL: "✗"}


def run_doctor(overrides: Sequence[str], config_dir: str | None, timeout: float, as_json: bool) -> int:
    """Check the cluster that the overrides select and print one line per check.

    Args:
        overrides: settings, as for a submission.
        config_dir: additional folder of config groups.
        timeout: s that the probe may wait in the queue.
        as_json: print a list of objects at the end instead of lines.

    Returns:
        Exit code: 0 no check failed, 1 a check failed.

    Raises:
        UserError: unknown or invalid setting.
        KeyboardInterrupt: interrupted; the probe is cancelled.
    """
    results = run_checks(overrides, config_dir, timeout, as_json)
    return 1 if any(result["status"] == FAIL for result in results) else 0


def run_checks(
    overrides: Sequence[str], config_dir: str | None, timeout: float, as_json: bool
) -> list[dict[str, str]]:
    """Do the checks of `run_doctor` and return their results: where, check, status, found, fix."""
    config, *others = compose(list(overrides), multirun=True, config_dir=config_dir)
    if others:
        raise UserError("the doctor checks one combination of settings: give each setting one value")
    report = _Report(as_json)
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the probe must be cancelled
            stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        _check_all(config, timeout, report)
    report.end()
    return report.results


class _Report:
    """The results so far, printed line by line, or as JSON at the end."""

    def __init__(self, as_json: bool) -> None:
        self.results: list[dict[str, str]] = []
        self.failed = 0
        self.as_json = as_json

    def heading(self, text: str) -> None:
        print(text, flush=True, file=sys.stderr if self.as_json else sys.stdout)

    def add(self, where: str, check: str, finding: Finding) -> bool:
        """Add a finding on the login node or on a stage's nodes; return whether the check did not fail."""
        self.results.append({"where": where, "check": check, **finding._asdict()})
        self.failed += finding.status == FAIL
        if not self.as_json:
            fix = f"\n{'':17}→ {finding.fix}" if finding.fix else ""
            print(f"  {_MARKS[finding.status]} {check:<12} {finding.found}{fix}", flush=True)
        return finding.status != FAIL

    def end(self) -> None:
        if self.as_json:
            print(json.dumps(self.results, indent=2, ensure_ascii=False))
        else:
            print(f"{self.failed or 'no'} {'checks' if self.failed > 1 else 'check'} failed")


def _check_all(config: Config, timeout: float, report: _Report) -> None:
    on_slurm = config.cluster.executor == "slurm"
    report.heading(f"cluster: {config.cluster.executor} · workspace: {config.workspace}")
    report.heading("login node" if on_slurm else "this machine")
    targets = {}
    for stage in ("download", "process", "upload", "train"):
        overrides = frozenset(config.cluster.stage.get(stage, {}))
        targets[stage] = StageCluster(stage, cluster_for(config, stage), overrides)
    accepted = _check_slurm(config, targets, report) if on_slurm else {"train"}
    if not report.add("login", "workspace", cluster_checks.check_workspace(config)):
        return
    probed = [targets["train"]] if "train" in accepted else []
    if "download" in accepted and targets["download"].cluster != targets["train"].cluster:
        probed.append(targets["download"])
    if probed:
        _run_probes(config, probed, timeout, report)


def _check_slurm(config: Config, targets: dict[str, StageCluster], report: _Report) -> set[str]:
    """Check Slurm from the login node; return the stages whose jobs it accepts."""
    for name, check in (("commands", cluster_checks.check_commands), ("squeue", cluster_checks.check_squeue)):
        if not report.add("login", name, check()):
            return set()
    partitions, settings = cluster_checks.partitions(), cluster_checks.slurm_settings()
    train = targets["train"].cluster
    report.add("login", "sacct", cluster_checks.check_sacct())
    report.add("login", "arrays", cluster_checks.check_arrays(settings))
    report.add("login", "requeue", cluster_checks.check_requeue(train, settings))
    report.add("login", "preemption", cluster_checks.check_preemption(train, settings, partitions))
    if finding := check_whole_nodes(targets["train"], partitions):
        report.add("login", "whole nodes", finding)
    accepts, folder = cluster_checks.check_accepted, Path(config.workspace, "runs/.doctor/test-only")
    return {
        name for name, each in targets.items() if report.add("login", name, accepts(each, partitions, folder))
    }


def _run_probes(config: Config, targets: Sequence[StageCluster], timeout: float, report: _Report) -> None:
    parent = Path(config.workspace, "runs/.doctor")
    parent.mkdir(exist_ok=True)
    for old in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent))
    failed_before, keep = report.failed, False
    jobs: list[ProbeJob] = []
    try:
        for target in targets:
            probe = _prepare(config, target, folder / target.stage, with_source=target is targets[-1])
            try:
                jobs.append(ProbeJob(probe, folder / target.stage, _start(probe, folder / target.stage)))
            except UserError as error:
                fix = f"check {probe.setting('qos')}, {probe.setting('account')} and their limits"
                report.add(probe.stage, "probe", fail(str(error), fix))
        if waiting := [f"job {job.job_id} ({job.probe.stage})" for job in jobs if job.job_id]:
            report.heading(f"probes: {', '.join(waiting)}; at most {timeout:.0f} s in the queue")
        for job in finished_probes(jobs, timeout):
            report.heading(f"nodes of {job.probe.stage}")
            for check, finding in job.findings(config.workspace):
                report.add(job.probe.stage, check, finding)
        keep = report.failed > failed_before and any(log.stat().st_size for log in folder.glob("*/*_log.*"))
    finally:
        for job in jobs:
            job.cancel()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if keep:
        report.heading(f"logs of the probe: {folder}")


def _prepare(config: Config, target: StageCluster, folder: Path, with_source: bool) -> ProbeReport:
    """Write the request of a probe and return the probe, without reports yet."""
    folder.mkdir()
    train = target.stage == "train"
    packages = PACKAGES if train else ()
    source = config.dataset.source if with_source else ""
    scheme = urlsplit(source).scheme
    if config.dataset.make and scheme in ("", "file"):
        source = ""  # the download stage generates the archives
    request = {
        "scratch": target.cluster.scratch if train else None,
        "packages": packages,
        "gpus": _computing_gpus(target),
        "url": source if scheme in ("http", "https") else "",
        "source": source if not scheme else urlsplit(source).path if scheme == "file" else "",
    }
    write_json(folder / "request.json", request)
    names = [pair.partition("=")[2] for pair in packages]
    login: dict[str, Any] = {**installation(), "versions": {name: package_version(name) for name in names}}
    archives = cluster_checks.archive_bytes(config)
    return ProbeReport(**vars(target), size=_tasks(target), login=login, archives=archives, source=source)


def _tasks(target: StageCluster) -> int:
    """Return the number of tasks of a probe."""
    cluster = target.cluster
    if _is_step(target):
        return int(os.environ.get("SLURM_NTASKS", 1))
    if not target.on_slurm or target.stage != "train":
        return 1
    return cluster.tasks


def _computing_gpus(target: StageCluster) -> int | None:
    """Return on how many GPUs a probe starts a kernel, of those that are the job's; None: on all of them."""
    if target.cluster.gpus_per_node == 0:
        return 0
    # Outside of an allocation this is one process, which uses the first GPU; other GPUs may be in use.
    return 1 if target.cluster.executor == "foreground" and not _is_step(target) else None


def _is_step(target: StageCluster) -> bool:
    """Whether the stage runs as a step of the allocation that this command is in."""
    return target.cluster.executor == "foreground" and slurm.this_job() is not None


def _start(probe: ProbeReport, folder: Path) -> str | subprocess.Popen[bytes]:
    """Start a probe as a Slurm job, by srun in the current allocation, or as a process; return id or process.

    Raises:
        UserError: sbatch refused it.
    """
    if probe.on_slurm:
        cluster = replace(probe.cluster, time=min(probe.cluster.time or _TIME_LIMIT, _TIME_LIMIT))
        job = sbatch.ArrayTask(
            "doctor", probe.stage, f"doctor-{probe.stage}", cluster, (), (str(folder.parents[2]),)
        )
        return sbatch.submit_one(job, folder, functools.partial(run_probe, str(folder)))
    command = [sys.executable, "-m", "hpc_imagenet.doctor.probe", str(folder)]
    environment = local_queue.job_environment()
    if _is_step(probe):
        command = ["srun", "--kill-on-bad-exit=1", *probe.cluster.srun, *command]
    else:
        environment.pop("SLURM_PROCID", None)  # one process, however many tasks the step of this command has
    with (folder / "process_log.err").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C reaches the doctor alone, which then ends the probe
        )
