"""Run every command of README.md and docs/.

Each line of a block fenced as ```sh is a command. It is run here, in order, page by page, in a copy of the
checkout and one workspace. A block fenced as ```yaml or ```python whose first line is `# PATH` is first
written to that path. RULES maps each kind of command to a function, and `shortened` replaces settings that
would fetch ImageNet or train for hours. A command without a rule fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from docs_reader import BIN, PAGES, ROOT, SMALL, STAGES, Reader, blocks, commands
from fake_slurm import SRUN, queue_row, write_command
from PIL import Image

from hpc_imagenet.config.input.overrides import with_defaults


def shortened(words: list[str], reader: Reader) -> list[str]:
    """Return the settings of a submission, changed so that it ends within seconds.

    One epoch of the digits with a small backbone on this machine, with wait=true; a folder of archives that
    does not exist becomes one that does. Everything else is kept.
    """
    given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words if "=" in word}
    sweep = "-m" in words
    replaced = {"recipe.epochs": "1", "cluster": "local", "wait": "true"}
    elsewhere = {"dataset.source", "datastore.name"}.intersection(given)
    if given.get("dataset", "imagenet") == "imagenet" and not elsewhere:
        replaced["dataset"] = "digits"
    if source := given.get("dataset.source"):
        replaced |= {"dataset": "ilsvrc", "dataset.source": str(reader.digits), "recipe": "demo"}
        replaced |= {"dataset.name": given.get("dataset.name", Path(source).name)}
    elif given.get("dataset") in ("birds",):
        replaced |= {"dataset": given["dataset"], "dataset.source": str(reader.digits)}
    replaced["model"] = SMALL
    if sweep and "," in given.get("model", ""):
        replaced["model"] = f"{SMALL},squeezenet1_1"
    if "," in given.get("seed", ""):
        replaced["seed"] = "0,1"
    if "search" in given:
        replaced |= {"search.trials": "1", "search.parallel": "1"}
        reader.make_datastore()
    kept = [word for word in words if word.partition("=")[0].lstrip("+") not in replaced]
    return kept + [f"{key}={value}" for key, value in replaced.items()]


def run_submission(command: str, reader: Reader) -> None:
    if "=RUN" in command:
        rows = reader.cli.jobs()
        run = next(r["run"] for r in rows if r["model"] == SMALL and r["state"] == "finished" and r["top1"])
        command = command.replace("RUN", run)
    words = shlex.split(command)
    at = 1 if words[0] == "hpc-imagenet" else 3
    cli, settings = words[:at], words[at:]
    if "dry_run=true" in settings:  # unchanged
        before = reader.submitted()
        assert "nothing was submitted (dry_run=true)" in reader.run_shell(command)
        assert reader.submitted() == before
    elif any(word in ("cluster=slurm", "cluster=mine") for word in settings):
        # Unchanged, on a cluster of stubs and with a datastore that exists.
        before = len(reader.submitted())
        reader.run_shell(shlex.join([*cli, *with_defaults(settings, ["dataset=digits"])]))
        assert len(reader.submitted()) > before
    else:
        output = reader.run_shell(shlex.join([*cli, *shortened(settings, reader)]))
        assert "submitted" in output or "already finished" in output


def compare_runs(command: str, reader: Reader) -> None:
    first, *_, last = (row["run"] for row in reader.cli.jobs())
    shown = reader.run_shell(command.replace("RUN", first).replace("OTHER", last))
    assert "stage.name" in shown


def run_command(command: str, reader: Reader) -> None:
    name = re.search(r"\b(jobs|logs|cancel|retry|report|show|evaluate)\b", command)
    assert name
    if name[1] in ("show", "evaluate"):
        run = next(r["run"] for r in reader.cli.jobs() if r["stage"] == "train" and r["state"] == "finished")
        settings = " cluster=local wait=true" if name[1] == "evaluate" else ""
        assert "checkpoints/best.ckpt" in reader.run_shell(command.replace("RUN", run) + settings)
        return
    if "--watch" in command:
        assert "needs a terminal" in reader.run_shell(command, code=2)
    elif name[1] in ("jobs", "report"):
        output = reader.run_shell(command)
        if re.search("--(failed|running)", command):
            assert "no runs in" in output or SMALL in output
        else:
            assert json.loads(output) if "--json" in command else SMALL in output
    elif name[1] == "logs":
        run = next(row["run"] for row in reader.cli.jobs() if row["model"] == SMALL)
        assert "epoch 1/1" in reader.run_shell(command.replace("RUN", run))
    elif name[1] == "cancel":
        run = reader.submit_one_more()
        assert "cancelled" in reader.run_shell(command.replace("RUN", run))
        assert next(row["state"] for row in reader.cli.jobs() if row["run"] == run) == "cancelled"
    else:
        run = next(row["run"] for row in reader.cli.jobs() if row["state"] == "cancelled")
        assert "submitted" in reader.run_shell(command.replace("RUN", run))
        reader.cli("cancel", run)


def use_network(command: str, reader: Reader) -> None:
    run = next(r["run"] for r in reader.cli.jobs() if r["stage"] == "train" and r["state"] == "finished")
    photographs = reader.folder / "photographs"
    if not photographs.exists():
        photographs.mkdir()
        Image.new("RGB", (20, 30), "red").save(photographs / "red.jpg")
    output = reader.run_shell(command.replace("RUN", run))
    assert ("README.md" if " export " in command else "red.jpg") in output


def run_report(command: str, reader: Reader) -> None:
    if "--serve" not in command:
        option = re.search(r"--(html|csv|markdown)", command)
        assert option
        expected = {"html": "wrote ", "csv": "run,model,", "markdown": "| run | model |"}
        assert reader.run_shell(command).startswith(expected[option[1]])
        return
    words = shlex.split(re.sub(r" --port \d+", "", command))
    with subprocess.Popen(
        words, cwd=reader.folder, env=reader.cli.env, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout
            url = next(line.split()[-1] for line in server.stdout if line.startswith("browser"))
            with urllib.request.urlopen(url) as reply:
                assert b"<title>Trainings</title>" in reply.read()
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0


def run_session(command: str, reader: Reader) -> None:
    """Start the session and wait for its address; one that is running is left alone."""
    reader.make_datastore()
    assert "/lab?token=" in reader.run_shell(f"{command} cluster=local wait=true")


def run_session_command(command: str, reader: Reader) -> None:
    run = next(row["run"] for row in reader.cli.jobs() if row["stage"] == "session")
    output = reader.run_shell(command.replace("RUN", run))
    name = shlex.split(command)[-2 if command.endswith("RUN") else -3]
    assert {"connect": "/lab?token=", "pause": "paused", "resume": "submitted"}[name] in output
    if name == "resume":
        reader.run_shell(f"python -m hpc_imagenet connect {run}")


def run_pull(command: str, reader: Reader) -> None:
    """Check only that it is refused without a host; tests/remote pulls from one."""
    assert "cluster.host" in reader.run_shell(command, code=2)


def check_tensorboard(command: str, reader: Reader) -> None:
    """Check only its arguments; `test_tensorboard_command.py` runs it."""
    assert "usage: " in reader.run_shell(f"{command} --help")


def check_extra(command: str, reader: Reader) -> None:
    """Check only that the extra exists."""
    extra = re.search(r"\[(\w+)\]", command)
    assert extra
    assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()


def run_doctor(command: str, reader: Reader) -> None:
    """Run doctor for this machine; tests/slurm runs it, and its --write, on a Slurm cluster."""
    if "--write" in command:
        command = command.partition(" --write")[0]
    output = reader.run_shell(f"{command.replace('cluster=mine', 'cluster=local')} dataset=digits")
    assert '"check": "packages"' in output if "--json" in command else "no check failed" in output


def run_sbatch(command: str, reader: Reader) -> None:
    """Check only the submission; `test_templates_run_their_stages` runs the templates."""
    before = len(reader.submitted())
    reader.run_shell(command)
    assert len(reader.submitted()) == before + 1
    assert (reader.folder / shlex.split(command)[1]).is_file()


def run_make(command: str, reader: Reader) -> None:
    """Check only what make would run: minutes of training, installing, or this test suite."""
    target = command.split()[-1]
    output = reader.run_shell(f"make -n {target} VENV=nowhere", cwd=ROOT)
    expected = {"demo": "-m hpc_imagenet.demo", "test": "-m pytest", "install": "--editable '.[demo]'"}
    assert expected[target] in output


def run_lab(command: str, reader: Reader) -> None:
    """Run it on a lab of this test, without the stubs; a training is shortened."""
    env = {"HPC_IMAGENET_LAB": str(reader.lab), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    if not shutil.which("slurmctld", path=f"{env['PATH']}{os.pathsep}/usr/sbin"):
        return  # tests/slurm reports what is missing
    words = shlex.split(command)
    if words[1] == "login":
        settings = [word.replace("cluster=local", "cluster=lab") for word in shortened(words[5:], reader)]
        output = reader.run_shell(shlex.join([*words[:5], *settings]), **env)
        trained = re.findall(rf"^finished +\w{{8}}-({SMALL}|squeezenet1_1) ", output, re.MULTILINE)
        assert len(trained) == 2
    else:
        reader.run_shell(command, **env)


def run_benchmark(command: str, reader: Reader) -> None:
    script = ROOT / shlex.split(command)[1]
    assert "--help" in reader.run_shell(f"python {script} --help")


def run_completion(command: str, reader: Reader) -> None:
    assert "hydra_bash_completion" in reader.run_shell(f"{command}; complete -p hpc-imagenet")


def run_unchanged(command: str, reader: Reader) -> None:
    reader.run_shell(command)


def check_activation(command: str, reader: Reader) -> None:
    assert shutil.which("hpc-imagenet", path=reader.cli.env["PATH"])  # as if the environment were activated


PROGRAM = r"(python -m hpc_imagenet|hpc-imagenet)"
RULES: tuple[tuple[str, Callable[[str, Reader], None]], ...] = (
    (r"\. \.venv/bin/activate", check_activation),
    (r"(srun( --[\w=-]+)+ )?make \w+", run_make),
    (r"sbatch slurm/\w+\.sbatch( [\w.]+=\S+)*", run_sbatch),
    (r"(mkdir -p|cp) [\w./ -]+", run_unchanged),
    (r"slurm/lab/lab (up|down|login python -m hpc_imagenet( -m| \S+=\S+)+)", run_lab),
    (r"python benchmarks/\w+\.py", run_benchmark),
    (r'eval "\$\(hpc-imagenet -sc install=bash\)"', run_completion),
    (rf"{PROGRAM} --cfg job( \S+=\S+)*", run_unchanged),
    (rf"{PROGRAM} (jobs|report)( --json)?", run_command),
    (rf"{PROGRAM} report --(html report\.html|csv|markdown|serve( --port \d+)?)", run_report),
    (rf"{PROGRAM} jobs( --(failed|running|watch)| --(stage|sweep|since) \w+)+", run_command),
    (rf"{PROGRAM} logs RUN( -f| -n \d+| --(rank|attempt) \d+)*", run_command),
    (rf"{PROGRAM} (cancel|retry) RUN( --dry-run| cluster\.\w+=\w+)*", run_command),
    (rf"{PROGRAM} show RUN --diff OTHER", compare_runs),
    (rf"{PROGRAM} (show|evaluate) RUN( [\w.]+=\S+)*", run_command),
    (rf"{PROGRAM} (export|predict) RUN [\w-]+( --[\w-]+( \w+)?)*", use_network),
    (rf"{PROGRAM} pull RUN", run_pull),
    (rf"{PROGRAM} tensorboard( RUN)?", check_tensorboard),
    (r"pip install -c constraints\.txt -e '\.\[\w+\]'", check_extra),
    (rf"{PROGRAM} \+stage=session( \S+=\S+)*", run_session),
    (rf"{PROGRAM} (connect|pause|resume) RUN( \S+=\S+)*", run_session_command),
    (rf"{PROGRAM} verify( [\w.@-]+)*( --quick)?", run_unchanged),
    (rf"{PROGRAM} datastores( [\w.@-]+| datastore\.url=\w+)*", run_unchanged),
    (
        rf"{PROGRAM} doctor( --config-dir [\w/-]+| --write \w+| --timeout=\d+| --json| \+?[\w.]+=\S+)*",
        run_doctor,
    ),
    (rf"{PROGRAM}( -m| --config-dir [\w/-]+| '?\+?[\w.]+=\S+)+", run_submission),
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    if reader.lab.exists():
        subprocess.run([ROOT / "slurm/lab/lab", "--dir", reader.lab, "down"], check=False)
    reader.cli.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_run(page: Path, reader: Reader) -> None:
    for text in [*blocks(page, "yaml"), *blocks(page, "python")]:
        if match := re.match(r"# (\S+/\S+\.yaml|\w+\.py)\n", text):
            path = reader.folder / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for command in commands(page):
        rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, command)), None)
        assert rule, f"{page.name}: no rule for: {command}"
        print(f"$ {command}", flush=True)
        rule(command, reader)


@pytest.mark.slow
def test_python_examples_run(tmp_path: Path) -> None:
    """Run the Python examples, with trainings of one epoch on this machine."""
    reader = Reader(tmp_path)
    try:
        for stage in STAGES[:3]:
            reader.cli(f"+stage={stage}", "dataset=digits", "cluster=foreground")
        code = "".join(text for page in PAGES for text in blocks(page, "python"))
        short = "cluster=local recipe.epochs=1 model.stem=standard"  # a third of the time of a small stem
        (tmp_path / "page.py").write_text(code.replace(' dataset=digits"', f' dataset=digits {short}"'))
        output = reader.run_shell("python page.py")
        assert re.search(r"^\w{8}-(resnet18|mobilenet_v3_small) 0\.\d+ ", output, re.MULTILINE)
        assert "epoch 1/1" in output
        assert "model=resnet81 is unknown; did you mean: resnet" in output
    finally:
        reader.cli.close()


@pytest.mark.slow
def test_templates_run_their_stages(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    write_command(reader.folder / "stubs", "srun", SRUN)
    write_command(reader.folder / "stubs", "squeue", f"echo '{queue_row(1, 'RUNNING')}'")
    # The templates of a sweep and a session run on a real Slurm, in tests/slurm.
    assert {path.stem for path in (ROOT / "slurm").glob("*.sbatch")} == {*STAGES, "sweep", "session"}
    try:
        for stage in STAGES:
            template = f"slurm/{stage}.sbatch"
            settings = f"dataset=digits recipe.epochs=1 model={SMALL} cluster.gpus_per_node=0"
            output = reader.run_shell(
                f"bash {template} {settings}", SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(reader.folder)
            )
            assert f"submitted  {reader.cli.jobs()[-1]['run']}" in output
            rows = reader.cli.jobs()
            assert [row["stage"] for row in rows] == list(STAGES[: len(rows)])
            assert {row["state"] for row in rows} == {"finished"}
            assert list(Path(rows[-1]["dir"]).glob("attempts/1/1_0_log.out"))
        assert rows[-1]["top1"] is not None
        assert reader.submitted() == []
    finally:
        reader.cli.close()


@pytest.mark.parametrize("stage", [*STAGES, "sweep", "session"])
def test_template_is_valid_bash(stage: str) -> None:
    path = ROOT / "slurm" / f"{stage}.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert re.search(rf"^#   sbatch .*slurm/{stage}\.sbatch", path.read_text(), re.MULTILINE)
