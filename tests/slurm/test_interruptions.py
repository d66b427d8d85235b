"""Whatever ends a training before its time, it goes on by itself, and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from door import eventually
from interruptions import Training, assert_the_same
from lab import Lab, LabDoor

KINDS = ("crash", "freeze", "kill", "requeue", "warning", "preemption")

pytestmark = pytest.mark.timeout(1800)  # the fixture's time counts as that of the first test


@pytest.fixture(scope="module")
def trainings(
    lab: Lab, site: LabDoor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Training]]:
    """One training undisturbed and one for each kind of disturbance, all at a time, all at their end."""
    folder = tmp_path_factory.mktemp("interruptions")

    def begin(kind: str, node: str, *settings: str) -> Training:
        words = ("recipe.epochs=4", f"+cluster.sbatch.nodelist={node}", *settings)
        return Training(lab, folder / kind, site.workspace / "datastores", *words)

    found = {
        "calm": begin("calm", "n1"),
        "crash": begin("crash", "n3"),
        "freeze": begin("freeze", "n4"),
        "kill": begin("kill", "n1"),
        "requeue": begin("requeue", "n1"),
        "warning": begin("warning", "n1"),
        "preemption": begin("preemption", "n2", "cluster.partition=low"),
    }
    for kind in KINDS:
        found[kind].wait_for_a_checkpoint()
        if kind == "crash":
            lab.crash("n3")
        elif kind == "freeze":
            # A node that stands still and is cut off: Slurm takes it for dead and starts the job elsewhere.
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
    lab.lose("n3")
    lab.lose("n4")
    for kind in ("crash", "freeze"):
        eventually(lambda kind=kind: lab.job(found[kind].job)["Restarts"] == "1", 120)
        lab.scontrol("update", f"jobid={found[kind].job}", "reqnodelist=n2")  # not only where it was
    # Both copies at once: the old one wakes when the new one has begun.
    found["freeze"].wait_for_a_checkpoint(restarts=1)
    for task in frozen:
        task.resume()
    for training in found.values():
        training.until_finished()
    eventually(lambda: "stepping back" in found["freeze"].log())
    lab.crash("n4")  # where the rest of the old copy's job waits for a Slurm that it does not reach
    yield found
    for training in found.values():
        training.door.close()


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_and_ends_the_same(trainings: dict[str, Training], kind: str) -> None:
    training = trainings[kind]
    assert_the_same(training, trainings["calm"])
    row = training.row
    assert (row["attempt"], row["requeued"]) == (1, 1)
    (step,) = training.steps_gone_on_from()
    assert step > 0
    assert training.log().count("epoch 4/4") == 1  # told once, by rank 0
    assert "epoch" not in training.log(rank=1)


@pytest.mark.parametrize("kind", ["requeue", "warning", "preemption"])
def test_a_signal_costs_no_step(trainings: dict[str, Training], kind: str) -> None:
    assert trainings[kind].steps_gone_on_from() == trainings[kind].steps_stopped_after()[:1]


def test_the_undisturbed_one_has_learnt_and_was_not_requeued(trainings: dict[str, Training]) -> None:
    row = trainings["calm"].row
    assert row["requeued"] == 0
    assert row["top1"] > 0.5  # else equal weights would say little


def test_the_old_copy_of_a_job_steps_back(trainings: dict[str, Training]) -> None:
    assert "stepping back: attempt 1, started 2 times, has taken over on n2" in trainings["freeze"].log()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_twenty_interruptions_at_random_moments(lab: Lab, site: LabDoor, tmp_path: Path) -> None:
    """HPC_IMAGENET_INTERRUPTIONS=… and HPC_IMAGENET_SEED=… give another number of them and other moments."""
    times = int(os.environ.get("HPC_IMAGENET_INTERRUPTIONS", 20))
    seed = int(os.environ.get("HPC_IMAGENET_SEED", random.randrange(1 << 32)))
    print(f"HPC_IMAGENET_SEED={seed}")
    draw = random.Random(seed)
    settings = (f"recipe.epochs={3 + 3 * times}", "seed=7", f"cluster.max_requeues={times}")
    store = site.workspace / "datastores"
    # Apart: a job that preempts takes a whole node, and the calm one is not to be preempted.
    calm = Training(lab, tmp_path / "calm", store, *settings, "+cluster.sbatch.nodelist=n4")
    words = ("cluster.partition=low", "+cluster.sbatch.exclude=n4")
    drill = Training(lab, tmp_path / "drill", store, *settings, *words)
    for done in range(times):
        eventually(lambda done=done: drill.holder.get("restarts") == done, 120)
        if draw.random() < 0.8:  # else perhaps while it is still starting
            drill.wait_for_a_checkpoint(restarts=done)
        time.sleep(draw.uniform(0, 4))
        kind = draw.choice(("kill", "requeue", "preemption"))
        print(f"{done}: {kind} at {drill.row['progress'].get('done', 0)} images", flush=True)
        killed = kind == "kill" and drill.signal(signal.SIGKILL, draw.choice((0, 1)))
        if kind == "preemption":
            node = lab.job(drill.job)["NodeList"]
            lab.sbatch("sleep 1", "--partition=high", f"--nodelist={node}", "--exclusive")
        elif not killed:  # asked for, or there was no task to kill yet
            lab.scontrol("requeue", drill.job)
        eventually(lambda done=done: lab.job(drill.job)["Restarts"] == str(done + 1), 120)
    calm.until_finished()
    assert drill.until_finished()["requeued"] == times
    assert_the_same(drill, calm)
