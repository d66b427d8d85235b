"""The file `md5sums` beside archives: what of it is refused, and what only warned about."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from faulty_server import Faults, faulty, serving
from run_stage import FILES, config_of, run_stage, stage_error

from hpc_imagenet.errors import UserError
from hpc_imagenet.stages.download_stage import DOWNLOAD
from hpc_imagenet.stages.work import download


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "<?xml version='1.0'?>",
            "line 1 of its md5sums, \"<?xml version='1.0'?>\", is not a line of md5sum",
        ),
        (f"# sums\n{'0' * 64}  train.tar\n", "line 2 of its md5sums"),
        (f"{'0' * 32}  a.tar\n{'1' * 32}  a.tar\n", "has another MD5 of a.tar than before"),
        (f"{'0' * 32}  a.tar\n" * 30_000, "has more than 1048576 characters"),
    ],
)
def test_unreadable_md5sums_are_refused(tmp_path: Path, source: Path, text: str, problem: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "md5sums").write_text(text)
    assert problem in stage_error(download, config_of(tmp_path, copy))
    with serving(copy, faulty(Faults())) as url:
        assert problem in stage_error(download, config_of(tmp_path / "http", url))
    sums = {
        split: {"md5": hashlib.md5((copy / file).read_bytes()).hexdigest()} for split, file in FILES.items()
    }
    run_stage(download, config_of(tmp_path, copy, **sums))  # they are not needed


@pytest.mark.slow
def test_md5sums_that_is_a_folder_is_refused(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "md5sums").unlink()
    (copy / "md5sums").mkdir()
    assert "md5sums is not a file" in stage_error(download, config_of(tmp_path, copy))


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(statuses=[(403, {})], only="md5sums"), "status 403"),
        (Faults(html="typed", only="md5sums"), "an HTML page"),
    ],
)
def test_md5sums_that_a_server_refuses_are_named_in_a_warning(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], faults: Faults, reason: str
) -> None:
    with serving(source, faulty(faults)) as url:
        run_stage(download, config_of(tmp_path, url))
        line = f"warning: {url}/md5sums cannot be read ({reason}): archives are not compared with it"
    assert line in capsys.readouterr().out


def test_archives_are_not_those_of_another_revision(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "md5sums").unlink()
    with serving(copy) as url:
        for origin in (copy, url):
            config = config_of(tmp_path / str(len(str(origin))), origin)
            run_stage(download, config)
            config.dataset.revision = "v2"
            assert "without an MD5 it cannot be compared with" in stage_error(download, config)
            with pytest.raises(UserError, match=r"with that of .* with \{.revision.: .v2.\}; set"):
                DOWNLOAD.check_output(config)
