"""A probe that was started: its reports so far, whether it is over, and the findings of its checks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_imagenet.cluster import slurm
from hpc_imagenet.doctor.check_result import Finding, ProbeReport, fail, node_names, ok, warn
from hpc_imagenet.doctor.cluster_checks import causes, check_sacct
from hpc_imagenet.doctor.node_checks import check_nodes, explain_no_report
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.attempt import QUEUED, RUNNING

FILE_DELAY = 15.0  # s after the job's end until all files that nodes wrote must be visible here
MAX_RUN_TIME = 700.0  # s: the probe's time limit and Slurm's own delays
QUERY_INTERVAL = 1.0  # s between two queries of Slurm
_EXIT_DELAY = 30.0  # s that a job may take to end after its last report
# Slurm's reasons for a pending job that will never start.
_NEVER_STARTS = re.compile(
    "Partition(TimeLimit|NodeLimit|Config|Down|Inactive)|BadConstraints|Invalid(Account|QOS)|JobHeld.*"
)


class ProbeJob:
    """One probe: a Slurm job, or a process on this machine. Times are of `time.monotonic`, in s."""

    def __init__(self, probe: ProbeReport, folder: Path, started: str | subprocess.Popen[bytes]) -> None:
        """Follow a probe that was just started: as a Slurm job, given by its id, or as a process."""
        self.probe = probe
        self.folder = folder
        self.job_id = started if isinstance(started, str) else ""
        self.process = None if isinstance(started, str) else started
        self.tasks: dict[int, dict[str, Any]] = {}  # reports by rank
        self.reason = ""  # why it is pending, or how it ended
        self._submitted = time.monotonic()
        self._running = self._submitted if self.process else None
        self._complete: float | None = None
        self._ended: float | None = None
        self._cancelled = False

    def read_reports(self) -> None:
        """Read the reports that are new or were not complete before."""
        for path in self.folder.glob("report-*.json"):
            rank = int(path.stem.partition("-")[2])
            if rank not in self.tasks or not self.tasks[rank]["complete"]:
                with contextlib.suppress(OSError):  # ESTALE of NFS: it is being replaced
                    self.tasks[rank] = json.loads(path.read_bytes())
        if self.tasks:
            self._running = self._running or time.monotonic()
            complete = sum(task["complete"] for task in self.tasks.values())
            if complete == next(iter(self.tasks.values()))["size"]:
                self._complete = self._complete or time.monotonic()

    def update(self, status: slurm.JobStatus | None) -> None:
        """Take over the state of the job from Slurm; None: Slurm does not know it any more."""
        if status is None or (status.state and status.state not in (QUEUED, RUNNING)):
            self._ended = self._ended or time.monotonic()
            reason = status.reason if status else "Slurm no longer knows it"
            self.reason = "Slurm: completed" if "completed" in reason else reason
        elif status.state == RUNNING:
            self._running = self._running or time.monotonic()
        elif status.state == QUEUED:
            self.reason = status.reason

    def is_over(self, timeout: float) -> bool:
        """Whether nothing more is expected of the probe, which may wait `timeout` s in the queue."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None and self._ended is None:
            self._ended, self.reason = now, f"exit code {self.process.returncode}"
        if self._complete is not None:
            return self._ended is not None or now - self._complete > _EXIT_DELAY
        if self._ended is not None:
            return now - self._ended > (FILE_DELAY if self.job_id else 0.5)
        if self._running is not None:
            return now - self._running > MAX_RUN_TIME
        return now - self._submitted > timeout or bool(_NEVER_STARTS.fullmatch(self.reason))

    def cancel(self) -> None:
        """Cancel the job or kill the process unless it has ended."""
        if self._ended is not None or self._cancelled:
            return
        self._cancelled = True
        if self.process is None:
            with contextlib.suppress(UserError):  # its time limit will end it
                slurm.cancel_job(self.job_id)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def findings(self, workspace: str) -> list[tuple[str, Finding]]:
        """Return name and finding of all checks of this probe, when it is over."""
        reported = {task["node"] for task in self.tasks.values()}
        missing = []
        if self.job_id and self.tasks and len(self.tasks) < self.probe.size:
            nodelist = next(iter(self.tasks.values()))["nodelist"]
            nodes = slurm.run_command("scontrol", "show", "hostnames", nodelist).stdout.split()
            missing = [node for node in nodes if node not in reported]
        probe = replace(self.probe, tasks=self.tasks, missing_nodes=missing)
        if self._running is None and self._ended is None:
            return [("probe", self._not_started())]
        findings = [("probe", self._check_job(probe))]
        if self.tasks:
            findings += check_nodes(probe)
        else:
            check, finding = explain_no_report(probe, workspace, self._log("*_log.err"), self.reason)
            findings = [*([] if check == "probe" else findings), (check, finding)]
        if self.job_id and self._ended is not None:
            findings.append(("sacct", check_sacct(self.job_id)))
        if self.tasks and (log := self._log("*_0_log.err")):
            first, *more = log.splitlines()
            found = first + (f" (and {len(more)} more lines)" if more else "")
            hint = f"check whether this matters; the lines of {probe.setting('setup')} print here as well"
            findings.append(("printed", warn(found, hint)))
        return findings

    def _check_job(self, probe: ProbeReport) -> Finding:
        found = f"job {self.job_id} ran" if self.job_id else "a process ran"
        found += f" on {node_names(probe.nodes)}" if self.tasks else ""
        if self.job_id and self._running is not None:
            found += f" after {self._running - self._submitted:.0f} s in the queue"
        if self.tasks and self._complete is None:
            ended = "it took too long and was cancelled" if self._ended is None else self.reason
            return fail(f"{found} and did not report everything ({ended})", "see the lines below")
        return ok(found)

    def _not_started(self) -> Finding:
        names = causes(self.reason)
        change = " or ".join(self.probe.setting(name) for name in names or ("partition", "qos"))
        fix = f"change {change}" if names else f"use a longer --timeout, or change {change}"
        waited = f"job {self.job_id} did not start within {time.monotonic() - self._submitted:.0f} s"
        return fail(f"{waited} ({self.reason or 'Slurm gives no reason'}) and was cancelled", fix)

    def _log(self, pattern: str) -> str | None:
        """Return the stderr of the job; None if no log exists."""
        logs = [path.read_text(errors="replace").strip() for path in sorted(self.folder.glob(pattern))]
        return "\n".join(filter(None, logs)) if logs else None


def finished_probes(jobs: Sequence[ProbeJob], timeout: float) -> Iterator[ProbeJob]:
    """Follow all probes and yield each, in the given order, when it is over.

    A probe that waits in the queue for more than `timeout` s is cancelled.
    """
    queried = float("-inf")
    for job in jobs:
        while not job.is_over(timeout):
            if time.monotonic() - queried > QUERY_INTERVAL:
                statuses = slurm.query_jobs(each.job_id for each in jobs if each.job_id)
                for each in jobs:
                    if each.job_id:
                        each.update(statuses.get(each.job_id))
                queried = time.monotonic()
            for each in jobs:
                each.read_reports()
            time.sleep(0.1)
        job.cancel()
        job.read_reports()
        yield job
