"""Why an attempt failed: one of a few classes, in one sentence, with the one remedy that a retry applies.

The evidence is the attempt's outcome, Slurm's state, and the ends of the error logs. `failure_class` reads
only the reason of a state and is therefore cheap enough for a table of thousands of runs; `diagnose` reads
the logs as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc_imagenet.io.printable import one_line
from hpc_imagenet.launch.executor import State
from hpc_imagenet.launch.retries.error_logs import DEVICE_MEMORY_LINE, ErrorLogs, error_logs
from hpc_imagenet.launch.retries.remedies import PLACEHOLDER, Failure, remedy_for
from hpc_imagenet.launch.states import state
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, Attempt
from hpc_imagenet.runs.store import Run

HOST_MEMORY = "host_memory"
DEVICE_MEMORY = "device_memory"
TIME_LIMIT = "time_limit"
NODE_FAILURE = "node_failure"
REQUEUED_TOO_OFTEN = "requeued_too_often"
PEER_LOST = "peer_lost"
NOT_FINITE = "not_finite"
BAD_DATA = "bad_data"
MISSING_FILE = "missing_file"
DISK_FULL = "disk_full"
ENVIRONMENT = "environment"
CRASH = "crash"
BUG = "bug"
KILLED = "killed"
UNKNOWN = "unknown"
INPUT = "input"
STOPPED = "cancelled"


@dataclass(frozen=True)
class FailureClass:
    """A class of failures.

    Attributes:
        words: the class in a few words, for tables; empty if the reason says it all.
        pattern: what a reason or a log line of this class contains, in lower case, which is matched faster.
        advice: what to do where no setting is the remedy; `RUN` becomes the run's id.
        certain: whether it would happen again with the same settings.
        passing: whether it may be retried unchanged any number of times.
    """

    words: str
    pattern: re.Pattern[str]
    advice: str = ""
    certain: bool = False
    passing: bool = False


def _class(words: str, pattern: str, advice: str = "", **flags: bool) -> FailureClass:
    return FailureClass(words, re.compile(pattern), advice, **flags)


# The first class whose pattern is found. Special causes come before those that they look like.
CLASSES: dict[str, FailureClass] = {
    KILLED: _class(
        "killed",
        r"^ended without an outcome|^keyboardinterrupt|^stopped by sig"
        r"|^(?:a task was ended by sig\w+|stopped with its work saved), but",
        "retry RUN resumes it",
    ),
    NOT_FINITE: _class(
        "NaN",
        r"the loss at step \d+ \(epoch \d+\) is not finite",
        "look at the images in bad_batch.txt, or submit it again with a lower recipe.learning_rate: "
        "a run of its own",
        certain=True,
    ),
    BAD_DATA: _class(
        "damaged data",
        r"image \S+ cannot be read|cannot be decoded|damaged or truncated|(?:damaged|truncated) at byte \d+"
        r"|has md5|is damaged: its hash|was modified after its upload",
        "download and process it again, or leave such images out: retry RUN loader.on_corrupt=skip",
    ),
    DEVICE_MEMORY: _class(
        "out of device memory",
        DEVICE_MEMORY_LINE,
        "set a larger train.accumulate, or take a smaller model",
        certain=True,
    ),
    HOST_MEMORY: _class(
        "out of host memory",
        r"out of (?:host )?memory|oom[-_ ]kill|\bmemoryerror\b|can(?:no|')t allocate memory|std::bad_alloc"
        r"|no page-locked memory|images at a time are too many for this machine",
        "set fewer loader.workers, or give it more memory (on Slurm: cluster.memory_gb, and a "
        "cluster.partition whose nodes have it)",
        certain=True,
    ),
    NODE_FAILURE: _class(
        "node failure",
        r"slurm: (?:node fail|boot fail)|srun lost a node|due to node \S* ?failure|node failure on",
        "retry RUN continues it, perhaps on another node",
        passing=True,
    ),
    REQUEUED_TOO_OFTEN: _class(
        "preempted too often",
        r"slurm: preempted|requeued \d+ times, more than cluster\.max_requeues"
        r"|cluster\.max_requeues=\d+ is used up",
        passing=True,
    ),
    TIME_LIMIT: _class(
        "time limit",
        r"slurm: (?:timeout|deadline)|due to time limit|^stopped near its time limit",
        "set a longer cluster.time, and a cluster.partition that allows it",
    ),
    DISK_FULL: _class(
        "disk or quota full",
        r"no space left|quota exceeded|not enough free (?:space|bytes|inodes)",
        "free some space or raise the quota, then retry RUN",
    ),
    ENVIRONMENT: _class(
        "environment",
        r"modulenotfounderror|importerror|no module named|cannot open shared object file|undefined symbol"
        r"|command not found|python\S*: (?:not found|no such file)|sees no gpu|no kernel image is available"
        r"|driver version is insufficient|driver on your system is too old|found no nvidia driver"
        r"|no (?:cuda|hip) gpus are available|cuda unknown error|cuda driver initialization failed"
        r"|unexpected error from cudagetdevicecount|system not yet initialized"
        r"|cuda-capable device\S* \S+ busy|cannot use the gpu of this node|has no kernels for"
        r"|nccl cannot connect the gpus|no socket interface found|duplicate gpu detected",
        "python -m hpc_imagenet doctor checks the nodes; set cluster.setup, or install what is missing",
    ),
    MISSING_FILE: _class(
        "missing file",
        r"filenotfounderror|no such (?:file|index|folder)|\S/\S+ is missing|does not exist",
        "restore the file or run the stage that makes it, then retry RUN",
    ),
    PEER_LOST: _class(
        "lost another task",
        r"lost another task of this job|\bnccl\b|gloo/",
        "retry RUN resumes from the last checkpoint",
    ),
    CRASH: _class(
        "crash",
        r"\bsig(?:segv|ill|fpe|bus|abrt)\b|segmentation fault|illegal instruction|bus error|core dumped",
        "doctor checks the node's libraries; retry RUN resumes from the last checkpoint",
    ),
    BUG: _class(
        "bug",
        r"^(?:\w+\.)*\w*(?:error|exception)(?::|$)",
        "logs RUN prints the traceback",
    ),
    UNKNOWN: _class(
        "",
        r"^exit code \d+|^slurm: (?:failed|completed|[a-z ]+ \()|wrote no outcome|^it has ended, and slurm"
        r"|^outcome\.json of this attempt is damaged",
        "logs RUN prints its output",
    ),
}
_INPUT = FailureClass("", re.compile("(?!)"), "fix that, then retry RUN")
_CANCELLED = FailureClass("cancelled", re.compile("(?!)"), "retry RUN continues it", passing=True)
_VAGUE = (KILLED, UNKNOWN, PEER_LOST)  # the logs may show more than the reason


@dataclass(frozen=True)
class Diagnosis:
    """Why an attempt failed.

    Attributes:
        kind: the class: a key of `CLASSES`, else `input` (the reason says what to do) or `cancelled`.
        text: one sentence, printable.
        remedy: settings outside the signature, by name, with which a retry would not fail this way again.
        command: what to type, or to do.
        reason: the recorded reason, with which two failures are compared.
        continues: whether it saved work before its time limit, and may be retried unchanged any number of
            times.
    """

    kind: str
    text: str
    remedy: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    reason: str = ""
    continues: bool = False

    def is_same(self, other: Diagnosis | None) -> bool:
        """Whether another attempt failed the same way: numbers, such as steps and sizes, may differ."""
        return other is not None and self.kind == other.kind and _shape(self.reason) == _shape(other.reason)


def class_of(kind: str) -> FailureClass:
    """Return the class of `Diagnosis.kind`."""
    return {INPUT: _INPUT, STOPPED: _CANCELLED}.get(kind) or CLASSES[kind]


def failure_class(name: str, reason: str) -> str:
    """Return the kind of a failed or cancelled state by its reason alone; empty for other states.

    Args:
        name: the state, as in runs/attempt.py.
        reason: its reason.
    """
    if name == CANCELLED:
        return STOPPED
    return _kind_of(reason) or INPUT if name == FAILED else ""


def failure_words(kind: str, reason: str) -> str:
    """Return a class of failure in a few words; empty if the reason already contains them."""
    words = class_of(kind).words if kind and kind != STOPPED else ""
    return "" if _contains(reason, words) else words


def diagnose(run: Run, attempt: Attempt | None = None, status: State | None = None) -> Diagnosis | None:
    """Return why an attempt failed or was cancelled; None if it did not.

    Args:
        run: the run.
        attempt: one of its attempts; None: the newest.
        status: the state of the run, if the caller has just queried it.
    """
    newest = run.attempt
    attempt = attempt or newest
    if attempt is None:
        status = status or state(run)
        name, reason = status.name, status.reason
    elif outcome := attempt.outcome:
        name, reason = outcome.state, outcome.reason
    elif newest is not None and attempt.number == newest.number:
        status = status or state(run)
        name, reason = status.name, status.reason
    else:
        name, reason = FAILED, "ended without an outcome"
    kind = failure_class(name, reason)
    if not kind:
        return None
    logs = error_logs(attempt) if attempt and kind != STOPPED else ErrorLogs({})
    frozen = run.readable_config()
    evidence = reason
    if kind in _VAGUE:
        kind, evidence = _from_logs(kind, reason, logs)
    failure = Failure(run, attempt, frozen, evidence, tuple(logs.lines))
    if kind == KILLED and failure.reached_time_limit():
        kind, evidence = TIME_LIMIT, "it ran about as long as cluster.time allows"
    continues = kind == TIME_LIMIT and failure.kept_work()
    remedy = {} if continues else remedy_for(kind, failure)
    command = f"retry {one_line(run.id)} continues it" if continues else _command(kind, run, remedy)
    return Diagnosis(kind, _text(kind, evidence, reason, logs), remedy, command, one_line(reason), continues)


def _kind_of(text: str) -> str:
    lower = text.lower()
    return next((kind for kind, each in CLASSES.items() if each.pattern.search(lower)), "")


def _from_logs(kind: str, reason: str, logs: ErrorLogs) -> tuple[str, str]:
    """Return the class and the line that shows it; what the task that failed first reports comes first."""
    first = logs.first_failure()
    slurm = next((line for line in reversed(list(logs.lines)) if _SLURM_CAUSE.search(line)), "")
    for line in (slurm, first.line if first else "", logs.last_error()):
        found = _kind_of(line)
        if found and found not in (KILLED, UNKNOWN, kind):
            return found, f"{first}" if first and line == first.line else line
    if first:
        return PEER_LOST, str(first)
    return kind, reason


# Slurm reports these in the log of rank 0, before the lines of the tasks that they end.
_SLURM_CAUSE = re.compile(
    r"^(?:slurmstepd|srun): .*(?:oom[-_ ]kill|out of memory|DUE TO (?:TIME LIMIT|NODE))", re.IGNORECASE
)


def _text(kind: str, evidence: str, reason: str, logs: ErrorLogs) -> str:
    words = class_of(kind).words
    detail = one_line(evidence or reason)
    if kind == BUG and (frames := logs.last_frames()):
        detail += f" ({frames})"
    if kind == STOPPED or not words or _contains(detail, words):
        return detail
    return f"{words}: {detail}" if detail else words


def _command(kind: str, run: Run, remedy: Mapping[str, Any]) -> str:
    name = one_line(run.id)
    if remedy:
        settings = " ".join(f"{key}={value}" for key, value in remedy.items())
        return f"retry {name} sets {settings}"
    return class_of(kind).advice.replace(PLACEHOLDER, name)


def _contains(text: str, words: str) -> bool:
    """Whether a text begins with the words of its class, or has them where they are not a name by chance."""
    lower = text.lower()
    return lower.startswith(words) or f"({words}" in lower or (" " in words and words in lower)


def _shape(reason: str) -> str:
    return re.sub(r"[0-9a-f]*\d[0-9a-f.]*", "0", reason)
