"""The evaluate command: submit a job that evaluates a checkpoint on a split of a datastore."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpc_imagenet.cli.command import Command
from hpc_imagenet.cli.submit import PreparedPlan, prepare
from hpc_imagenet.config.names.backbones import has_crop_fraction
from hpc_imagenet.config.recipe import VAL_SETTINGS, Model
from hpc_imagenet.config.schema import Config, Evaluate, StageSelection, cluster_for
from hpc_imagenet.datastore.versions import Version, open_version
from hpc_imagenet.errors import UserError, did_you_mean
from hpc_imagenet.io.access import expand_home
from hpc_imagenet.io.ownership import foreign_writer
from hpc_imagenet.runs.attempt import FINISHED
from hpc_imagenet.runs.checkpoints import check_source, find_checkpoint, fingerprint
from hpc_imagenet.runs.store import Run, RunStore

_OWN = ("split", "checkpoint")
_RECIPE = (*(f"recipe.{name}" for name in VAL_SETTINGS), "recipe.global_batch")
_GROUPS = ("cluster.", "loader.")
_SETTINGS = (*_OWN, "datastore.name", "datastore.url", *_RECIPE, "cluster", "workspace", "wait", "dry_run")


def prepare_evaluation(
    store: RunStore, source: str, settings: Sequence[str], config_dir: str | None = None
) -> PreparedPlan:
    """Return the validated plan of one evaluation.

    Args:
        store: the runs of the workspace, among which `source` is searched and the evaluation is recorded.
        source: a training (id, label, or a prefix of one, or its folder), or a checkpoint file.
        settings: `split=` (default: test if the datastore has it, else val), `checkpoint=` (default: best if
            there is one, else last), and SETTING=VALUE of datastore, cluster, loader and validation.
        config_dir: a folder with further files for `cluster=`.

    Raises:
        UserError: invalid input; nothing was submitted.
    """
    own = [item.partition("=")[::2] for item in settings if item.partition("=")[0] in _OWN]
    given = dict(own)
    if len(own) > len(given):
        raise UserError(f"{own[-1][0]}= is given twice: evaluate once with each")
    rest = [item for item in settings if item.partition("=")[0] not in _OWN]
    for item in rest:
        _check_setting(item)
    run, checkpoint = _find_source(store, source, given.get("checkpoint"))
    frozen = _training_config(run, checkpoint)
    _check_resize(rest, frozen.model)
    trusted = not foreign_writer(checkpoint, checkpoint.parent) and (run is None or run.is_mine)
    config = _with_settings(frozen, store, rest, config_dir, trusted)
    check_source(checkpoint, frozen.model.name, trusted)
    version = open_version(config.datastore)
    splits = version.manifest.splits
    split = given.get("split") or ("test" if "test" in splits else "val")
    config = replace(
        config,
        stage=StageSelection("evaluate"),
        datastore=replace(config.datastore, version=version.number, content=version.manifest.content),
        evaluate=Evaluate(str(checkpoint), fingerprint(checkpoint), split, run.id if run else None),
    )
    _check_classes(frozen, version)
    return prepare([config])


def _find_source(store: RunStore, source: str, name: str | None) -> tuple[Run | None, Path]:
    """Return the run of a training, None if a file is in no run folder, and the checkpoint."""
    path = expand_home(source).absolute()
    if path.is_file():
        if name:
            raise UserError(f"checkpoint={name}: {path} is a checkpoint already: drop one of them")
        run = Run(path.parent.parent)
        return (run if run.info else None), path
    if not path.exists() and "=" in source:
        raise UserError(f"evaluate: a run or a checkpoint must come before {source}: evaluate RUN {source}")
    if not path.exists() and ("/" in source or source.endswith(".ckpt")):
        raise UserError(f"{path}: no such file")
    run = Run(path) if Run(path).info else store.find(source)
    if run.info.get("stage") != "train":
        raise UserError(f"{run.id} is no training: evaluate the run of one, or a checkpoint file")
    return run, find_checkpoint(run, name)


def _check_setting(item: str) -> None:
    name, equals, _ = item.partition("=")
    if not equals:
        raise UserError(f"evaluate: {item} is not SETTING=VALUE, such as split=test")
    if name not in _SETTINGS and not name.startswith(_GROUPS):
        if "." in name:
            raise UserError(f"{item} changes a training and not its evaluation: set it in a new training")
        raise UserError(f"{item} is no setting of evaluate{did_you_mean(name, _SETTINGS)}")


def _check_resize(settings: Sequence[str], model: Model) -> None:
    """Raise if recipe.val_resize is given where a crop fraction decides it."""
    given = [item for item in settings if item.startswith("recipe.val_resize=")]
    if given and has_crop_fraction(model.name, model.preprocessing):
        fraction = model.preprocessing.get("crop_pct")
        own = f"model.preprocessing.crop_pct={fraction}" if fraction else f"the crop fraction of {model.name}"
        raise UserError(f"{given[0]} would change nothing: {own} decides it: set recipe.val_size alone")


def _training_config(run: Run | None, checkpoint: Path) -> Config:
    if run is not None:
        run.check_format()
        return run.config()
    from hpc_imagenet.training.trained import open_checkpoint, training_config  # takes seconds: torch

    return training_config(open_checkpoint(checkpoint))


def _with_settings(
    frozen: Config, store: RunStore, settings: Sequence[str], config_dir: str | None, trusted: bool
) -> Config:
    """Return the config of a training on the resources of one of its nodes, with the given settings.

    Of a training that another user could have written (not `trusted`) only what is data: cluster settings
    can name commands.
    """
    from hpc_imagenet.config.compose import compose, with_overrides

    chosen = [item for item in settings if item.startswith("cluster=")]
    if chosen or not trusted or Path(frozen.workspace).resolve() != store.folder.parent.resolve():
        # cluster=NAME, or a training of another user or workspace, maybe on another machine.
        composed = compose(chosen, config_dir=config_dir)[0]
        frozen = replace(frozen, cluster=composed.cluster)
        if not trusted:
            frozen = replace(frozen, notify=composed.notify, tracker=composed.tracker)
    stages = {name: values for name, values in frozen.cluster.stage.items() if name == "evaluate"}
    other_data = any(item.startswith("datastore.") for item in settings)
    config = replace(
        frozen,
        workspace=str(store.folder.parent),
        stage=StageSelection("evaluate"),
        cluster=replace(cluster_for(frozen, "train"), nodes=1, stage=stages),
        datastore=replace(frozen.datastore, version=None, content=None) if other_data else frozen.datastore,
    )
    return with_overrides(config, [item for item in settings if item not in chosen])


def _check_classes(frozen: Config, version: Version) -> None:
    """Raise if the datastore has a class that the network does not know, before its job does."""
    try:
        known = {each.wnid for each in open_version(frozen.datastore).manifest.classes}
    except UserError:  # the datastore of the training was deleted, or is out of reach
        return
    unknown = [each.wnid for each in version.manifest.classes if each.wnid not in known]
    if unknown:
        raise UserError(
            f"datastore {version.name}@v{version.number}: the network does not know {len(unknown)} of its "
            f"{len(version.manifest.classes)} classes, such as {unknown[0]}: set datastore.name of one with "
            "its classes"
        )


def _evaluate(store: RunStore, options: argparse.Namespace) -> int:
    prepared = prepare_evaluation(store, options.source, options.settings, options.config_dir)
    evaluated, datastore = prepared.first.evaluate, prepared.first.datastore
    name = f"{datastore.name.partition('@')[0]}@v{datastore.version}"
    print(f"cluster: {prepared.executor} · {evaluated.checkpoint} · split {evaluated.split} of {name}")
    if prepared.first.dry_run:
        from hpc_imagenet.report.dry_run import print_dry_run

        print_dry_run(prepared.jobs, prepared.store, prepared.executor, prepared.state_of)
        return 0
    (entry,) = prepared.submit()
    print(f"{entry.label:9}  {entry.run.id}  {entry.run.folder}", flush=True)
    if prepared.first.wait or not prepared.in_background or entry.action == FINISHED:
        from hpc_imagenet.report.jobs_table import terminal, watch

        return 0 if watch([entry.run], terminal()) else 1
    print("python -m hpc_imagenet jobs · logs RUN -f · report")
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN|FILE", help="a training, or a checkpoint file")
    parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*", help="such as split=test")
    parser.add_argument("--config-dir", metavar="FOLDER", help="folder with your own files for cluster=NAME")


COMMANDS = {
    "evaluate": Command(
        "Evaluate a training on a split of a datastore: a job like any other, listed by report.",
        _evaluate,
        _add_arguments,
        needs_runs=False,
        composes=True,
        epilog=(
            "split=SPLIT (default: test if there is one, else val); checkpoint=best, last or epoch-N; "
            "datastore.name=NAME[@vN] (default: that of the training); recipe.val_size, recipe.val_resize, "
            "recipe.val_flip; cluster=, loader.workers=, wait=true, dry_run=true, workspace=FOLDER."
        ),
    )
}
