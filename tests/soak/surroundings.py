"""Full disks, read-only file systems and cut networks: `python -m tests.soak.surroundings`, as root.

A scenario writes to a small file system of its own (tmpfs). It must leave nothing that looks whole; when
there is space, or the file system is writable again, a rerun must end like an undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.soak.run import Soak, start  # it puts the folders of the tests on the import path

from relay import Relay  # isort: skip
from scenarios import Download, Fetch, Process, Scenario, Staging  # isort: skip
from scenarios import Train, Upload, stage_scenarios  # isort: skip

PLENTY = 512 << 20  # bytes


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of `size` bytes."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "soak", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=False)


def remount(place: Path, options: str) -> bool:
    """Change the options of a mount; False if it is busy, as with a file open for writing."""
    return (
        subprocess.run(
            ["mount", "-o", f"remount,{options}", place], capture_output=True, check=False
        ).returncode
        == 0
    )


def place_of(scenario: Scenario) -> Path:
    """Return the folder that a scenario writes."""
    if isinstance(scenario, Process):
        return Path(scenario.config.workspace) / "datasets"
    if isinstance(scenario, Upload):
        return Path(scenario.url)
    return scenario.state


def used_bytes(place: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in place.rglob("*") if path.is_file())


def fill(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Give the scenario a part of the space that it needs, then all; return whether it failed first."""
    scenario.reset()
    soak._run_to_end(scenario)
    expected, needed = scenario.result(), used_bytes(place_of(scenario))
    scenario.reset()
    place = place_of(scenario)
    with mounted(place, max(1 << 14, int(needed * draw.uniform(0.05, 0.95)))):
        child = start(scenario)
        child.join(600)
        failed = bool(child.exitcode)
        scenario.check()
        assert remount(place, f"size={PLENTY}"), "the file system could not be made larger"
        soak._run_to_end(scenario)
        assert scenario.result() == expected, "the end state differs"
    return failed


def lock(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Make the file system read-only at a random moment; return whether the scenario failed by that."""
    scenario.reset()
    begin = time.monotonic()
    soak._run_to_end(scenario)
    duration, expected = time.monotonic() - begin, scenario.result()
    scenario.reset()
    place = place_of(scenario)
    with mounted(place, PLENTY):
        child = start(scenario)
        child.join(draw.random() * duration)
        for _ in range(2000):  # it is refused while a file is open for writing
            if remount(place, "ro") or not child.is_alive():
                break
            time.sleep(0.001)
        child.join(600)
        failed = bool(child.exitcode)
        assert remount(place, "rw")
        scenario.check()
        soak._run_to_end(scenario)
        assert scenario.result() == expected, "the end state differs"
    return failed


def cut(soak: Soak, scenario: Scenario, draw: random.Random) -> bool:
    """Cut all connections of a download at random moments; return whether it was ended by that."""
    assert isinstance(scenario, Download)
    scenario.reset()
    soak._run_to_end(scenario)
    expected, url = scenario.result(), scenario.url
    relay = Relay()
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
        soak._run_to_end(scenario)
        result = scenario.result()
    scenario.url = url
    assert result == expected, "the end state differs"
    return failed


KINDS = {
    "full disk": (fill, (Download, Process, Upload, Fetch, Staging, Train)),
    "read-only": (lock, (Download, Process, Upload, Fetch)),
    "cut network": (cut, (Download,)),
}


def main() -> int:
    """Play the rounds and print one line per kind and scenario."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind and scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kind", choices=KINDS, help="only this disturbance")
    options = parser.parse_args()
    deadline, lost, lines = time.monotonic() + 60 * options.minutes, 0, []
    if os.geteuid():
        parser.error("mounting file systems needs root")
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True))
        )
        scenarios = [each for each in stage_scenarios(folder, "", "") if each.name != "evaluate"]
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
