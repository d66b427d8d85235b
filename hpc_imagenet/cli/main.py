"""The door: a verb, or Hydra overrides that say what to submit.

python -m hpc_imagenet +stage=pipeline dataset=digits
python -m hpc_imagenet -m model=resnet18,resnet50
python -m hpc_imagenet jobs
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hpc_imagenet import __version__
from hpc_imagenet.cli.commands import ACTION_LABELS, COMMANDS, print_error
from hpc_imagenet.cli.commands import run_command_line as verb_main
from hpc_imagenet.errors import UserError

HELP = f"""hpc_imagenet {__version__}: from the ImageNet archives to a table of trained backbones.

Submit (returns at once, the work goes on in the background):
  python -m hpc_imagenet [+stage=STAGE] [SETTING=VALUE …]     one run; without a stage: train
  python -m hpc_imagenet -m SETTING=A,B [SETTING=VALUE …]     a sweep: one run a combination

  stages     download → process → upload → train, or pipeline: all four, each after the other
  cluster=   auto (slurm where sbatch is on the PATH, else local), local, slurm, here
  dataset=   imagenet, digits, ilsvrc (dataset.name= dataset.source=FOLDER-OR-URL)
  model=     any classification model of torchvision.models
  recipe=    standard90, fast16 … fast88, modern, finetune, linear_probe, demo
  seed=0     workspace=FOLDER
  +stage=session [session.datastore=NAME] [session.gpus=N] [session.time=MINUTES]: Jupyter Lab on a node
  datastore.name=NAME[@vN]                     datastore.url=FOLDER, user@host:/path, s3://bucket/prefix
  wait=true      stay, with a live table; exit code 1 if a job failed
  dry_run=true   print what would be submitted, submit nothing

Look and act:
  python -m hpc_imagenet jobs [--json]         every run: state, progress
  python -m hpc_imagenet logs RUN [-f]         what it printed
  python -m hpc_imagenet cancel RUN …          stop it
  python -m hpc_imagenet retry RUN …           go on from where it stopped
  python -m hpc_imagenet connect RUN           how to reach a session, as soon as it runs
  python -m hpc_imagenet pause RUN · resume RUN [SETTING=VALUE …]   a session ends; its folder goes on
  python -m hpc_imagenet report [--json]       the leaderboard
  python -m hpc_imagenet verify [NAME …] [--quick] [--weights MODEL]   is all there, and as it was made
  python -m hpc_imagenet datastores [list | show NAME | verify NAME | fetch NAME DIR | delete NAME@vN | prune]
  python -m hpc_imagenet doctor [cluster=mine] is the cluster set up: a probe on its nodes, and what to set

More: --cfg job (the composed config)   --config-dir FOLDER (your own conf/ beside ours)
      --hydra-help   eval "$(hpc-imagenet -sc install=bash)" (tab completion of the command hpc-imagenet)
"""

# Flags that Hydra answers itself.
_HYDRA = ("--cfg", "-c", "--hydra-help", "--info", "-i", "--shell-completion", "-sc")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 well, 1 a job failed, 2 a user's error, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = run(words)
    except UserError as error:
        code = print_error(error)
    except PermissionError as error:
        code = print_error(UserError(f"{error.filename}: you may not read or write here: is it another's?"))
    except KeyboardInterrupt:
        print(
            "\ninterrupted: what is in a queue goes on; python -m hpc_imagenet jobs shows it", file=sys.stderr
        )
        code = 130
    except BrokenPipeError:
        # `jobs | head` closed the pipe; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Carry a command line out and return its exit code.

    Raises:
        UserError: nothing was submitted, and why.
    """
    words = list(words)
    if words and words[0] in COMMANDS:
        return verb_main(words[0], words[1:])
    if words and words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words == ["--version"]:
        print(__version__)
        return 0
    if any(word.split("=")[0] in _HYDRA for word in words):
        return _hydra(words)
    return _submit(*_split(words))


def _split(words: list[str]) -> tuple[list[str], bool, str | None]:
    """Return overrides, whether it is a sweep, and the user's config folder."""
    overrides: list[str] = []
    multirun, config_dir = False, None
    rest = iter(words)
    for word in rest:
        if word in ("-m", "--multirun"):
            multirun = True
        elif word in ("-cd", "--config-dir"):
            config_dir = next(rest, "")
        elif word.startswith("--config-dir="):
            config_dir = word.partition("=")[2]
        elif word.startswith("-") or ("=" not in word and not word.startswith("~")):
            from hpc_imagenet.errors import did_you_mean

            raise UserError(
                f"{word} is no command, option or SETTING=VALUE{did_you_mean(word, COMMANDS)}; see --help"
            )
        else:
            overrides.append(word)
    if config_dir == "":
        raise UserError("--config-dir: which folder?")
    return overrides, multirun, config_dir


def _submit(overrides: list[str], multirun: bool, config_dir: str | None) -> int:
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import compose

    wanted = prepare(compose(overrides, multirun, config_dir))
    named = any(word.startswith("cluster=") and word != "cluster=auto" for word in overrides)
    why = "" if named else f" ({'sbatch' if wanted.executor == 'slurm' else 'no sbatch'} is on the PATH)"
    print(f"cluster: {wanted.executor}{why} · workspace: {wanted.first.workspace}")
    if wanted.first.dry_run:
        from hpc_imagenet.report.dry_run import print_dry_run

        print_dry_run(wanted.jobs, wanted.store, wanted.executor)
        return 0
    sent = wanted.submit()
    for entry in sent:
        print(f"{ACTION_LABELS[entry.action]:9}  {entry.run.id}  {entry.run.folder}", flush=True)
    sessions = all(job.stage == "session" for job in wanted.jobs)
    if wanted.executor != "foreground" and sessions and wanted.first.wait:
        from hpc_imagenet.session.connect import connect

        return max(connect(entry.run) for entry in sent)
    if wanted.first.wait or wanted.executor == "foreground":
        from hpc_imagenet.report.jobs_table import terminal, watch

        return 0 if watch([entry.run for entry in sent], terminal()) else 1
    more = "connect RUN · pause RUN" if sessions else "logs RUN -f · cancel RUN · report"
    print(f"python -m hpc_imagenet jobs · {more}")
    return 0


def _hydra(words: list[str]) -> int:
    """Leave a question about the configuration to Hydra."""
    import hydra

    from hpc_imagenet.config.compose import CONF, VERSION_BASE, register, resolve_cluster

    register()
    sys.argv[1:] = words if "--hydra-help" in words else resolve_cluster(words)
    hydra.main(version_base=VERSION_BASE, config_path=str(CONF), config_name="config")(lambda _: None)()
    return 0


if __name__ == "__main__":
    main()
