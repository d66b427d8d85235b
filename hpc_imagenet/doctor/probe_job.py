"""A probe under way: what came back from it so far, and whether it will come to more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_imagenet.doctor import cluster_checks, node_checks
from hpc_imagenet.doctor.check_result import FAIL, OK, WARN, CheckResult, ProbeReport, node_names
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.atomic_files import write_json
from hpc_imagenet.launch import slurm
from hpc_imagenet.runs.store import QUEUED, RUNNING

LAG = 15.0  # s in which a file that a node wrote should have come, after the job's end
LONGEST = 400.0  # s that a probe may run: its time limit, and Slurm's own delays
_LEAVING = 30.0  # s that a job may take to end when it has told all
_EVERY = 1.0  # s between two questions to Slurm

# Slurm's reasons for waiting that no waiting mends → the setting.
_NEVER = {
    "PartitionTimeLimit": "time",
    "PartitionNodeLimit": "nodes",
    "PartitionConfig": "partition",
    "PartitionDown": "partition",
    "PartitionInactive": "partition",
    "BadConstraints": "constraint",
    "InvalidAccount": "account",
    "InvalidQOS": "qos",
    "JobHeldUser": "sbatch",
    "JobHeldAdmin": "sbatch",
}


class ProbeJob:
    """One probe: a job of Slurm, or a process here."""

    def __init__(self, seen: ProbeReport, folder: Path) -> None:
        self.seen = seen
        self.folder = folder
        self.job_id = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.since = time.monotonic()
        self.began: float | None = None  # when it was first known to run; as all that follow, on our clock
        self.complete: float | None = None  # when the last report was in
        self.ended: float | None = None
        self.word = ""  # Slurm's for its end, or the reason for which it waits
        self.refused = ""
        self.cancelled = False
        self._greetings: dict[int, dict[str, Any]] = {}
        self._reports: dict[int, dict[str, Any]] = {}

    def start(self, started: str | subprocess.Popen[bytes]) -> None:
        """Note how it was started: a job's id or a process."""
        self.since = time.monotonic()
        if isinstance(started, str):
            self.job_id = started
        else:
            self.process, self.began = started, self.since

    def poll(self) -> None:
        """Take in what has come, and answer each new hello, for the clocks."""
        for path in sorted(self.folder.iterdir()):
            kind, _, rank = path.stem.partition("-")
            if path.suffix != ".json" or not rank.isdigit():
                continue
            number = int(rank)
            if kind == "hello" and number not in self._greetings:
                came = time.time()
                self._greetings[number] = _read(path)
                if self._greetings[number]["first"]:
                    write_json(self.folder / f"echo-{number}.json", {"seen": came, "answered": time.time()})
            elif kind == "report" and number not in self._reports:
                self._reports[number] = _read(path)
        if self._greetings:
            self.began = self.began or time.monotonic()
            size = next(iter(self._greetings.values()))["size"]
            firsts = {rank for rank, hello in self._greetings.items() if hello["first"]}
            if len(self._greetings) == size and firsts <= self._reports.keys() and self.complete is None:
                self.complete = time.monotonic()

    def slurm_reported(self, answer: slurm.JobStatus | None) -> None:
        """Take in Slurm's word; None where it no longer knows the job."""
        if answer is None or (answer.state and answer.state not in (QUEUED, RUNNING)):
            self.ended = self.ended or time.monotonic()
            said = answer.reason if answer else "Slurm no longer knows it"
            self.word = "Slurm: completed" if "completed" in said else said
        elif answer.state == RUNNING:
            self.began = self.began or time.monotonic()
        elif answer.state == QUEUED:
            self.word = answer.reason

    def is_over(self, timeout: float) -> bool:
        """Whether there is no more to wait for; a job that waits too long is cancelled."""
        moment = time.monotonic()
        if self.process is not None and self.process.poll() is not None and self.ended is None:
            self.ended, self.word = moment, f"exit code {self.process.returncode}"
        if self.complete is not None:
            return self.ended is not None or moment - self.complete > _LEAVING
        if self.ended is not None:
            return moment - self.ended > (LAG if self.job_id else 0.5)
        if self.began is None:
            return moment - self.since > timeout or self.word in _NEVER
        return moment - self.began > LONGEST

    def cancel(self) -> None:
        """End it, if it has not ended."""
        if self.ended is not None or self.cancelled:
            return
        self.cancelled = True
        if self.job_id:
            with contextlib.suppress(UserError):  # it ends by its own limit
                slurm.cancel_job(self.job_id)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def results(self, workspace: str) -> list[CheckResult]:
        """Return all lines of this probe."""
        seen = replace(self.seen, greetings=self._greetings, reports=self._reports, silent=self._silent())
        if self.began is None and self.ended is None:
            return [self._never_began()]
        judged = [self._ran(seen)]
        if not self._greetings:
            judged.append(node_checks.explain_no_report(seen, workspace, self._log(), self.word))
        else:
            judged += node_checks.check_nodes(seen)
        if judged[-1].check == "probe" and judged[-1].status == FAIL:
            judged = judged[1:]
        if self.job_id and self.ended is not None:
            judged.append(replace(cluster_checks.check_accounting(self.job_id), where=seen.stage))
        if self._greetings and (printed := self._log("*_0_log.err")):
            lines = printed.splitlines()
            more = f" (and {len(lines) - 1} lines more)" if len(lines) > 1 else ""
            judged.append(
                seen.result(
                    "printed",
                    WARN,
                    f"{lines[0]}{more}",
                    f"whether that matters only you can say; {seen.setting('setup')} prints here as well",
                )
            )
        return judged

    def _ran(self, seen: ProbeReport) -> CheckResult:
        what = f"job {self.job_id}" if self.job_id else "a process"
        where = f" on {node_names(seen.nodes)}" if seen.nodes else ""
        waited = ""
        if self.job_id and self.began is not None:
            waited = f" after {self.began - self.since:.0f} s in the queue"
        if self.complete is None and self._greetings:
            ended = self.word if self.ended is not None else "it went on for too long and was cancelled"
            return seen.result(
                "probe",
                FAIL,
                f"{what} ran{where}{waited} and did not tell all ({ended})",
                "the lines below say what is missing",
            )
        return seen.result("probe", OK, f"{what} ran{where}{waited}")

    def _never_began(self) -> CheckResult:
        why = self.word or "Slurm gives no reason"
        name = next((_NEVER[reason] for reason in _NEVER if reason == self.word), None)
        if name is None and "QOS" in self.word:
            name = "qos"
        elif name is None and "Assoc" in self.word:
            name = "account"
        waited = time.monotonic() - self.since
        mend = f"change {self.seen.setting(name)}" if name else (
            f"ask again with a longer --timeout, or choose another {self.seen.setting('partition')} or "
            f"{self.seen.setting('qos')}"
        )  # fmt: skip
        return self.seen.result(
            "probe",
            FAIL,
            f"job {self.job_id} did not start within {waited:.0f} s ({why}) and was cancelled",
            mend,
        )

    def _silent(self) -> tuple[str, ...]:
        """Return the nodes of the job from which nothing came."""
        nodelist = next((hello["nodelist"] for hello in self._greetings.values()), "")
        if not self.job_id or not nodelist or len(self._greetings) == self.seen.size:
            return ()
        told = {hello["node"] for hello in self._greetings.values()}
        return tuple(node for node in cluster_checks.nodes_of(nodelist) if node not in told)

    def _log(self, pattern: str = "*_log.err") -> str | None:
        """Return what the job printed as errors, None where it left no such log."""
        logs = [path.read_text(errors="replace").strip() for path in sorted(self.folder.glob(pattern))]
        return "\n".join(filter(None, logs)) if logs else None


def finished_probes(sent: Sequence[ProbeJob], timeout: float) -> Iterator[ProbeJob]:
    """Wait for the probes and give out each, in order, when it is over."""
    asked, given = float("-inf"), 0
    over: set[int] = set()
    while given < len(sent):
        for place, probe in enumerate(sent):
            if place in over:
                continue
            probe.poll()
            if probe.is_over(timeout):
                probe.cancel()
                probe.poll()
                over.add(place)
        while given in over:
            yield sent[given]
            given += 1
        if time.monotonic() - asked > _EVERY:
            waiting = [probe for place, probe in enumerate(sent) if place not in over and probe.job_id]
            answers = slurm.query_jobs(probe.job_id for probe in waiting)
            for probe in waiting:
                probe.slurm_reported(answers.get(probe.job_id))
            asked = time.monotonic()
        time.sleep(0.1)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
