"""Declaration of the session stage; work/session.py and the package session do the work."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Cluster, Config, Datastore, Session
from hpc_imagenet.datastore import versions
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.job import FindVersion
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.stage import Stage


class SessionStage(Stage):
    """Jupyter Lab on a node."""

    name = "session"
    in_pipeline = False
    interactive = True

    def identity(self, config: Config) -> tuple[Any, ...]:
        """Return the session's name alone, so that its resources may change."""
        return (config.session.name,)

    def label(self, config: Config) -> str:
        """Return stage and session.name."""
        return f"{self.name}-{config.session.name}"

    def datastore(self, config: Config, find_version: FindVersion) -> Datastore:
        """Return the session's own datastore with its newest or pinned version, if it has one."""
        if not config.session.datastore:
            return config.datastore
        datastore = replace(config.datastore, name=config.session.datastore, version=None, content=None)
        return find_version(datastore) or datastore

    def check_input(self, config: Config, cluster: Cluster, planned: bool) -> None:
        """Raise if Jupyter is not installed, or the session's datastore is missing or cannot be linked."""
        if not find_spec("jupyter_server") or not find_spec("jupyterlab"):
            raise UserError(
                "a session needs Jupyter: run pip install -c constraints.txt -e '.[session]' in the checkout"
            )
        if not config.session.datastore:
            return
        version = versions.open_version(config.datastore)
        if version.folder is None and not cluster.scratch:
            raise UserError(
                f"session.datastore={config.session.datastore} is stored at {version.backend.url}, where "
                "files cannot be linked: set cluster.scratch=FOLDER to copy it to the node"
            )

    def check_output(self, config: Config) -> None:
        """Raise always: the session is started again."""
        raise UserError("an ended session has no output to reuse; submit it again to resume it")

    def check_active(self, config: Config, run: Run) -> None:
        """Raise for settings that the session does not have; what is left at its default is not compared."""
        frozen, defaults = run.config(), asdict(Session())
        running, new = asdict(frozen.session), asdict(config.session)
        other = {
            f"session.{name}": new[name] for name in new if new[name] not in (running[name], defaults[name])
        }
        if config.session.datastore and _place(config.datastore.url) != _place(frozen.datastore.url):
            other["datastore.url"] = config.datastore.url
        if other:
            settings = " ".join(f"{name}={'null' if to is None else to}" for name, to in other.items())
            raise UserError(
                f"{run.id} is already running without {settings}: pause it first, then repeat this command, "
                f"or type python -m hpc_imagenet connect {run.id} to use it as it is"
            )

    def run(self, config: Config, run: Run, dist_env: DistEnv) -> dict[str, Any]:
        """Serve Jupyter; see `stages.work.session.run`."""
        from hpc_imagenet.stages.work import session

        return session.run(config, run, dist_env)


def _place(url: str) -> str:
    """Return a `datastore.url` that is equal for all names of a folder."""
    return url if versions.is_remote(url) else os.path.realpath(versions.open_backend(url).folder or url)


SESSION = SessionStage()
