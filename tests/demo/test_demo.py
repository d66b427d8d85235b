from __future__ import annotations

from pathlib import Path

import pytest

from hpc_imagenet.demo.__main__ import report


@pytest.mark.slow
def test_report_is_of_the_stored_workspace_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPC_IMAGENET_WORKSPACE", raising=False)
    (tmp_path / "hpc_imagenet.yaml").write_text(
        f"workspace: {tmp_path}/w\ncluster.host: unreachable.invalid\n"
    )
    (tmp_path / "w").mkdir()
    assert report([]) == f"{tmp_path}/w/report.html"
    assert (tmp_path / "w/report.html").exists()
    assert f"no trainings in {tmp_path}/w/runs" in capsys.readouterr().out
    (tmp_path / "conf/cluster").mkdir(parents=True)
    (tmp_path / "conf/cluster/mine.yaml").write_text("defaults: [slurm, _self_]\n")
    (tmp_path / "v").mkdir()
    assert report(["workspace=v", "cluster=mine", "seed=1", "--config-dir", "conf"]) == "v/report.html"
    assert (tmp_path / "v/report.html").exists()
