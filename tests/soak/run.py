"""Kill, stop and freeze every stage at random moments, and check what is left: `make soak`.

One round takes one scenario: it is begun, disturbed some times, checked after each, then run to its
end and compared with an undisturbed run. Round N of a seed is always the same scenario with the same moments,
as shares of the duration of an undisturbed run. `--state FILE` keeps the counts, so that a soak that was
ended goes on with the next round; `--round N` repeats one round.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[1]
# As pytest does for the files whose pieces are used here.
sys.path[:0] = [
    str(_TESTS / name) for name in ("soak", "", "slurm", "stages", "training", "datastore/backends")
]

import psutil  # noqa: E402
import servers  # noqa: E402
from command_line import is_alive  # noqa: E402
from forked import CONTEXT  # noqa: E402
from lab_scenarios import LabDownload, LabTrain, is_possible  # noqa: E402
from queue_scenarios import CancelRetry, Queue  # noqa: E402
from scenarios import Scenario, stage_scenarios  # noqa: E402
from session_scenario import Session  # noqa: E402

SIGNALS = ("kill", "terminate", "freeze")
TURNS = 4  # of most scenarios, until all have had theirs
LIMIT = 600  # s after which an undisturbed run counts as hanging
TRIES = 6  # to kill before the end
COLUMNS = ("rounds", "kills", "survived", "lost")


class Soak:
    """Rounds over scenarios, and their counts.

    Args:
        scenarios: in the order of the rounds.
        seed: decides every round.
        state: file of the counts.
        stack: ends the servers of the scenarios.
    """

    def __init__(
        self, scenarios: list[Scenario], seed: int, state: Path, stack: contextlib.ExitStack
    ) -> None:
        self.seed, self._path, self._stack = seed, state, stack
        self.durations: dict[str, float] = {}
        self.expected: dict[str, Any] = {}
        self.turns = [each for turn in range(TURNS) for each in scenarios if turn < each.turns]
        self.next = 0
        self.counts = {scenario.name: dict.fromkeys(COLUMNS, 0) for scenario in scenarios}
        self.failures: list[str] = []
        self.stopped = False
        if state.exists():
            kept = json.loads(state.read_text())
            if kept["seed"] == seed:
                self.next, self.failures = kept["next"], kept["failures"]
                self.counts |= kept["counts"]

    @property
    def kills(self) -> int:
        """Number of processes that were really killed or stopped."""
        return sum(count["kills"] for count in self.counts.values())

    def round(self, number: int) -> str:
        """Play one round, count it, and return the name of its scenario."""
        scenario = self.turns[number % len(self.turns)]
        count = self.counts.setdefault(scenario.name, dict.fromkeys(COLUMNS, 0))
        try:
            if scenario.name not in self.expected:
                scenario.prepare(self._stack)
                scenario.reset()
                begin = time.monotonic()
                self.run_to_end(scenario)
                self.durations[scenario.name] = time.monotonic() - begin
                self.expected[scenario.name] = scenario.result()
            draw = random.Random(f"{self.seed} {number}")
            scenario.reset()
            for _ in range(draw.randint(1, scenario.disturbances)):
                for _ in range(TRIES):
                    hit = self._disturb(scenario, draw)
                    scenario.check()
                    if hit:
                        count["kills"] += 1
                        break
                    # It ended before: begin anew, and sooner from now on.
                    self.durations[scenario.name] *= 0.7
                    scenario.reset()
            begin = time.monotonic()
            self.run_to_end(scenario)
            ended = time.monotonic() - begin
            self.durations[scenario.name] = max(self.durations[scenario.name], 0.5 * ended)
            found, expected = scenario.result(), self.expected[scenario.name]
            if found != expected:
                raise AssertionError(
                    f"the end state differs from an undisturbed one: {difference(found, expected)}"
                )
            count["survived"] += 1
        except Exception as error:
            if self.stopped:  # a command in this process took the exit for its own
                sys.exit(1)
            count["lost"] += 1
            reason = f"round {number} of seed {self.seed}, {scenario.name}: {type(error).__name__}: {error}"
            self.failures.append(reason[:500])
            print(reason[:500], flush=True)
            traceback.print_exc()
        count["rounds"] += 1
        self.next = number + 1
        return scenario.name

    def run_to_end(self, scenario: Scenario) -> None:
        """Run a scenario without a disturbance."""
        child = start(scenario)
        _await_end(child)
        if child.exitcode:
            lines = scenario.errors.read_text(errors="replace").strip().splitlines()
            raise ChildProcessError(f"an undisturbed run ended with {child.exitcode}: {lines[-1:]}")

    def _disturb(self, scenario: Scenario, draw: random.Random) -> bool:
        """Start the work and disturb it once; return whether a process was killed or stopped."""
        kind, share = draw.choice(scenario.kinds), draw.random()
        child = start(scenario)
        child.join(share * self.durations[scenario.name])
        if kind not in SIGNALS:
            hit = scenario.disturb(kind, draw)
            _await_end(child)
            return hit
        below = [] if scenario.survives else children(child)
        victim = draw.choice(scenario.victims(child.pid or 0)) if child.is_alive() else 0
        if kind == "freeze" and victim:
            _send(victim, signal.SIGSTOP)
            time.sleep(0.2)
            _send(victim, signal.SIGCONT)
            child.join(draw.random() * 0.3 * self.durations[scenario.name])
        hit = child.is_alive() and bool(victim)
        if victim not in (0, child.pid):  # a worker or a job; the command goes on without it
            hit = _send(victim, signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
            _await_end(child)
            return hit
        if kind == "terminate":
            child.terminate()
            child.join(60)
        child.kill()
        child.join()
        deadline = time.monotonic() + 60
        while left := [each for each in below if is_alive(each)]:
            if time.monotonic() > deadline:
                raise AssertionError(f"processes are left: {left}")
            time.sleep(0.05)
        return hit and child.exitcode != 0

    def stop(self) -> None:
        """End without counting the round, and end the servers."""
        self.stopped = True
        sys.exit(1)

    def save(self) -> None:
        """Write the state file."""
        kept = {"seed": self.seed, "next": self.next, "counts": self.counts, "failures": self.failures}
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(kept, indent=1))
        new.replace(self._path)

    def table(self) -> str:
        """Return one line per scenario."""
        lines = [f"{'scenario':16}" + "".join(f"{name:>10}" for name in COLUMNS)]
        lines += [
            f"{name:16}" + "".join(f"{count[key]:10}" for key in COLUMNS)
            for name, count in self.counts.items()
        ]
        sums = [sum(count[key] for count in self.counts.values()) for key in COLUMNS]
        return "\n".join([*lines, f"{'all':16}" + "".join(f"{value:10}" for value in sums), *self.failures])


def difference(found: Any, expected: Any) -> str:
    """Describe in what two end states differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        parts = [
            f"{key}: {'differs' if key in expected else 'is new'}"
            for key in found
            if found[key] != expected.get(key)
        ]
        return ", ".join([*parts, *(f"{key}: is missing" for key in expected.keys() - found.keys())])
    if isinstance(found, tuple) and isinstance(expected, tuple):
        return "; ".join(
            difference(*pair) for pair in zip(found, expected, strict=True) if pair[0] != pair[1]
        )
    return f"{found!r:.200} instead of {expected!r:.200}"


def start(scenario: Scenario, context: Any = CONTEXT) -> BaseProcess:
    """Start the work of a scenario in a process of its own, of this context of multiprocessing."""
    began = context.Event()
    child: BaseProcess = context.Process(target=_work, args=(scenario, began))
    scenario.folder.mkdir(parents=True, exist_ok=True)
    child.start()
    if not began.wait(120):
        raise TimeoutError("the process did not start")
    return child


def _work(scenario: Scenario, began: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(scenario.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    began.set()
    scenario.work()


def _await_end(child: BaseProcess) -> None:
    """Wait for the end of a command; one that waits for ever is a lost round."""
    child.join(LIMIT)
    if child.is_alive():
        child.kill()
        raise TimeoutError(f"no end within {LIMIT} s")


def _send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return whether the process existed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def children(child: BaseProcess) -> list[int]:
    """Return the processes that a process has started."""
    with contextlib.suppress(psutil.Error):
        return [each.pid for each in psutil.Process(child.pid).children(recursive=True)]
    return []


def main() -> int:
    """Play rounds until the kills or the minutes are reached, and print the table."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="end after so many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="decides every round (default 0)")
    parser.add_argument("--minutes", type=float, default=60, help="end after so long (default 60)")
    parser.add_argument("--state", type=Path, default=Path("soak.json"), help="file of the counts")
    parser.add_argument("--round", type=int, help="repeat one round, without counting it")
    parser.add_argument("--only", default="", help="only scenarios whose names begin like this")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True))
        )
        scenarios = [
            scenario
            for scenario in (
                *stage_scenarios(folder, *_servers(stack, folder)),
                Queue("queue", folder / "queue"),
                CancelRetry("cancel-retry", folder / "cancel"),
                *([Session("session", folder / "session")] if importlib.util.find_spec("jupyterlab") else []),
                *([LabDownload("lab-download", folder / "lab")] if is_possible() else []),
                *([LabTrain("lab-train", folder / "labtrain")] if is_possible() else []),
            )
            if scenario.name.startswith(options.only)
        ]
        soak = Soak(scenarios, options.seed, options.state, stack)
        signal.signal(signal.SIGTERM, lambda *_: soak.stop())
        if options.round is not None:
            soak.round(options.round)
            print(soak.table())
            return 1 if soak.failures else 0
        while soak.kills < options.kills and time.monotonic() < deadline:
            began, kills = time.monotonic(), soak.kills
            name = soak.round(soak.next)
            soak.save()
            line = f"round {soak.next - 1:4}  {name:16} {soak.kills - kills:3} kills"
            print(f"{line} {time.monotonic() - began:6.1f} s, {soak.kills} kills in all", flush=True)
        print(f"{soak.kills} kills, seed {soak.seed}, {soak.next} rounds\n{soak.table()}")
        return 1 if soak.failures else 0


def _servers(stack: contextlib.ExitStack, folder: Path) -> tuple[str, str]:
    """Start S3 and sshd where they are installed; return the URL of a bucket and a host with a folder."""
    s3 = ssh = ""
    if servers.RCLONE:
        (folder / "rclone" / "bucket").mkdir(parents=True)
        endpoint = stack.enter_context(servers.rclone(folder / "rclone"))
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": servers.KEY,
            "AWS_SECRET_ACCESS_KEY": servers.SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        s3 = "s3://bucket"
    if servers.SSHD:
        (folder / "sshd").mkdir()
        os.environ["RSYNC_RSH"] = stack.enter_context(servers.sshd(folder / "sshd"))
        ssh = f"there:{folder}/remote"
    return s3, ssh


if __name__ == "__main__":
    sys.exit(main())
