"""Job arrays of Slurm, made by submitit: options of sbatch, scripts, and their submission."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_imagenet.cluster import dist_env, slurm
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.ownership import UMASK
from hpc_imagenet.launch.local_jobs import local_queue
from hpc_imagenet.launch.slurm_jobs.container import (
    PACKAGE_ROOT,
    ContainerCommand,
    container_command,
)
from hpc_imagenet.launch.slurm_jobs.resource_requests import gpu_options, tasks_per_node, warning_seconds
from hpc_imagenet.launch.slurm_jobs.submit_limit import (
    SubmitLimitReached,
    limit_in,
)
from hpc_imagenet.launch.tasks.shared_task import SharedTask
from hpc_imagenet.launch.tasks.start_task import start_command
from hpc_imagenet.launch.tasks.task import Task
from hpc_imagenet.runs.attempt import Attempt
from hpc_imagenet.runs.store import RunStore
from hpc_imagenet.stages import STAGES


@dataclass(frozen=True)
class ArrayTask:
    """The properties of one run, or of the runs that share a loader, that their Slurm job depends on."""

    run_id: str  # the first run
    stage: str
    label: str
    cluster: Cluster  # settings of this stage
    needs: tuple[str, ...]  # ids of the runs it depends on
    folders: tuple[str, ...] = ()  # folders of the host that it uses in a container
    shares_loader: bool = False  # each run is one process
    sharing: tuple[str, ...] = ()  # ids of the other runs, if several share a loader

    @property
    def run_ids(self) -> tuple[str, ...]:
        """The ids of all its runs."""
        return (self.run_id, *self.sharing)

    @property
    def name(self) -> str:
        """The name of the job."""
        return f"{self.label}+{len(self.sharing)}" if self.sharing else self.label


def extra_sbatch_options(cluster: Cluster) -> dict[str, Any]:
    """Return the options of cluster.sbatch plus `requeue`, or `no-requeue` if they disable it.

    `true` is an option without a value; `false` or null leave an option out.
    """
    options = dict(cluster.sbatch)
    disabled = [options.pop(name, False) for name in ("no-requeue", "no_requeue")]
    requeue = options.pop("requeue", True) and not any(disabled)
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return {"requeue" if requeue else "no-requeue": True, **given}


def check_sbatch_options(cluster: Cluster) -> None:
    """Check cluster.sbatch with sbatch's own parser, which submits nothing and does not query the controller.

    Raises:
        UserError: an option that sbatch does not know, a value that it cannot parse, or another cluster,
            which squeue and scancel would not know.
    """
    options = extra_sbatch_options(cluster)
    if clusters := options.get("clusters"):
        raise UserError(
            f"cluster.sbatch.clusters={clusters} is for sbatch alone: type export "
            f"{slurm.CLUSTERS_VARIABLE}={clusters} instead, which squeue and scancel read as well"
        )
    for name, value in options.items():
        if isinstance(value, dict) or "\n" in str(value):
            raise UserError(
                f"cluster.sbatch.{name}={value!r} is not a value for sbatch: set one line of text"
            )
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        words.append(option if value is True else f"{option}={value}")
    if error := _sbatch_parse_error(tuple(words)):
        raise UserError(f"cluster.sbatch: {error}; sbatch --help lists the options")


@functools.cache  # the jobs of a sweep have the same options
def _sbatch_parse_error(options: tuple[str, ...]) -> str:
    done = slurm.run_command("sbatch", *options, "--help")
    if not done.returncode or "fatal" in done.stderr:  # fatal: no configuration, so nothing was parsed
        return ""
    return next((_single_line(line) for line in done.stderr.splitlines() if line.strip()), "refused")


def group_into_arrays(tasks: Iterable[ArrayTask]) -> list[list[ArrayTask]]:
    """Group runs of equal stage, cluster settings and needs into job arrays; the order is kept.

    A group larger than the cluster's MaxArraySize becomes several arrays.
    """
    groups: dict[str, list[ArrayTask]] = {}
    for task in tasks:
        key = (task.stage, task.cluster, task.needs, task.folders, task.shares_loader, len(task.sharing))
        groups.setdefault(repr(key), []).append(task)
    limit = slurm.max_array_size() if any(len(group) > 1 for group in groups.values()) else 1
    return [group[i : i + limit] for group in groups.values() for i in range(0, len(group), limit)]


def sbatch_script(array: Sequence[ArrayTask], folder: Path) -> str:
    """Return the sbatch script of an array, with run ids in place of the job ids it depends on."""
    executor = _executor(array, folder, array[0].needs)
    if len(array) > 1:
        executor.parameters["map_count"] = len(array)  # as submitit sets it when it submits an array
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def test_only(text: str) -> str:
    """Return the reply of `sbatch --test-only` to a script: the expected start, or why it is refused.

    The jobs it depends on do not exist yet, so the start is computed without the dependencies.
    """
    lines = [line for line in text.splitlines() if not line.startswith("#SBATCH --dependency=")]
    with _without_slurm_variables():
        done = subprocess.run(
            ["sbatch", "--test-only"], input="\n".join(lines), capture_output=True, text=True, check=False
        )
    return _single_line(done.stderr + done.stdout) or "accepted"


def _single_line(output: str) -> str:
    """Return sbatch's output without its prefixes, the lines joined by `; `."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines)


def submit_array(
    array: Sequence[ArrayTask],
    folder: Path,
    after: list[str],
    store: RunStore,
    attempts: Mapping[str, Attempt],
) -> list[str]:
    """Submit tasks of equal resources as one job or array.

    Args:
        array: the tasks.
        folder: submitit's folder for the script, the pickles and the logs.
        after: job ids that must finish first.
        store: the workspace's runs.
        attempts: the attempt of each run, by its id.

    Returns:
        The Slurm job id of each task.

    Raises:
        SubmitLimitReached: a limit of submitted jobs.
        UserError: sbatch refused it for another reason.
    """

    def callable_of(task: ArrayTask) -> Task | SharedTask:
        each = [(str(store.run(run_id).folder), attempts[run_id].number) for run_id in task.run_ids]
        return SharedTask(tuple(each)) if task.sharing else Task(*each[0])

    return _submit(_executor(array, folder, after), list(map(callable_of, array)), array[0].name)


def submit_one(array_task: ArrayTask, folder: Path, function: Callable[[], object]) -> str:
    """Submit a function that is not a run, such as the doctor's probe, in a job like that of a run.

    Args:
        array_task: stage and cluster settings of the job.
        folder: submitit's folder for the script, the pickle and the logs.
        function: called in every task of the job.

    Returns:
        The Slurm job id.

    Raises:
        UserError: sbatch refused it.
    """
    executor = _executor([array_task], folder, array_task.needs)
    executor.update_parameters(teardown=[])  # without an attempt there is nothing to requeue or fail
    return _submit(executor, [function], array_task.label)[0]


def _submit(executor: Any, tasks: Sequence[Callable[[], object]], label: str) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    stderr = io.StringIO()  # submitit prints sbatch's errors; drop them if they are raised below
    try:
        with _without_slurm_variables(), contextlib.redirect_stderr(stderr), executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        message = f"sbatch refused {label}: {_single_line(str(error)) or 'no reason given'}"
        message += _choices(message)
        if name := limit_in(str(error)):
            raise SubmitLimitReached(name, message) from None
        raise UserError(message) from None
    sys.stderr.write(stderr.getvalue())
    return [str(job.job_id) for job in jobs]


def _choices(message: str) -> str:
    """Return the accounts or QOS of the user, if sbatch refused those of a job."""
    for name, column in (("account", "account"), ("qos", "qos")):
        if f"Invalid {name}" in message and (found := slurm.user_associations(column)):
            return f"; yours are {', '.join(found)}: set cluster.{name}="
    return ""


def _executor(array: Sequence[ArrayTask], folder: Path, after: Iterable[str]) -> Any:
    """Return a submitit executor for the jobs of one array. `after`: ids of the jobs it depends on."""
    import submitit

    cluster, stage = array[0].cluster, array[0].stage
    python = shlex.quote(sys.executable)
    command = ContainerCommand(python)
    path = shlex.quote(local_queue.job_environment()["PYTHONPATH"])
    if cluster.container:  # the image has its own packages, apart from this one
        command = container_command(cluster, (str(folder), *array[0].folders))
        path = shlex.quote(str(PACKAGE_ROOT))

    class SlurmJobs(submitit.SlurmExecutor):
        _submitit_command_str = property(lambda self: start_command(self.python, self.folder))

    executor = SlurmJobs(folder=folder, max_num_timeout=cluster.max_requeues, python=command.python)
    distributed = STAGES[stage].distributed and not array[0].shares_loader
    if array[0].shares_loader and cluster.gpus_per_node:  # each run uses one
        cluster = replace(cluster, gpus_per_node=min(cluster.gpus_per_node, len(array[0].run_ids)))
    tasks, options = tasks_per_node(cluster, distributed), extra_sbatch_options(cluster)
    options |= gpu_options(cluster, tasks, options)
    if dependency := ":".join(after):
        # Without kill-on-invalid-dep a job whose dependency failed stays pending for ever.
        options |= {"dependency": f"afterok:{dependency}", "kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=array[0].name if len(array) == 1 else f"{stage}-sweep",
        partition=cluster.partition,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        time=cluster.time,
        nodes=cluster.nodes if distributed else 1,
        ntasks_per_node=tasks,
        cpus_per_task=cluster.cpus_per_task,
        mem=None if cluster.memory_gb is None else f"{int(cluster.memory_gb * 1024)}M",
        array_parallelism=cluster.array_parallelism,
        wckey=None,  # submitit sets one, and some clusters refuse it
        # Since 22.05 srun does not inherit --cpus-per-task from sbatch: a task would get one core. Without it
        # the variable must not exist: srun refuses it together with that of --cpus-per-gpu.
        setup=[
            *cluster.setup,
            f"export PYTHONPATH={path}",
            *([f"export {UMASK}={umask}"] if (umask := os.environ.get(UMASK)) else []),
            "unset SRUN_CPUS_PER_TASK  # of a job that submitted this one",
            '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
            "cd /  # Python imports from the current folder first, which other users may be able to write",
            "trap : TERM  # srun forwards a preemption's signal; wait until the tasks have saved",
        ],
        srun_args=["--kill-on-bad-exit=1", *command.srun_args, *cluster.srun],
        teardown=[f"{python} -m hpc_imagenet.launch.slurm_jobs.requeue {shlex.quote(str(folder))} $?"],
        signal_delay_s=warning_seconds(cluster.time),
        additional_parameters=options,
    )
    return executor


@contextlib.contextmanager
def _without_slurm_variables() -> Iterator[None]:
    """Unset the variables of an outer job (SLURM_* and its CPUs), which a submitted job would inherit."""
    outer = (k for k in os.environ if k.startswith("SLURM_") or k == dist_env.CPUS_VARIABLE)
    saved = {k: os.environ[k] for k in outer if k not in ("SLURM_CONF", slurm.CLUSTERS_VARIABLE)}
    for name in saved:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= saved
