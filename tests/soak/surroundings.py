"""Full, read-only, slow and stale file systems, cut networks, clocks that jump, as root.

    python -m tests.soak.surroundings [--kind KIND] [--rounds 3] [--seed 0] [--minutes 30]

It needs the packages e2fsprogs and strace, and a C compiler. One line per kind and scenario: rounds, how
often the disturbance had ended the first run (failed), rounds survived and lost.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.soak.run import Soak, start  # it puts the folders of the tests on the import path

from file_systems import fill, lock, make_stale, slow_down, undisturbed  # isort: skip
from queue_scenarios import Queue  # isort: skip
from relay import Relay  # isort: skip
from scenarios import Download, Fetch, Process, Scenario, Staging  # isort: skip
from scenarios import Train, Upload, stage_scenarios  # isort: skip

_JUMPS = (-400 * 86_400, -3600, -61, 61, 3600, 86_400, 400 * 86_400)  # s


def cut(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Cut all connections of a download at random moments; return whether it was ended by that."""
    assert isinstance(scenario, Download)
    expected, _ = undisturbed(soak, scenario)
    url, relay = scenario.url, Relay()
    relay.target_port = int(url.rpartition(":")[2])
    with relay.running():
        scenario.url = f"http://127.0.0.1:{relay.port}"
        scenario.reset()
        child, failed = start(scenario), False
        for _ in range(draw.randint(1, 3)):
            child.join(draw.random() * 0.5)
            relay.outage = draw.random() * 0.3
            relay.cut()
        child.join(600)
        failed = bool(child.exitcode)
        scenario.check()
        soak.run_to_end(scenario)
        result = scenario.result()
    scenario.url = url
    assert result == expected, "the end state differs"
    return failed


def jump(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Let the clock jump, kill the scenario, and go on with another clock; the times of files stay right."""
    expected, duration = undisturbed(soak, scenario)
    scenario.reset()
    offset = scenario.folder / "offset"
    _write_offset(offset, 0)
    with _faked_clock(offset):
        child = start(scenario, multiprocessing.get_context("spawn"))
        for _ in range(draw.randint(1, 3)):
            child.join(draw.random() * 0.5 * duration)
            _write_offset(offset, draw.choice(_JUMPS))
        killed = child.is_alive() and draw.random() < 0.5
        if killed:
            child.kill()
        child.join(600)
        assert killed or child.exitcode == 0, f"after a jump of the clock: {scenario.errors.read_text()}"
        scenario.check()
        _write_offset(offset, draw.choice(_JUMPS))
        child = start(scenario, multiprocessing.get_context("spawn"))
        child.join(600)
        assert child.exitcode == 0, f"with another clock: {scenario.errors.read_text()}"
    assert scenario.result() == expected, "the end state differs"
    return killed


def _write_offset(path: Path, seconds: int) -> None:
    new = path.with_suffix(".new")
    new.write_text(f"{seconds:+}")
    new.replace(path)


@contextlib.contextmanager
def _faked_clock(offset: Path) -> Iterator[None]:
    """Processes that are started have a clock of their own, `offset` s after that of the machine."""
    library = offset.with_name("clock.so")
    if not library.exists():
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    with mock.patch.dict(os.environ, {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}):
        yield


KINDS = {
    "full disk": (fill, (Download, Process, Upload, Fetch, Staging, Train)),
    "read-only": (lock, (Download, Process, Upload, Fetch, Staging, Train)),
    "slow disk": (slow_down, (Download, Process, Upload, Fetch, Staging, Train)),
    "stale": (make_stale, (Download, Process, Upload, Fetch, Staging, Train)),
    "cut network": (cut, (Download,)),
    "clock": (jump, (Download, Process, Upload, Fetch, Staging, Train, Queue)),
}


def main() -> int:
    """Play the rounds and print one line per kind and scenario."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each kind and scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kind", choices=KINDS, help="only this disturbance")
    parser.add_argument("--only", default="", help="only scenarios whose names begin like this")
    options = parser.parse_args()
    deadline, lost, lines = time.monotonic() + 60 * options.minutes, 0, []
    if os.geteuid():
        parser.error("mounting file systems needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays mounted
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True))
        )
        scenarios = [*stage_scenarios(folder, "", ""), Queue("queue", folder / "queue")]
        scenarios = [
            each for each in scenarios if each.name != "evaluate" and each.name.startswith(options.only)
        ]
        soak = Soak(scenarios, options.seed, folder / "state", stack)
        prepared: set[str] = set()
        for kind, (play, which) in KINDS.items():
            if options.kind not in (None, kind):
                continue
            for scenario in scenarios:
                counts = [0, 0, 0, 0]
                for number in range(options.rounds):
                    if not isinstance(scenario, which) or time.monotonic() > deadline:
                        break
                    if scenario.name not in prepared:
                        prepared.add(scenario.name)
                        scenario.prepare(stack)
                    counts[0] += 1
                    try:
                        counts[1] += play(soak, scenario, random.Random(f"{options.seed} {kind} {number}"))
                        counts[2] += 1
                    except Exception as error:
                        counts[3] += 1
                        print(f"{kind}, {scenario.name}, round {number}: {type(error).__name__}: {error}")
                        traceback.print_exc()
                lost += counts[3]
                if counts[0]:
                    lines.append(f"{kind:14}{scenario.name:16}" + "".join(f"{count:10}" for count in counts))
                    print(lines[-1], flush=True)
    print(
        f"{'disturbance':14}{'scenario':16}{'rounds':>10}{'failed':>10}{'survived':>10}{'lost':>10}",
        *lines,
        sep="\n",
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
