"""A limit of submitted jobs in the middle of a submission: what fits is sent, the rest waits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import Cli
from fake_slurm import scripts, write_command, write_slurm

from hpc_imagenet.cluster import slurm
from hpc_imagenet.config.schema import Cluster
from hpc_imagenet.launch import watched_runs
from hpc_imagenet.launch.retries.retry_plan import plan_retry, send_retry
from hpc_imagenet.launch.slurm_jobs.submit_limit import describe_limit, largest_accepted, limit_in
from hpc_imagenet.runs.store import RunStore

# sbatch counts tasks as Slurm does: an array that does not fit is refused as a whole.
SBATCH = """
test "$1" = --help && exit 0
script=$1; test "$1" = --test-only && script=/dev/stdin
text=$(cat $script)
tasks=$(echo "$text" | sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p'); tasks=$((${tasks:-0} + 1))
used=$(cat $here/used 2>/dev/null || echo 0)
if [ $((used + tasks)) -gt $(cat $here/limit) ] && ! { test "$1" = --test-only && test -f $here/blind; }; then
  echo "$1" >> $here/refused
  echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2
  echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)' >&2
  exit 1
fi
test "$1" = --test-only && exit 0
echo $((used + tasks)) > $here/used
n=$(ls $here | grep -c script); cp "$1" $here/script.$((n + 1)); echo Submitted batch job $((n + 1))
for i in $(seq 0 $((tasks - 1))); do
  test $tasks = 1 && id=$((n + 1)) || id=$((n + 1))_$i
  echo "$id|PENDING|0|0|Priority" >> $here/queue
done
"""
SWEEP = ("-m", "+stage=download", "dataset=digits", "cluster=slurm", "cluster.qos=few")
NAMES = "dataset.name=" + ",".join("abcdefghij")


@pytest.fixture
def limited(cluster: Cli, commands: Path) -> Cli:
    """A Slurm that takes four jobs."""
    write_command(commands, "sbatch", SBATCH)
    write_command(commands, "sacctmgr", "echo 4")
    (commands / "limit").write_text("4")
    return cluster


def raise_limit(commands: Path, limit: int) -> None:
    """Let the user have more jobs, as when others have ended."""
    (commands / "limit").write_text(str(limit))


def sizes(commands: Path) -> list[int]:
    """Return the number of tasks of each submitted job."""
    found = [re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE) for text in scripts(commands)]
    return [int(each[1]) + 1 if each else 1 for each in found]


@pytest.mark.slow
def test_sweep_beyond_the_limit_is_sent_in_parts_and_nothing_twice(limited: Cli, commands: Path) -> None:
    done = limited(*SWEEP, NAMES)
    assert sizes(commands) == [4]
    assert len(re.findall("^waiting ", done.stdout, re.MULTILINE)) == 6
    sweep = limited.jobs()[0]["sweeps"][0]
    line = (
        "6 of 10 runs wait: limit of 4 submitted jobs (QOSMaxSubmitJobPerUserLimit): when jobs have ended, "
    )
    assert f"{line}python -m hpc_imagenet retry --sweep {sweep} submits more\n" in done.stdout
    reasons = [(row["state"], row["reason"]) for row in limited.jobs()]
    assert reasons[4:] == [("queued", "waiting: limit of 4 submitted jobs (QOSMaxSubmitJobPerUserLimit)")] * 6
    # No pickles of what was refused are left behind.
    assert len(list(limited.workspace.rglob("*.pkl"))) == 4
    raise_limit(commands, 7)
    assert limited("retry", "--sweep", sweep).stdout.count("submitted  ") == 3
    assert sizes(commands) == [4, 3]
    # The same command again sends more, too.
    raise_limit(commands, 100)
    done = limited(*SWEEP, NAMES)
    assert done.stdout.count("already running") == 7
    assert "wait" not in done.stdout
    assert sizes(commands) == [4, 3, 3]
    assert {row["attempt"] for row in limited.jobs()} == {1}
    jobs = [row["job_id"] for row in limited.jobs()]
    assert len(set(jobs)) == 10


@pytest.mark.slow
def test_jobs_that_need_a_waiting_run_wait_too(limited: Cli, commands: Path) -> None:
    raise_limit(commands, 2)
    words = ("+stage=pipeline", "dataset=digits", "cluster=slurm", "cluster.qos=few")
    done = limited(*words)
    assert "2 of 4 runs wait" in done.stdout
    assert "this command again submits more" in done.stdout
    rows = limited.jobs()
    assert rows[3]["reason"] == f"waiting: needs {rows[2]['run']}, which waits"
    raise_limit(commands, 9)
    limited("retry", rows[3]["run"])
    assert "#SBATCH --dependency=afterok:2\n" in scripts(commands)[2]
    assert "#SBATCH --dependency=afterok:3\n" in scripts(commands)[3]
    assert limited(*words).stdout.count("already running") == 4
    assert len(scripts(commands)) == 4


@pytest.mark.slow
def test_waiting_run_can_be_cancelled(limited: Cli, commands: Path) -> None:
    raise_limit(commands, 0)
    limited("+stage=download", "dataset=digits", "cluster=slurm")
    (row,) = limited.jobs()
    reason, advice = limited("logs", row["run"], "-f").stderr.splitlines()
    assert reason.startswith(f"{row['run']} · queued · waiting: limit of 4")
    assert advice == f"retry {row['run']} submits it when other jobs have ended"
    assert "cancelled" in limited("cancel", row["run"]).stdout
    assert limited.states() == ["cancelled"]
    assert not (commands / "cancelled").exists()
    raise_limit(commands, 1)
    limited("retry", row["run"])
    assert sizes(commands) == [1]


@pytest.mark.slow
def test_two_retries_at_once_submit_a_waiting_run_once(limited: Cli, commands: Path) -> None:
    limited(*SWEEP, NAMES)
    raise_limit(commands, 100)
    store = RunStore(limited.workspace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", limited.env["PATH"])
        plans = [plan_retry(store, store.all()) for _ in range(2)]  # both see six waiting runs
        first, second = (send_retry(store, plan) for plan in plans)
    assert [entry.action for entry in first] == ["active"] * 4 + ["submitted"] * 6
    assert [entry.action for entry in second] == ["active"] * 10
    assert sizes(commands) == [4, 6]


@pytest.mark.slow
def test_a_slurm_whose_test_only_ignores_limits(limited: Cli, commands: Path) -> None:
    (commands / "blind").touch()
    limited(*SWEEP, NAMES)
    assert sum(sizes(commands)) in (2, 3, 4)  # halves that fit
    assert (commands / "refused").read_text().count("--test-only") == 0
    raise_limit(commands, 100)
    limited(*SWEEP, NAMES)
    assert sum(sizes(commands)) == 10


@pytest.mark.slow
def test_another_refusal_is_an_error_and_what_waits_keeps_waiting(limited: Cli, commands: Path) -> None:
    limited(*SWEEP, NAMES)
    write_command(commands, "sbatch", "echo 'sbatch: error: Invalid qos specification' >&2; exit 1")
    error = limited("retry", "--sweep", "name-", code=2).stderr
    assert "Invalid qos specification" in error
    assert limited.states().count("failed") == 6


@pytest.mark.slow
def test_waiting_command_submits_the_rest(
    limited: Cli, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With wait=true the command stays, and submits more when jobs have ended."""
    limited(*SWEEP, NAMES)
    raise_limit(commands, 100)
    monkeypatch.setenv("PATH", limited.env["PATH"])
    runs = RunStore(limited.workspace).all()
    watched = watched_runs.WatchedRuns()
    watched.keep_going(runs)
    assert sizes(commands) == [4]  # once a minute
    monkeypatch.setattr(watched_runs, "_SUBMIT_INTERVAL", 0)
    watched.keep_going(runs)
    assert sizes(commands) == [4, 6]
    watched.keep_going(runs)
    assert sizes(commands) == [4, 6]


@pytest.mark.parametrize("most", range(9))
def test_largest_number_that_is_accepted(most: int) -> None:
    assert largest_accepted(9, lambda count: count <= most) == most


def test_limit_without_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = (
        "sbatch: error: AssocGrpSubmitJobsLimit\nsbatch: error: Batch job submission failed: Job violates …"
    )
    name = limit_in(reply)
    assert name == "AssocGrpSubmitJobsLimit"
    assert limit_in("sbatch: error: QOSMaxNodePerJobLimit") == ""  # this job will never fit
    write_slurm(tmp_path)
    write_command(tmp_path, "sacctmgr", "echo 4; echo 8")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    slurm._reply_cache.clear()
    assert describe_limit(name, Cluster(executor="slurm")) == f"waiting: limit of submitted jobs ({name})"
