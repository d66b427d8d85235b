"""`show RUN --diff OTHER`: settings, code and results of two runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from command_line import Cli
from recorded_runs import change, create_run
from rich.console import Console

from hpc_imagenet.report.show.run_differences import compare_runs, render_comparison
from hpc_imagenet.runs.attempt import FAILED, FINISHED
from hpc_imagenet.runs.store import Run, RunStore

pytestmark = pytest.mark.slow

TRAINING = ("datastore.name=digits", "datastore.version=1", "+stage=train")


def ended(store: RunStore, commit: str, *overrides: str, state: str = FINISHED, **result: object) -> Run:
    run = create_run(store, *TRAINING, *overrides)
    attempt = run.new_attempt()
    attempt.submit("local", host="elsewhere", code={"version": "1.0", "commit": commit})
    attempt.start()
    attempt.end(state, "" if state == FINISHED else "it broke", result)
    return run


def test_differences_of_two_trainings(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    first = ended(store, "abc", "seed=1", top1=0.5, parameters=10)
    second = ended(store, "abc-dirty", "seed=2", "recipe.learning_rate=0.125", top1=0.75, parameters=10)
    found = json.loads(cli("show", first.id, "--diff", second.id, "--json").stdout)
    assert found["runs"] == [first.id, second.id]
    rate = str(first.frozen()["recipe"]["learning_rate"])
    assert found["settings"] == {"seed": ["1", "2"], "recipe.learning_rate": [rate, "0.125"]}
    assert found["code"]["same"] is False
    assert [state["commit"] for state in found["code"]["states"]] == ["abc", "abc-dirty"]
    assert found["results"]["top1"] == [0.5, 0.75]
    lines = cli("show", first.id, "--diff", second.id).stdout.splitlines()
    assert next(line.split() for line in lines if line.startswith("top1")) == ["top1", "0.5", "0.75", "+0.25"]
    assert next(line.split() for line in lines if line.startswith("parameters")) == ["parameters", "10", "10"]


def test_equal_settings_and_unknown_code(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    first, second = ended(store, "abc", "seed=1"), ended(store, "abc", "seed=2", state=FAILED)
    assert second.attempt
    change(second.attempt.folder / "submitted.json", code=None)
    (second.folder / "config.yaml").write_bytes((first.folder / "config.yaml").read_bytes())
    shown = cli("show", first.id, "--diff", second.id).stdout
    assert "none differs" in shown
    assert "unknown" in shown
    assert "it broke" in shown


def test_comparison_fits_80_columns_and_escapes_values(cli: Cli, tmp_path: Path) -> None:
    store = RunStore(cli.workspace)
    first, second = ended(store, "a", "seed=1"), ended(store, "b", "seed=2")
    text = (second.folder / "config.yaml").read_text()
    hostile = f"name: '\\e[31m[bold]{'x' * 300}'\nmodel:\n  source:\n    net.py: |\n      a = 1\n"
    (second.folder / "config.yaml").write_text(text.replace("model:\n", "old:\n") + hostile)
    out = io.StringIO()
    Console(file=out, width=80).print(render_comparison(compare_runs(first, second)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out.getvalue()
    assert "[bold]" in "".join(out.getvalue().split())
    assert "1 lines" in out.getvalue()


def test_difference_to_the_commit_is_compared_by_content(cli: Cli, tmp_path: Path) -> None:
    store = RunStore(cli.workspace)
    runs = [ended(store, "abc", f"seed={seed}") for seed in (1, 2)]
    for run, content in zip(runs, ("same", "same"), strict=True):
        patch = tmp_path / f"{run.id}.patch"
        patch.write_text(content)
        assert run.attempt
        change(run.attempt.folder / "submitted.json", code={"commit": "abc", "difference": str(patch)})
    assert compare_runs(*runs)["code"]["same"]
    (tmp_path / f"{runs[0].id}.patch").write_text("other")
    assert not compare_runs(*runs)["code"]["same"]


def test_a_damaged_config_is_refused_in_one_line(cli: Cli) -> None:
    store = RunStore(cli.workspace)
    first, second = ended(store, "a", "seed=1"), ended(store, "b", "seed=2")
    (second.folder / "config.yaml").write_text("a: [")
    assert f"{second.id}: its config.yaml is missing or damaged" in cli.refused(
        "show", first.id, "--diff", second.id
    )
    assert "no run nothing" in cli.refused("show", first.id, "--diff", "nothing")
