"""Interrupted trainings resume by themselves and end with the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import eventually
from interruptions import Training, assert_equal
from lab import Lab, LabDoor

from hpc_imagenet.report.show.attempt_times import intervals
from hpc_imagenet.runs.store import Run

KINDS = ("crash", "freeze", "kill", "requeue", "warning", "preemption")

pytestmark = pytest.mark.timeout(1800)  # s; the fixture's time counts for the first test


@pytest.fixture(scope="module")
def trainings(
    lab: Lab, site: LabDoor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Training]]:
    """Finished trainings by kind of interruption, run in parallel; `calm` is the undisturbed one."""
    folder = tmp_path_factory.mktemp("interruptions")

    def start(kind: str, node: str, *settings: str) -> Training:
        words = ("recipe.epochs=4", f"+cluster.sbatch.nodelist={node}", *settings)
        return Training(lab, folder / kind, site.workspace / "datastores", *words)

    found = {
        "calm": start("calm", "n1"),
        "crash": start("crash", "n3"),
        "freeze": start("freeze", "n4"),
        "kill": start("kill", "n1"),
        "requeue": start("requeue", "n1"),
        "warning": start("warning", "n1"),
        "preemption": start("preemption", "n2", "cluster.partition=low"),
    }
    for kind in KINDS:
        found[kind].wait_for_checkpoint()
        if kind == "crash":
            lab.crash("n3")
        elif kind == "freeze":
            # A frozen and disconnected node: Slurm takes it for dead and restarts the job elsewhere.
            frozen = found["freeze"].signal(signal.SIGSTOP, 0, 1)
            assert len(frozen) == 2
            lab.cut("n4")
        elif kind == "kill":
            assert len(found["kill"].signal(signal.SIGKILL, 1)) == 1
        elif kind == "requeue":
            lab.scontrol("requeue", found["requeue"].job)
        elif kind == "warning":
            lab.slurm("scancel", "--signal=USR2", found["warning"].job)
        else:
            lab.sbatch("sleep 1", "--partition=high", "--nodelist=n2", "--exclusive")
    lab.wait_until_down("n3")
    lab.wait_until_down("n4")
    for kind in ("crash", "freeze"):
        eventually(lambda kind=kind: lab.job(found[kind].job)["Restarts"] == "1", 120)
        lab.scontrol("update", f"jobid={found[kind].job}", "reqnodelist=n2")  # a node other than the lost one
    # Both copies run at once: the old one continues when the new one has started.
    found["freeze"].wait_for_checkpoint(restarts=1)
    for task in frozen:
        task.resume()
    for training in found.values():
        training.until_finished()
    eventually(lambda: "exiting: attempt" in found["freeze"].log())
    lab.crash("n4")  # ends the old copy's processes, which wait for an unreachable Slurm
    yield found
    for training in found.values():
        training.cli.close()


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_resumes_to_equal_weights(trainings: dict[str, Training], kind: str) -> None:
    training = trainings[kind]
    assert_equal(training, trainings["calm"])
    row = training.row
    assert (row["attempt"], row["requeued"]) == (1, 1)
    attempt = Run(training.folder).attempt
    assert attempt
    kinds = [part.kind for part in intervals(attempt)]
    assert kinds == ["queued", "running", "requeued", "running"]
    (step,) = training.resumed_steps()
    assert step > 0
    assert training.log().count("epoch 4/4") == 1  # printed once, by rank 0
    assert "epoch" not in training.log(rank=1)


@pytest.mark.parametrize("kind", ["requeue", "warning", "preemption"])
def test_signal_loses_no_step(trainings: dict[str, Training], kind: str) -> None:
    assert trainings[kind].resumed_steps() == trainings[kind].stopped_steps()[:1]


def test_undisturbed_training_has_learnt_and_was_not_requeued(trainings: dict[str, Training]) -> None:
    row = trainings["calm"].row
    assert row["requeued"] == 0
    assert row["top1"] > 0.5  # otherwise equal weights would prove little


def test_superseded_copy_of_a_job_exits(trainings: dict[str, Training]) -> None:
    assert "exiting: attempt 1, started 2 times, has taken over on n2" in trainings["freeze"].log()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_twenty_interruptions_at_random_moments(lab: Lab, site: LabDoor, tmp_path: Path) -> None:
    """HPC_IMAGENET_INTERRUPTIONS=… sets their number, HPC_IMAGENET_SEED=… the moments."""
    times = int(os.environ.get("HPC_IMAGENET_INTERRUPTIONS", 20))
    seed = int(os.environ.get("HPC_IMAGENET_SEED", random.randrange(1 << 32)))
    print(f"HPC_IMAGENET_SEED={seed}")
    draw = random.Random(seed)
    settings = (f"recipe.epochs={3 + 3 * times}", "seed=7", f"cluster.max_requeues={times}")
    store = site.workspace / "datastores"
    # On different nodes: a preempting job takes a whole node, and `calm` must not be preempted.
    calm = Training(lab, tmp_path / "calm", store, *settings, "+cluster.sbatch.nodelist=n4")
    words = ("cluster.partition=low", "+cluster.sbatch.exclude=n4")
    interrupted = Training(lab, tmp_path / "interrupted", store, *settings, *words)
    for done in range(times):
        eventually(lambda done=done: interrupted.holder.get("restarts") == done, 120)
        if draw.random() < 0.8:  # otherwise possibly while it is still starting
            interrupted.wait_for_checkpoint(restarts=done)
        time.sleep(draw.uniform(0, 4))
        kind = draw.choice(("kill", "requeue", "preemption"))
        print(f"{done}: {kind} at {interrupted.row['progress'].get('done', 0)} images", flush=True)
        killed = kind == "kill" and interrupted.signal(signal.SIGKILL, draw.choice((0, 1)))
        if kind == "preemption":
            node = lab.job(interrupted.job)["NodeList"]
            lab.sbatch("sleep 1", "--partition=high", f"--nodelist={node}", "--exclusive")
        elif not killed:  # drawn, or there was no task to kill yet
            lab.scontrol("requeue", interrupted.job)
        eventually(lambda done=done: lab.job(interrupted.job)["Restarts"] == str(done + 1), 120)
    calm.until_finished()
    assert interrupted.until_finished()["requeued"] == times
    assert_equal(interrupted, calm)
