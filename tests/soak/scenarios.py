"""What is disturbed at random moments: one scenario per stage, with checks after a kill and at the end.

A scenario works in a process of its own. After a kill, `check` fails if anything looks whole and is not;
after an undisturbed rerun, `result` must equal that of an undisturbed run.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import killing
import torch
from faulty_server import Faults, faulty, serving
from remote_workspace import Workspace
from run_stage import config_of, run_of, run_stage
from sample_dataset import link_version, make_dataset
from test_process import dataset, dataset_bytes, write_small
from test_process_killed import check_after_kill, config_with_archives
from tiny_training import tiny_config, write_store

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.config.schema import Evaluate
from hpc_imagenet.data.download import receipt
from hpc_imagenet.data.ilsvrc import ilsvrc_writer
from hpc_imagenet.datastore import catalog, versions
from hpc_imagenet.datastore.manifest import load_manifest
from hpc_imagenet.datastore.node_cache.cache import NodeCache
from hpc_imagenet.datastore.node_cache.copy_process import CopyProcess
from hpc_imagenet.datastore.reader.dataset_reader import DatasetReader
from hpc_imagenet.runs.checkpoints import fingerprint
from hpc_imagenet.runs.store import Run
from hpc_imagenet.stages.work import process

ARCHIVES = (ilsvrc_writer.TRAIN, ilsvrc_writer.VAL, ilsvrc_writer.DEVKIT)


class Scenario(abc.ABC):
    """Work that is killed and begun again.

    Args:
        name: shown in the table.
        folder: an empty folder for everything that it writes.
    """

    survives = False  # whether processes that the work has started may outlive it
    turns = 4  # of 4: how often it has its turn
    disturbances = 10  # of a round, at most
    kinds = ("kill",) * 7 + ("terminate",) * 2 + ("freeze",)  # of a disturbance, by frequency

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    @property
    def state(self) -> Path:
        """The folder that the work writes, removed by `reset`."""
        return self.folder / "state"

    @property
    def errors(self) -> Path:
        """The file with what the last process of this scenario wrote to its stderr."""
        return self.folder / "stderr"

    def prepare(self, stack: contextlib.ExitStack) -> None:  # noqa: B027 - few need it
        """Make the input, and start servers that live as long as `stack`."""

    def reset(self) -> None:
        """Return to the state before the first run."""
        shutil.rmtree(self.state, ignore_errors=True)

    @abc.abstractmethod
    def work(self) -> None:
        """Do the work, or go on with it; called in a process of its own."""

    def victims(self, pid: int) -> list[int]:
        """Return the processes of which one is disturbed. `pid`: the one that does the work."""
        return [pid]

    def disturb(self, kind: str, draw: random.Random) -> bool:
        """Disturb the work in a way that `kinds` names; return whether anything was there to disturb."""
        raise NotImplementedError(kind)

    def check(self) -> None:  # noqa: B027 - few need it
        """Fail if anything looks whole and is not."""

    @abc.abstractmethod
    def result(self) -> Any:
        """Return the end state, which is compared with that of an undisturbed run."""


class Download(Scenario):
    """Archives over HTTP, over four connections, from a server that drips."""

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Write the archives and serve them."""
        self.source = self.folder / "source"
        self.source.mkdir(parents=True)
        write_small(self.source, random.Random(3))
        self.url = stack.enter_context(serving(self.source, faulty(Faults(pause=0.004, chunk_size=1 << 13))))

    def work(self) -> None:
        """Run the stage."""
        from hpc_imagenet.stages.work import download

        config = config_of(self.state, self.url)
        config.download.connections = 4
        run_stage(download, config)

    def check(self) -> None:
        """Compare every archive that has a receipt."""
        kept = self.state / "archives" / "numbers"
        for file in ARCHIVES:
            if receipt.load_receipt(kept / file):
                assert (kept / file).read_bytes() == (self.source / file).read_bytes(), file

    def result(self) -> Any:
        """Return the archives, and the names of all files beside them."""
        kept = self.state / "archives" / "numbers"
        assert not receipt.missing_receipts(kept, ARCHIVES)
        return {p.name: p.read_bytes() if p.name in ARCHIVES else b"" for p in sorted(kept.iterdir())}


class Process(Scenario):
    """One layout of the process stage."""

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Write and verify the archives."""
        source = self.folder / "source"
        source.mkdir(parents=True)
        write_small(source, random.Random(3))
        self.config = config_with_archives(self.state, source, self.name.partition("-")[2])
        self.expected: dict[str, bytes] = {}

    def reset(self) -> None:
        """Remove the dataset, but not the archives."""
        shutil.rmtree(dataset(self.config).parent, ignore_errors=True)

    def work(self) -> None:
        """Run the stage."""
        process.run(self.config, run_of(self.config), DistEnv())

    def check(self) -> None:
        """Check the manifest, every shard and every class folder that is there."""
        if self.expected:
            check_after_kill(self.config, self.expected)

    def result(self) -> Any:
        """Return every file of the dataset."""
        self.expected = self.expected or dataset_bytes(self.config)
        return dataset_bytes(self.config)


class Upload(Scenario):
    """An upload to a folder, to S3 or over ssh; `url` has `{name}` for a new place in each round."""

    def __init__(self, name: str, folder: Path, url: str) -> None:
        super().__init__(name, folder)
        self.place = url
        self.round = 0

    @property
    def url(self) -> str:
        """The datastores of this round."""
        return self.place.format(name=f"round{self.round}")

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Write a dataset."""
        self.folder.mkdir(parents=True)
        self.workspace = Workspace(self.folder)

    def reset(self) -> None:
        """Take another place."""
        shutil.rmtree(self.state, ignore_errors=True)
        self.round += 1

    def work(self) -> None:
        """Run the stage."""
        self.workspace.upload(self.url)

    def check(self) -> None:
        """A complete version must be intact."""
        found = versions.complete_versions(self.url, "digits")
        assert found in ([], [1]), found
        if found:
            self._verify()

    def _verify(self) -> None:
        backend = versions.open_backend(self.url)
        entry = catalog.find_version(backend, "digits")
        assert not catalog.verify_version(backend, entry, 2, lambda *_: None)

    def result(self) -> Any:
        """Return the names of all stored files, after every file was hashed."""
        self._verify()
        assert versions.complete_versions(self.url, "digits") == [1]
        return sorted(versions.open_backend(self.url).files("digits/v1"))


class Fetch(Scenario):
    """`datastores fetch` from a folder."""

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Upload a dataset."""
        self.folder.mkdir(parents=True)
        self.store = str(self.folder / "stores")
        Workspace(self.folder).upload(self.store)

    def work(self) -> None:
        """Fetch the version."""
        backend = versions.open_backend(self.store)
        entry = catalog.find_version(backend, "digits")
        catalog.fetch_version(backend, entry, self.state, 2, lambda *_: None)

    def check(self) -> None:
        """A folder with a manifest must have every file."""
        if (self.state / "digits/v1/manifest.json").exists():
            self.result()

    def result(self) -> Any:
        """Return every file but the manifest, which has a time."""
        return killing.snapshot(self.state / "digits" / "v1", but=("manifest.json",))


class Staging(Scenario):
    """Copies of shards on the node's disk, made by a copy process."""

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Write a version with three shards."""
        workspace = self.folder / "workspace"
        make_dataset(workspace, images=8, image_bytes=800_000)
        self.store = self.folder / "stores"
        self.version = self.store / "digits" / "v1"
        link_version(workspace / "datasets" / "digits", self.version)
        self.manifest = load_manifest(self.version)

    def work(self) -> None:
        """Copy all shards."""
        cache = NodeCache(str(self.state), None)
        copier = CopyProcess(str(self.store), "digits/v1", cache.folder)
        for shard in self.manifest.shards:
            cache.get_or_fetch(shard, copier)
        copier.close()

    def check(self) -> None:
        """A shard that the cache opens must be intact."""
        if self.state.exists():
            self._opened()

    def _opened(self) -> list[str]:
        cache, found = NodeCache(str(self.state), None), []
        for shard in self.manifest.shards:
            if (descriptor := cache.open(shard)) is not None:
                with os.fdopen(descriptor, "rb") as file:
                    assert file.read() == (self.version / shard.path).read_bytes(), shard.path
                found.append(shard.path)
        return found

    def result(self) -> Any:
        """Return the shards that are cached, and the number of files in the cache."""
        return self._opened(), len(list(NodeCache(str(self.state), None).folder.iterdir()))


class Train(Scenario):
    """A training of ten steps with a checkpoint after each."""

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Write a dataset."""
        write_store(self.folder / "store", {"train": 40, "val": 20})

    def work(self) -> None:
        """Train, or go on from the last checkpoint."""
        from hpc_imagenet.training.fit import fit

        torch.set_num_threads(1)
        config = tiny_config()
        config.train.checkpoint_every_minutes = 1e-9
        run = Run(self.state)
        run.folder.mkdir(parents=True, exist_ok=True)
        result = fit(config, DatasetReader(self.folder / "store"), run, DistEnv())
        (self.state / "result.json").write_text(json.dumps({"top1": result["top1"]}))

    def check(self) -> None:
        """Every checkpoint that is there must be readable."""
        for path in (self.state / "checkpoints").glob("*.ckpt"):
            torch.load(path, map_location="cpu", weights_only=True)

    def result(self) -> Any:
        """Return the weights, the metrics and the result."""
        content = torch.load(self.state / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        weights = {name: tensor.numpy().tobytes() for name, tensor in content["state_dict"].items()}
        leftovers = [
            path.name for path in (self.state / "checkpoints").iterdir() if path.name.startswith(".")
        ]
        return weights, (self.state / "result.json").read_text(), leftovers


class Score(Train):
    """An evaluation of a trained checkpoint."""

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Train once."""
        super().prepare(stack)
        super().work()
        self.trained = self.folder / "trained"
        self.state.rename(self.trained)

    def work(self) -> None:
        """Evaluate."""
        from hpc_imagenet.training.score import score

        torch.set_num_threads(1)
        config = tiny_config()
        checkpoint = self.trained / "checkpoints/last.ckpt"
        config.evaluate = Evaluate(str(checkpoint), fingerprint(checkpoint), split="val")
        run = Run(self.state)
        run.folder.mkdir(parents=True, exist_ok=True)
        result = score(config, DatasetReader(self.folder / "store"), run, DistEnv())
        shown = {key: result[key] for key in ("top1", "top5") if key in result}
        (self.state / "result.json").write_text(json.dumps(shown))

    def check(self) -> None:
        """Nothing is shared with the trained run."""

    def result(self) -> Any:
        """Return the accuracy."""
        return (self.state / "result.json").read_text()


def stage_scenarios(folder: Path, s3: str, ssh: str) -> list[Scenario]:
    """Return the scenarios of single stages.

    Args:
        folder: an empty folder.
        s3: URL of a bucket; empty: no S3.
        ssh: host and folder; empty: no ssh.
    """
    found: list[Scenario] = [Download("download", folder / "download")]
    found += [Process(f"process-{layout}", folder / layout) for layout in ("index", "shards", "folders")]
    found.append(Upload("upload-folder", folder / "up", f"{folder}/up/state/{{name}}"))
    if s3:
        found.append(Upload("upload-s3", folder / "s3", f"{s3}/{{name}}"))
    if ssh:
        found.append(Upload("upload-ssh", folder / "ssh", f"{ssh}/{{name}}"))
    found += [Fetch("fetch", folder / "fetch"), Staging("staging", folder / "staging")]
    found += [Train("train", folder / "train"), Score("evaluate", folder / "evaluate")]
    return found
