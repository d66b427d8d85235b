"""price=true on a real Slurm: the price job, the expected start, the copy on a node, and a refused limit."""

from __future__ import annotations

import json

from lab import NODES, LabDoor


def test_a_price_on_slurm(site: LabDoor) -> None:
    words = ("datastore.name=digits", "model=shufflenet_v2_x0_5", "recipe=demo", "recipe.epochs=3")
    printed = site(*words, "price=true").stdout
    (row,) = [row for row in site.jobs() if row["stage"] == "price"]
    assert (row["executor"], row["state"]) == ("slurm", "finished")
    assert row["nodes"] in NODES
    (header,) = [line for line in printed.splitlines() if line.startswith("run ")]
    assert header.split() == ["run", "time", "CPU-h", "starts", "bound", "start", "timed", "by"]
    (line,) = [line for line in printed.splitlines() if f" {row['id']}" in line and ":" in line]
    assert len(line) <= 80
    assert line.split()[3] == "1"
    assert line.split()[5].count(":") == 1  # today
    assert f"a staged copy is on {row['nodes']} already" in printed
    assert not [each for each in site.jobs() if each["stage"] == "train"]

    (path,) = site.workspace.glob("runs/.times-*/*")
    record = json.loads(path.read_text())
    record["train"]["16"]["batch"]["wall"] = 60  # 22 minutes an epoch
    path.write_text(json.dumps(record))
    limit = ("cluster.time=10", "cluster.max_requeues=2")
    line = site.refused(*words, *limit)
    assert "cluster.time=10 is too short" in line
    enough = int(line.rpartition("cluster.time=")[2])
    assert 22 < enough < 60
    site(*words, f"cluster.time={enough}", "cluster.max_requeues=2", "dry_run=true")
