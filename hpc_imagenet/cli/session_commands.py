"""Commands on sessions: connect, pause and resume."""

from __future__ import annotations

import argparse

from hpc_imagenet.cli.command import RUN_NAMES, Command, add_run, add_runs
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import Run, RunStore


def _connect(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.cli.connect import connect

    return connect(_find(store, options.run))


def _pause(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.launch.submission import cancel_run

    for run in [_check_session(_find(store, name)) for name in options.runs]:
        run.check_mine("pause it", "start your own with another session.name")
        previous = cancel_run(run, "paused: resume restarts it")
        print(f"{'paused' if not previous.ended else f'already {previous.name}'}  {run.id}")
    return 0


def _resume(store: RunStore, options: argparse.Namespace) -> int:
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import with_overrides
    from hpc_imagenet.launch.states import state

    run = _check_session(_find(store, options.run))
    run.check_mine("resume it", "start your own with another session.name")
    run.check_format()
    wait = [setting for setting in options.settings if setting in ("wait=true", "wait=false")]
    settings = [setting for setting in options.settings if setting not in wait]
    if state(run).active and settings:
        raise UserError(f"{run.id} is running: pause it first, then resume it with {' '.join(settings)}")
    frozen = run.config()
    prepared = prepare([with_overrides(frozen, [f"workspace={store.folder.parent}", *settings])])
    if prepared.jobs[0].run_id != run.id:
        raise UserError(
            f"session.name={prepared.first.session.name} is another session: start it with +stage=session"
        )
    if not prepared.in_background:
        raise UserError(f"{run.id} ran with cluster={prepared.executor}: repeat the command that started it")
    for entry in prepared.submit():
        print(f"{entry.label}  {entry.run.id}")
    if "wait=true" in wait:
        from hpc_imagenet.cli.connect import connect

        return connect(run)
    return 0


def _find(store: RunStore, name: str) -> Run:
    """Return the session of that session.name, or the run of that id or label."""
    label = f"session-{name}"
    return store.find(label if any(run.info.get("label") == label for run in store.all()) else name)


def _check_session(run: Run) -> Run:
    if run.info.get("stage") != "session":
        raise UserError(f"{run.id} is not a session: use cancel to stop it and retry to continue it")
    return run


def _add_connect_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "or the session.name of a session")


def _add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*", help="such as session.gpus=4")


COMMANDS = {
    "connect": Command(
        "Wait until a session runs and print how to connect to it.",
        _connect,
        _add_connect_arguments,
        epilog=RUN_NAMES,
    ),
    "pause": Command(
        "Stop sessions and keep their folders; resume restarts them.", _pause, add_runs, epilog=RUN_NAMES
    ),
    "resume": Command(
        "Restart a session in its folder, optionally with other settings.",
        _resume,
        _add_resume_arguments,
        epilog=RUN_NAMES,
    ),
}
