"""Command-line entry point: run a command, or submit the jobs that Hydra overrides describe.

python -m hpc_imagenet +stage=pipeline dataset=digits
python -m hpc_imagenet -m model=resnet18,resnet50
python -m hpc_imagenet jobs
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_imagenet.cli.command import raise_all
from hpc_imagenet.cli.commands import COMMANDS, run_command_line
from hpc_imagenet.config.host import TAKE_CLUSTER, Host, find_host, store_host, without_host
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.io.access import explain_permission_error

HELP = """hpc_imagenet VERSION: from the ImageNet archives to a table of trained backbones.

Submit jobs (returns at once; jobs run in the background):
  python -m hpc_imagenet [+stage=STAGE] [SETTING=VALUE …]     one run; default stage: train
  python -m hpc_imagenet -m SETTING=A,B [SETTING=VALUE …]     a sweep; +search=asha draws from interval(A,B)

  stages     download → process → upload → train, or pipeline: all four in this order
  cluster=   auto (slurm if Slurm replies, else local), local, slurm, foreground; A,B splits a sweep
  dataset=   imagenet, digits, images or ilsvrc (dataset.name= dataset.source=FOLDER-OR-URL)
  model=     any classification model of torchvision, timm/NAME, or my_package:factory
  recipe=    standard90, fast16 … fast88, modern, finetune, linear_probe, demo
  seed=0     workspace=FOLDER                  sweep=NAME   for jobs, cancel and retry --sweep NAME
  +stage=session [session.datastore=NAME] [session.gpus=N] [session.time=MINUTES]: Jupyter Lab on a node
  datastore.name=NAME[@vN]    trains on that datastore; with a model and a recipe it needs no dataset
  datastore.url=FOLDER, user@host:/path, s3://bucket/prefix
  wait=true      wait for the jobs, with a live table; exit code 1 if a job failed
  dry_run=true   print the jobs, submit none; price=true, or the command price [--json]: their time and cost

Commands:
  python -m hpc_imagenet jobs [--watch] [--running] [--failed] [--stage S] [--sweep S] [--since 2d] [--json]
  python -m hpc_imagenet logs RUN [-f] [-n LINES] [--rank N] [--attempt N]   print a run's output
  python -m hpc_imagenet cancel RUN … | --sweep S            stop runs
  python -m hpc_imagenet retry RUN … | --sweep S | --failed [SETTING=VALUE …] [--dry-run] [--again]
                                               continue runs, with the remedy of their failure
  python -m hpc_imagenet connect RUN           wait for a session and print how to connect to it
  python -m hpc_imagenet pause RUN · resume RUN [SETTING=VALUE …]   stop a session; restart it in its folder
  python -m hpc_imagenet report [--html FILE | --serve | --csv | --markdown | --json]   the leaderboard
  python -m hpc_imagenet show RUN [--diff OTHER] [--json]   print a run, or compare two runs
  python -m hpc_imagenet tensorboard [RUN …] [--sweep S]   serve learning curves, and print the tunnel to them
  python -m hpc_imagenet evaluate RUN|FILE [split=test] [datastore.name=NAME]   score a checkpoint, as a job
  python -m hpc_imagenet export RUN|FILE OUT [--format onnx]   write a network for torchvision, timm, ONNX …
  python -m hpc_imagenet predict RUN|FILE IMAGE|FOLDER … [--top 5] [--json]   classify images, on CPUs
  python -m hpc_imagenet pull RUN …            bring runs from cluster.host to this machine
  python -m hpc_imagenet verify [NAME …] [--quick] [--weights MODEL]   find missing or changed data
  python -m hpc_imagenet datastores [list | show NAME | verify NAME | fetch NAME DIR | delete NAME@vN | prune]
  python -m hpc_imagenet doctor [--write mine] check a cluster file, or propose one, with a probe job

More: --cfg job (print the composed config)   --config-dir FOLDER (your own conf/ in addition)
      --info (stored settings, and the order of precedence)
      --hydra-help   eval "$(hpc-imagenet -sc install=bash)" (tab completion of the command hpc-imagenet)
"""

# Carried out on this machine, even if cluster.host is set.
_LOCAL = ("-h", "--help", "--version", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
_HYDRA_OPTIONS = ("--cfg", "-c", "--hydra-help", "--info", "-i", "--shell-completion", "-sc")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 a job failed, 2 user error, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # a class name that the terminal's encoding does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_current_folder()
        code = run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        code = print_error(error)
    except PermissionError as error:
        code = print_error(UserError(explain_permission_error(error)))
    except KeyboardInterrupt as interrupt:  # that of jobs in the foreground has a sentence of its own
        line = "interrupted: submitted jobs keep running; python -m hpc_imagenet jobs lists them"
        print(f"\n{interrupt if interrupt.args else line}", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # `jobs | head` closed the pipe; without this, Python's flush at exit would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _check_current_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder was removed: cd to another one") from None


def print_error(error: UserError) -> int:
    """Print a user error in one line and return its exit code."""
    from hpc_imagenet.io.printable import error_line  # it may quote a label, a reason or a file name

    print(f"error: {error_line(error)}", file=sys.stderr)
    return 2


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    Raises:
        UserError: invalid input; nothing was submitted.
    """
    arguments = list(arguments)
    is_local = any(argument.split("=")[0] in _LOCAL for argument in arguments)
    if not is_local and arguments[:1] not in (["pull"], ["help"]):
        if (host := find_host(arguments)) is not None:
            return _run_on_host(host, arguments)
        if arguments and arguments[0] in COMMANDS and not _takes_cluster(arguments):
            arguments = without_host(arguments)
    if arguments and arguments[0] in COMMANDS:
        return run_command_line(arguments[0], arguments[1:])
    if arguments[:1] == ["help"] or not {"-h", "--help"}.isdisjoint(arguments):
        print(HELP.replace("VERSION", _version()), end="")
        return 0
    if arguments == ["--version"]:
        print(_version())
        return 0
    if arguments in (["--info"], ["-i"]):
        from hpc_imagenet.config.input.stored_settings import describe

        print(describe())
        return 0
    if any(argument.split("=")[0] in _HYDRA_OPTIONS for argument in arguments):
        return _run_hydra(arguments)
    return _submit(*_parse_submission(arguments))


def _takes_cluster(arguments: Sequence[str]) -> bool:
    """Whether cluster= of a command on this machine means more than: not on the stored host."""
    command, names = arguments[0], {word for word in arguments if word.startswith("cluster=")}
    if command in ("retry", "resume") and names <= {"cluster=local"} and find_host([command]) is not None:
        return False
    return command in TAKE_CLUSTER


def _version() -> str:
    from hpc_imagenet import __version__  # reads the metadata of the installed package, which takes a while

    return __version__


def _parse_submission(arguments: list[str]) -> tuple[list[str], bool, str | None]:
    """Return the overrides, whether they are a sweep, and the user's config folder."""
    overrides: list[str] = []
    multirun, config_dir = False, None
    remaining = iter(arguments)
    for argument in remaining:
        if argument in ("-m", "--multirun"):
            multirun = True
        elif argument in ("-cd", "--config-dir"):
            config_dir = next(remaining, "")
        elif argument.startswith("--config-dir="):
            config_dir = argument.partition("=")[2]
        elif argument in COMMANDS:
            raise UserError(
                f"{argument} is a command, which comes first: python -m hpc_imagenet {argument} …"
            )
        elif argument.startswith("-") or ("=" not in argument and not argument.startswith("~")):
            meant = _meant(argument, overrides)
            raise UserError(f"{argument} is not a command, option or SETTING=VALUE{meant}; see --help")
        else:
            overrides.append(argument)
    if config_dir == "":
        raise UserError("--config-dir is empty: add a folder, such as --config-dir my-conf")
    return overrides, multirun, config_dir


def _meant(argument: str, before: Sequence[str]) -> str:
    """Return the form that was meant by an argument that is no setting, given the settings before it."""
    from hpc_imagenet.config.input.explain import did_you_mean_setting
    from hpc_imagenet.config.input.overrides import is_text, is_value, key_of
    from hpc_imagenet.config.schema import STAGES

    name = argument.lstrip("-").partition("=")[0]
    if argument == "search":
        return "; did you mean: +search=asha"
    if argument in STAGES:
        return f"; did you mean: +stage={argument}"
    if argument.startswith("--"):
        return did_you_mean_setting(name.replace("-", "_"))
    if is_value(argument):
        return f"; did you mean: {argument}=VALUE, without spaces"
    if before and before[-1].endswith(","):
        return f"; did you mean: {before[-1]}{argument}, without spaces"
    key = key_of(before[-1]) if before else None
    if key and is_text(key):
        return f"; if it belongs to {key}, quote both: {shlex.quote(f'{before[-1]} {argument}')}"
    return did_you_mean(argument, COMMANDS)


def _submit(overrides: list[str], multirun: bool, config_dir: str | None) -> int:
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import compose
    from hpc_imagenet.config.input.auto_cluster import resolve_cluster
    from hpc_imagenet.config.input.stored_settings import add_stored_settings
    from hpc_imagenet.launch.executor import JobsRefused
    from hpc_imagenet.launch.retries.longer import shorter_runs
    from hpc_imagenet.launch.slurm_jobs.waiting import describe_waiting
    from hpc_imagenet.stages import STAGES

    overrides, reason = resolve_cluster(add_stored_settings(overrides))
    prepared = prepare(compose(overrides, multirun, config_dir))
    why = f" ({reason})" if reason else ""
    sweep = prepared.first.sweep
    of_sweep = f" · sweep: {sweep}" if sweep else ""
    print(f"cluster: {prepared.executor}{why} · workspace: {prepared.first.workspace}{of_sweep}")
    for line in filter(None, (prepared.split, *shorter_runs(prepared.jobs, prepared.store))):
        print(line)
    if prepared.first.dry_run:
        from hpc_imagenet.report.dry_run import print_dry_run

        print_dry_run(prepared.jobs, prepared.store, prepared.executor, prepared.state_of)
        return 0
    if prepared.first.price:
        from hpc_imagenet.cli.price_plan import print_plan_prices

        print_plan_prices(prepared)
        return 0
    errors: list[UserError] = []
    try:
        submitted = prepared.submit()
    except JobsRefused as refused:
        submitted, errors = refused.entries, refused.errors
    for entry in submitted:
        print(f"{entry.label:9}  {entry.run.id}  {entry.run.folder}", flush=True)
    if line := describe_waiting(submitted, f"--sweep {sweep}" if sweep else ""):
        print(line, flush=True)
    raise_all(errors)
    only_sessions = all(STAGES[job.stage].interactive for job in prepared.jobs)
    if prepared.in_background and only_sessions and prepared.first.wait:
        from hpc_imagenet.cli.connect import connect

        return max(connect(entry.run) for entry in submitted)
    if prepared.first.wait or not prepared.in_background:
        from hpc_imagenet.report.jobs_table import terminal, watch

        return 0 if watch([entry.run for entry in submitted], terminal()) else 1
    commands = "connect RUN · pause RUN" if only_sessions else "logs RUN -f · cancel RUN · report"
    jobs = f"jobs --sweep {sweep}" if sweep else "jobs"
    print(f"python -m hpc_imagenet {jobs} · {commands}")
    return 0


def _run_on_host(host: Host, arguments: list[str]) -> int:
    """Carry out a command line on cluster.host."""
    from hpc_imagenet.remote.host_command import run_on_host

    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if command not in (None, "doctor", "evaluate", "price"):
        return run_on_host(host, arguments, submits=False)
    written = _option(arguments, "--write") if command else None
    code = run_on_host(host, arguments, submits=True)
    if written and code == 0:
        print(f"cluster.host: {host.address} is stored in {store_host(host, written)}")
    return code


def _option(arguments: list[str], name: str) -> str | None:
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _run_hydra(arguments: list[str]) -> int:
    """Run one of Hydra's own options, such as --cfg or tab completion."""
    import hydra

    from hpc_imagenet.config.compose import CONF, VERSION_BASE, register, register_networks, search_path
    from hpc_imagenet.config.input.auto_cluster import resolve_cluster
    from hpc_imagenet.config.input.overrides import check_given_once, quote_paths
    from hpc_imagenet.config.input.stored_settings import add_stored_settings, config_folders

    register()
    check_given_once(arguments)
    if "--hydra-help" not in arguments:
        arguments, _ = resolve_cluster(add_stored_settings(arguments))
        register_networks(arguments)
        arguments = quote_paths(arguments)
        at = next((i for i, word in enumerate(arguments) if "=" in word and word[0] != "-"), len(arguments))
        arguments[at:at] = search_path(config_folders())
    sys.argv[1:] = arguments
    hydra.main(version_base=VERSION_BASE, config_path=str(CONF), config_name="config")(lambda _: None)()
    return 0


if __name__ == "__main__":
    main()
