"""The commands of the command line by name, and how their arguments are parsed."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from hpc_imagenet.cli.command import Command
from hpc_imagenet.config.input.stored_settings import stored_value
from hpc_imagenet.errors import UserError
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.runs.store import RunStore

# The module of hpc_imagenet.cli that has each command in its COMMANDS. Only that one is imported.
COMMANDS = {
    "jobs": "runs.run_commands",
    "logs": "runs.run_commands",
    "cancel": "runs.run_commands",
    "retry": "runs.run_commands",
    "report": "runs.report_command",
    "show": "runs.show_command",
    "tensorboard": "runs.tensorboard_command",
    "evaluate": "runs.evaluate_command",
    "export": "runs.export_command",
    "predict": "runs.predict_command",
    "pull": "runs.pull_command",
    "connect": "session_commands",
    "pause": "session_commands",
    "resume": "session_commands",
    "verify": "verify_command",
    "datastores": "datastores",
    "doctor": "doctor_command",
    "price": "price_command",
}


def run_command_line(name: str, arguments: Sequence[str]) -> int:
    """Run one of `COMMANDS` and return its exit code.

    Raises:
        UserError: invalid arguments, or the command failed.
    """
    command = _load(name)
    settings = ("workspace", *command.settings)
    given = [item for item in arguments if item.partition("=")[0] in settings and "=" in item]
    rest = list(arguments) if command.composes else [item for item in arguments if item not in given]
    options = _parser(name, command).parse_intermixed_args(rest)
    options.set = dict(item.split("=", 1) for item in given)
    if len(options.set) < len(set(given)):
        raise UserError(f"{name}: a setting is given twice: write it once")
    workspace = options.set.get("workspace", stored_value("workspace") or "workspace")
    if not workspace:
        raise UserError("workspace is empty: set a folder, such as . for the current one")
    store = RunStore(expand_home(workspace).absolute())
    if command.needs_runs and not store.folder.is_dir():
        raise UserError(f"no runs in {store.folder.parent}: set workspace=FOLDER to the folder of the runs")
    return command.run(store, options)


def _load(name: str) -> Command:
    module = importlib.import_module(f"hpc_imagenet.cli.{COMMANDS[name]}")
    commands: dict[str, Command] = module.COMMANDS
    return commands[name]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}")


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    workspace = "" if command.composes else "workspace=FOLDER selects another workspace. "
    parser = _Parser(
        prog=f"python -m hpc_imagenet {name}",
        description=command.description,
        epilog=workspace + command.epilog,
    )
    command.add_arguments(parser)
    return parser
