"""The folder of a start: what killed ones have left is swept, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpc_imagenet.session.place import Place, private, sweep

HOLD = "import sys; from pathlib import Path; from hpc_imagenet.session.place import Place; "
HOLD += "print(Place(Path(sys.argv[1])).folder, flush=True); input()"


def test_a_killed_start_is_swept_by_the_next_one_and_a_living_one_is_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        (folder / "runtime").mkdir()
        (folder / "runtime/key").write_text("a secret")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert sweep(tmp_path) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = Place(tmp_path)
    assert list(tmp_path.iterdir()) == [again.folder]
    again.close()
    assert not list(tmp_path.iterdir())


def test_links_files_and_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "hpc_imagenet-session-link").symlink_to(kept)
    (tmp_path / "hpc_imagenet-session-file").touch()
    (tmp_path / "hpc_imagenet-other").mkdir()
    if os.geteuid() == 0:
        (tmp_path / "hpc_imagenet-session-theirs").mkdir()
        os.chown(tmp_path / "hpc_imagenet-session-theirs", 65534, 65534)
    before = sorted(tmp_path.rglob("*"))
    assert sweep(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_many_that_start_at_once_each_keep_their_own(tmp_path: Path) -> None:
    places: list[Place] = []

    def start() -> None:
        for _ in range(10):
            places.append(Place(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tmp_path.iterdir()) == sorted(place.folder for place in places)
    for place in places:
        place.close()
    assert not list(tmp_path.iterdir())


SHARED = "30 29 254:0 / / rw - ext4 /dev/vda rw\n31 30 254:0 /tmp /tmp rw - ext4 /dev/vda rw\n"
OWN = "32 31 254:0 /scratch/jobs/n4/1234/.1234 /tmp rw,relatime - ext4 /dev/vda rw\n"


@pytest.mark.parametrize(
    ("mounts", "job", "told"), [(SHARED, "1234", False), (SHARED + OWN, "1234", True), (OWN, "123", False)]
)
def test_a_job_with_a_tmp_of_its_own(tmp_path: Path, mounts: str, job: str, told: bool) -> None:
    """As job_container/tmpfs of Slurm 22.05 mounts it."""
    (tmp_path / "mountinfo").write_text(mounts)
    assert private(job, mounts=tmp_path / "mountinfo") is told
