"""Stage `search`: a worker that takes trials of a study and trains them, one after another, in its own job.

Rank 0 decides; the other ranks read from a file which trial comes next. A trial is an ordinary run, whose
attempt names this worker. It stays claimed by the worker until it has ended, so a worker that is killed and
requeued goes on with its trial from the checkpoint; if it has ended for good, another one takes it over.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hpc_imagenet.cluster import slurm
from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.input.search_space import text_of, trial_config
from hpc_imagenet.config.schema import Config
from hpc_imagenet.errors import PeerLost, Superseded, UserError
from hpc_imagenet.io.atomic_files import read_json, write_json
from hpc_imagenet.runs import lease
from hpc_imagenet.runs.attempt import CANCELLED, FAILED, FINISHED, PRUNED, Attempt, Outcome
from hpc_imagenet.runs.checkpoints import INITIAL, link_or_copy
from hpc_imagenet.runs.store import Progress, Run, RunStore
from hpc_imagenet.runs.usage_records import last_seen
from hpc_imagenet.search.existing_runs import earlier_validations, ended_workers, existing_end, is_of_study
from hpc_imagenet.search.rungs import promotable
from hpc_imagenet.search.study_files import EXECUTOR, MOST_OWNERS, Claim, StudyFiles, TrialRecord, best
from hpc_imagenet.stages.train_stage import TRAIN
from hpc_imagenet.stages.work.trial import free_memory, has_lost_gpu, output_to, run_trial

_POLL = 0.5  # s between two looks of the other ranks for the next trial
_PORTS = 104_729  # added for each trial: the port of the last one may still be in use


def run(config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
    """Train trials until none is left, or the budget is spent; every task of the job calls this.

    Returns:
        trials (number of this worker), study, top1 (0 to 1) and trial (run) of the best of the study so far;
        budget (GPU-hours) if that is spent.

    Raises:
        UserError: no trial of the study could be trained.
        Preempted: a stop signal arrived; the trial's checkpoint is saved.
        PeerLost: another task has ended, or a trial failed after which this process can train no other one.
        Superseded: a later start of this job holds its lease.
    """
    worker = SearchWorker(config, run, dist_env)
    return worker.work()


@dataclass
class SearchWorker:
    """One worker of a study. Only rank 0 opens the study."""

    config: Config
    run: Run
    dist_env: DistEnv

    def __post_init__(self) -> None:
        self._store = RunStore(self.run.folder.parents[1])
        self._files = StudyFiles(self._store, str(self.config.search.name))
        self._about = self._files.definition
        if self._about["space"] != self.config.search.space:
            raise UserError(
                f"another command has just created the study {self._files.name} with another space: begin "
                "this one with another search.name"
            )
        self._rungs = self._about["rungs"] if self._about["algorithm"] == "halving" else [0]
        attempt = self.run.attempt
        assert attempt is not None
        self._attempt = attempt
        self._count = 0
        self._spent: float | None = None  # the budget, if it is
        if self.dist_env.is_rank_zero:
            from hpc_imagenet.search.study import SearchStudy

            self._study = SearchStudy(self._files)
            self._progress = Progress(self.run, every=0)

    def work(self) -> dict[str, Any]:
        """Train trials until none is left."""
        for index in itertools.count():
            trial = self._shared(index, self._next if self.dist_env.is_rank_zero else None)
            if trial is None:
                return self._result() if self.dist_env.is_rank_zero else {}
            self._train(TrialRecord(**trial), index)
            self._count += 1
            free_memory()
        raise AssertionError

    def _shared(self, index: int, decide: Callable[[], TrialRecord | None] | None) -> dict[str, Any] | None:
        """Return the next trial, as rank 0 has decided it."""
        start = f"{self._attempt.number}.{lease.restart_count()}"
        path = self.run.folder / "trials" / f"{start}.{index}.json"
        if decide is not None:
            record = decide()
            trial = asdict(record) if record else None
            if self.dist_env.size > 1:
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"trial": trial})
            return trial
        while (found := read_json(path)) is None:
            list(self.run.folder.iterdir())  # a network file system then forgets that there was no such file
            time.sleep(_POLL)
        value: dict[str, Any] | None = found["trial"]
        return value

    # Which trial comes next. Rank 0 alone.

    def _next(self) -> TrialRecord | None:
        while True:
            if self.run.lease:
                self.run.lease.check()
            claim = self._unfinished()
            if claim is None and not self._is_spent():
                claim = self._promoted() or self._new()
            self._report_progress(claim)
            if claim is None:
                return None
            record = self._begin(claim)
            if not record.ended:
                return record

    def _unfinished(self) -> Claim | None:
        """Return a trial of this worker that has not ended, else one whose worker has ended for good."""
        ended = {(each.trial, each.rung) for each in self._files.records() if each.ended}
        left = [claim for claim in self._files.claims() if (claim.trial, claim.rung) not in ended]
        for claim in left:
            if claim.worker == self.run.id:
                return claim
        gone = ended_workers([self._store.run(worker) for worker in {claim.worker for claim in left}])
        for claim in left:
            if claim.worker not in gone:
                continue
            if claim.owner + 1 >= MOST_OWNERS:
                self._give_up(claim)
                continue
            taken = self._files.claim(claim.trial, claim.rung, claim.owner + 1, self.run.id)
            if taken:
                print(f"trial {claim.trial}: taken over from {claim.worker}, which has ended", flush=True)
                return taken
        return None

    def _give_up(self, claim: Claim) -> None:
        record = self._files.record(claim.trial, claim.rung) or TrialRecord(claim.trial, claim.rung)
        self._end(record, FAILED, reason=f"the {MOST_OWNERS} workers that trained it have ended")

    def _is_spent(self) -> bool:
        budget = self._files.budget
        is_spent = budget is not None and self._files.hours >= budget and self._is_left()
        self._spent = budget if is_spent else None
        if self._spent is not None:
            print(f"search.budget={self._spent:g} GPU-hours are spent: no trial begins", flush=True)
        return self._spent is not None

    def _is_left(self) -> bool:
        taken = {claim.trial for claim in self._files.claims()}
        promoted = promotable(self._files.records(), len(self._rungs))
        return not taken.issuperset(range(self._files.target)) or any(promoted)

    def _promoted(self) -> Claim | None:
        for trial, rung in promotable(self._files.records(), len(self._rungs)):
            if claim := self._files.claim(trial, rung, 0, self.run.id):
                return claim
        return None

    def _new(self) -> Claim | None:
        taken = {claim.trial for claim in self._files.claims()}
        for trial in range(self._files.target):
            if trial not in taken and (claim := self._files.claim(trial, 0, 0, self.run.id)):
                return claim
        return None

    def _begin(self, claim: Claim) -> TrialRecord:
        """Return the record of a claimed trial: what is drawn for it, and its run; ended if it needs none."""
        record = self._files.record(claim.trial, claim.rung)
        begun = record is not None
        if record is None:
            record = TrialRecord(claim.trial, claim.rung)
            if claim.rung:
                below = self._files.record(claim.trial, claim.rung - 1)
                assert below is not None
                record.values = below.values
            else:
                record.number, drawn = self._study.draw(claim.trial)
                space = self.config.search.space
                record.values = {name: text_of(drawn[name], space[name]) for name in space}
        record.worker = self.run.id
        record.run = TRAIN.run_id(self._trial_config(record))
        self._files.write(record)
        other = existing_end(record, begun, self._store, self._files)
        if other is None and record.pruned_at is None and self._report_earlier(record):
            # Meanwhile another worker may have begun the same run.
            other = existing_end(record, begun, self._store, self._files)
        if other:
            self._end(record, other.state, other.top1, other.reason, other.epochs, reused=not begun)
        elif record.pruned_at is not None:
            self._prune(record, begun)
        return record

    def _report_earlier(self, record: TrialRecord) -> bool:
        """Report the validations of a run up to one that prunes it; return whether there are any.

        The run may have been trained for another search, or by itself. Optuna compares the first accuracy
        that is reported at all rungs up to its epoch, so all are reported.
        """
        epochs = self._trial_config(record).recipe.epochs
        found = earlier_validations(self._store.run(record.run), record.epochs or 0)
        for epoch, top1 in found:
            if self._judge(record, epochs, epoch, top1):
                break
        if found:
            self._files.write(record)
        return bool(found)

    def _prune(self, record: TrialRecord, begun: bool) -> None:
        """End a trial that is pruned, and its run, unless that has ended or is of another search."""
        run, top1, epochs = self._store.run(record.run), record.top1, record.pruned_at
        attempt = run.attempt
        reason = self._pruning(epochs, self._trial_config(record))
        if attempt and attempt.outcome is None and is_of_study(attempt, self._files):
            attempt.end(PRUNED, reason, {"top1": top1, "epochs": epochs}, ended=last_seen(attempt))
            lease.revoke(run.folder, attempt.number)  # behind a network failure its worker may still train
        self._end(record, PRUNED, top1, reason, epochs, reused=not begun)

    def _judge(self, record: TrialRecord, epochs: int, epoch: int, top1: float) -> bool:
        """Note a validation after an epoch of so many; return whether the trial is pruned there."""
        record.top1, record.epochs, record.accuracies[str(epoch)] = top1, epoch, top1
        last = epoch >= epochs or len(self._rungs) > 1
        pruned = not last and self._study.report(_number(record), epoch, top1)
        # The study gives this answer once, and the worker may be stopped before the trial has ended.
        record.pruned_at = epoch if pruned else None
        return pruned

    def _pruning(self, epochs: int | None, config: Config) -> str:
        return f"after epoch {epochs} of {config.recipe.epochs}, by the search {self._files.name}"

    # One trial. Every rank.

    def _trial_config(self, record: TrialRecord) -> Config:
        values = dict(record.values)
        if len(self._rungs) > 1:
            values["recipe.epochs"] = str(self._rungs[record.rung])
        return trial_config(self.config, values)

    def _train(self, record: TrialRecord, index: int) -> None:
        config = self._trial_config(record)
        trial, rank_zero = self._store.run(record.run), self.dist_env.is_rank_zero
        trial.follows = index > 0
        began, before = time.monotonic(), record.hours

        def judge(epoch: int, top1: float) -> bool:
            self._check_leases(trial)
            record.hours = before + self._hours(began)
            pruned = self._judge(record, config.recipe.epochs, epoch, top1)
            self._files.write(record)
            return pruned

        if rank_zero:
            attempt = self._start(trial, config, record)
            trial.judge = judge
        else:
            attempt = self._wait_for_attempt(trial)
            trial.judge = lambda epoch, top1: False
        job = str(self._attempt.submitted.get("job_id") or "search").replace("/", "-")
        place = replace(self.dist_env, port=10_000 + (self.dist_env.port + _PORTS * (index + 1)) % 20_000)
        place = place if self.dist_env.size > 1 else self.dist_env
        try:
            with output_to(attempt.folder / f"{job}_{self.dist_env.rank}_log"):
                outcome, expected = run_trial(config, trial, attempt, place)
        except BaseException:
            if rank_zero:
                record.hours = before + self._hours(began)
                self._keep(record, trial)
            raise
        if rank_zero:
            record.hours = before + self._hours(began)
            self._finish(trial, attempt, config, record, outcome)
        elif outcome.state == FAILED:
            attempt.end(FAILED, outcome.reason)  # rank 0 may not have failed; it waits for this one in vain
        if outcome.state == FINISHED:
            return
        # On Slurm a new start, after whatever a trial may have left behind, needs no retry.
        if self.dist_env.size > 1 or (not expected and slurm.this_job()) or has_lost_gpu():
            raise PeerLost(f"trial {record.trial} failed, so the next one needs a new start of this worker")

    def _keep(self, record: TrialRecord, trial: Run) -> None:
        """Write a trial that goes on in another start, unless that start has it already."""
        with contextlib.suppress(OSError, Superseded):  # the first error counts
            self._check_leases(trial)
            self._files.write(record)

    def _check_leases(self, trial: Run) -> None:
        for held in filter(None, (self.run.lease, trial.lease)):
            held.check()

    def _hours(self, began: float) -> float:
        return (time.monotonic() - began) * self.dist_env.size / 3600

    def _start(self, trial: Run, config: Config, record: TrialRecord) -> Attempt:
        """Create the trial's run, or go on with it, and take its lease."""
        info = {"stage": "train", "label": TRAIN.label(config), "model": config.model.name, "needs": []}
        self._store.create(trial.id, asdict(config), info)
        trial.join_sweep(str(config.sweep))
        weights, initial = self.run.folder / INITIAL, trial.folder / INITIAL
        if config.model.weights_run and weights.exists() and not initial.exists():
            link_or_copy(weights, initial)
        attempt, own = trial.attempt, self._attempt
        if attempt is None or attempt.outcome or attempt.submitted.get("worker") != self.run.id:
            if attempt and not attempt.outcome:
                reason = f"its worker has ended; {self.run.id} goes on with it"
                attempt.end(CANCELLED, reason, ended=last_seen(attempt))
            attempt = trial.new_attempt()
        submitted = own.submitted
        kept = {key: submitted[key] for key in ("job_id", "host", "code") if key in submitted}
        about = {"worker": self.run.id, "study": self._files.name, "logs": str(attempt.folder)}
        attempt.submit(EXECUTOR, **about, **kept)
        trial.lease = lease.acquire(trial.folder, attempt.number)
        job = {key: own.started[key] for key in ("nodes", "step", "requested") if key in own.started}
        attempt.start(world_size=self.dist_env.size, **job)
        values = " ".join(f"{name}={text}" for name, text in record.values.items())
        print(f"trial {record.trial}: {values} → {trial.id}", flush=True)
        return attempt

    def _wait_for_attempt(self, trial: Run) -> Attempt:
        while True:
            attempt = trial.attempt
            if attempt and attempt.submitted.get("worker") == self.run.id and not attempt.outcome:
                return attempt
            time.sleep(_POLL)

    def _finish(
        self, trial: Run, attempt: Attempt, config: Config, record: TrialRecord, outcome: Outcome
    ) -> None:
        """Write the end of a trial into its run, the study and its record."""
        result, state, reason = outcome.result, outcome.state, outcome.reason
        if result is not None and result["epochs"] < config.recipe.epochs:
            state = PRUNED
            for key in ("learned", "advice"):  # of a whole schedule
                result.pop(key, None)
            reason = self._pruning(result["epochs"], config)
        if result is not None and trial.lease:
            trial.lease.check()
        attempt.end(state, reason, result)
        if kept := attempt.outcome:  # the first outcome is kept: perhaps the trial was cancelled
            state, reason = kept.state, kept.reason
        top1 = result["top1"] if result else None
        epochs = result["epochs"] if result else record.epochs
        self._end(record, state if state in (FINISHED, PRUNED) else FAILED, top1, reason, epochs)

    def _end(
        self,
        record: TrialRecord,
        state: str,
        top1: float | None = None,
        reason: str = "",
        epochs: int | None = None,
        reused: bool = False,
    ) -> None:
        if record.number is not None:  # first the study, so that a worker killed in between repeats this
            self._study.end(record.number, top1 if state in (FINISHED, PRUNED) else None, state == PRUNED)
        record.state, record.reason, record.reused = state, reason, reused
        record.top1, record.epochs = top1 if top1 is not None else record.top1, epochs
        self._files.write(record)
        accuracy = "" if top1 is None else f", top-1 {100 * top1:.1f} %"
        print(f"trial {record.trial} {state}{': ' if reason else ''}{reason}{accuracy}", flush=True)
        if importance := self._study.importance():
            self._files.write_importance(importance)

    def _report_progress(self, claim: Claim | None) -> None:
        records = self._files.records()
        ended = sum(each.ended and each.rung == 0 for each in records)
        top, note = best(records), "" if claim is None else f"trial {claim.trial}"
        self._progress(ended, self._files.target, "trials", note, top.top1 if top else None)

    def _result(self) -> dict[str, Any]:
        records = self._files.records()
        failed, top = [each for each in records if each.state == FAILED], best(records)
        if failed and len(failed) == len(records):
            raise UserError(
                f"all {len(failed)} trials of the search {self._files.name} failed; the last one: "
                f"{failed[-1].reason}"
            )
        found: dict[str, Any] = {"trials": self._count, "study": self._files.name}
        if self._spent is not None:
            found["budget"] = self._spent
        return found if top is None else {**found, "top1": top.top1, "trial": top.run}


def _number(record: TrialRecord) -> int:
    assert record.number is not None
    return record.number
