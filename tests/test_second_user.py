"""What a second user of the machine tries: none of it may succeed.

bob is in alice's group and shares a workspace with her (umask 007); eve is in no group of theirs. What would
execute something as alice creates the file `owned` in her home. `-s` prints a table of the attempts.
"""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import second_user_services  # noqa: F401 - registers its attempts
from other_users import GROUP, ROOT, available, ending, shared_folder
from second_user_scene import ATTEMPTS, CHECKPOINT, DIGITS, DOWNLOAD, Scene, attempt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs root, to act as other users"),
]


READ = "import sys; open(sys.argv[1], 'rb').read()"
APPEND = "import sys; open(sys.argv[1], 'ab').write(b'x')"


@attempt("read the token of a session from its run folder")
def _token(scene: Scene) -> bool:
    script = """
        import sys
        from pathlib import Path
        from hpc_imagenet.session.connection import new_token
        new_token(Path(sys.argv[1]))
    """
    assert not scene.careless.python(textwrap.dedent(script), str(scene.open)).returncode
    return scene.as_eve(READ, str(scene.open / "token"))


@attempt("add a job to the queue of another user")
def _queue_entry(scene: Scene) -> bool:
    script = "import sys; open(sys.argv[1] + '/0.entry', 'w').write('{}')"
    return scene.as_bob(script, str(scene.queue))


@attempt("hold the lock of another user's queue, so that nothing starts")
def _queue_lock(scene: Scene) -> bool:
    script = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'rb'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return scene.as_bob(script, str(scene.queue / "worker.lock"))


@attempt("make the queue of another user beforehand")
def _queue_made_before(scene: Scene) -> bool:
    lab = shared_folder(scene.folder / "queue")
    script = "import os, sys; os.makedirs(sys.argv[1], mode=0o770)"
    assert scene.as_bob(script, str(lab / f"runs/.user-{scene.alice.uid}/queue"))
    (lab / "runs").chmod(0o2770)
    line = scene.alice.refused(*DOWNLOAD, f"workspace={lab}")
    return "belongs to bob" not in line


@attempt("edit the config of another user's run in a group's workspace")
def _edit_config(scene: Scene) -> bool:
    return scene.as_bob(APPEND, str(scene.run / "config.yaml"))


@attempt("replace the folder of another user's run")
def _replace_run(scene: Scene) -> bool:
    return scene.as_bob("import os, sys; os.rename(sys.argv[1], sys.argv[1] + '-old')", str(scene.run))


@attempt("write a log or a record of another user's run")
def _logs(scene: Scene) -> bool:
    records = scene.run / "attempts/1"
    files = [path for path in records.iterdir() if path.is_file()]
    assert len(files) > 4
    return any(scene.as_bob(APPEND, str(path)) for path in (*files, records / "new"))


@attempt("prepare a run with the id that another user will submit, and commands in its config")
def _run_made_before(scene: Scene) -> bool:
    run = scene.prepared
    here = f"workspace={run.parents[1]}"
    scene.alice("evaluate", run.name, here, code=2)  # it is no training, of any user
    commands = (("retry", run.name), (*DOWNLOAD, "dataset.source=/missing"))
    return any(scene.executed(*words, here, because="belongs to bob") for words in commands)


@attempt("start a job of another user from a folder of one's own")
def _task(scene: Scene) -> bool:
    run = scene.prepared
    (run / "attempts/1/outcome.json").unlink()  # an attempt that has ended is refused for that reason
    (pickle,) = run.rglob("*_submitted.pkl")
    job = pickle.name.partition("_")[0]
    for module, *words in (("task", str(run), "1"), ("start_task", str(pickle.parent))):
        command = (sys.executable, "-m", f"hpc_imagenet.launch.tasks.{module}", *words)
        done = scene.alice.run(*command, SUBMITIT_LOCAL_JOB_ID=job)
        assert done.returncode == 1
        assert "belongs to bob" in done.stderr
    return scene.mark.exists()


@attempt("swap the pickle of a job for one with a command")
def _pickle(scene: Scene) -> bool:
    folder = scene.folder / "pickles"
    folder.mkdir()
    os.chown(folder, scene.alice.uid, scene.alice.uid)
    script = f"""
        import os, pickle, sys
        class Evil:
            def __reduce__(self):
                return os.system, ({scene.evil!r},)
        open(sys.argv[1], "wb").write(pickle.dumps(Evil()))
    """
    path = folder / "1_submitted.pkl"
    assert not scene.alice.python(textwrap.dedent(script), str(path)).returncode  # her own file, even
    command = (sys.executable, "-m", "hpc_imagenet.launch.tasks.start_task", str(folder))
    assert "names posix.system" in scene.alice.run(*command, SUBMITIT_LOCAL_JOB_ID="1").stderr
    os.chown(path, scene.bob.uid, scene.bob.uid)
    path.chmod(0o644)
    assert "belongs to bob" in scene.alice.run(*command, SUBMITIT_LOCAL_JOB_ID="1").stderr
    return scene.mark.exists()


@attempt("leave settings in a folder that others work in")
def _stored_settings(scene: Scene) -> bool:
    project = shared_folder(scene.folder / "project")
    text = f'cluster.setup: ["{scene.evil}"]\n'
    scene.write(scene.bob, project / "hpc_imagenet.yaml", text)
    done = scene.executed(*DOWNLOAD, scene.here, "seed=1", "wait=true", because="belongs to bob", cwd=project)
    (project / "hpc_imagenet.yaml").unlink()
    scene.write(
        scene.bob, project / "conf/cluster/mine.yaml", f"defaults: [local]\nsetup: ['{scene.evil}']\n"
    )
    again = scene.executed(
        "+stage=download", "dataset=digits", "cluster=mine", scene.here, because="belongs to bob", cwd=project
    )
    return done or again


@attempt("leave a Python module in a folder that others work in")
def _module(scene: Scene) -> bool:
    project = shared_folder(scene.folder / "modules")
    for name in ("typing", "yaml", "argparse", "torch", "submitit"):
        scene.write(scene.bob, project / f"{name}.py", f"import os; os.system({scene.evil!r})\n")
    return scene.executed(*DOWNLOAD, scene.here, "wait=true", "seed=2", cwd=project, code=0)


@attempt("leave a network in a folder that others work in")
def _network(scene: Scene) -> bool:
    project = shared_folder(scene.folder / "networks")
    text = f"import os; os.system({scene.evil!r})\ndef make(num_classes): pass\n"
    scene.write(scene.bob, project / "net.py", text)
    return scene.executed("model.name=net:make", *DIGITS, scene.here, because="belongs to bob", cwd=project)


@attempt("swap a checkpoint in a shared folder for one with a command in its pickle")
def _checkpoint_pickle(scene: Scene) -> bool:
    script = f"""
        import os, sys, torch
        class Evil:
            def __reduce__(self):
                return os.system, ({scene.evil!r},)
        torch.save({{"state_dict": Evil(), "global_step": 1, "identity": {{}}}}, sys.argv[1])
    """
    path = scene.checkpoints / "best.ckpt"
    assert scene.as_bob(script, str(path))
    return scene.executed(
        "export", str(path), str(scene.alice.home / "out"), scene.here, because="not a checkpoint"
    )


@attempt("put the source of a network into a checkpoint")
def _checkpoint_source(scene: Scene) -> bool:
    layers = "layers.AdaptiveAvgPool2d(1), layers.Flatten(), layers.Linear(3, num_classes)"
    text = f"import os, torch\nos.system({scene.evil!r})\nlayers = torch.nn\n"
    text += f"def make(num_classes): return layers.Sequential({layers})\n"
    scene.write(scene.bob, scene.bob.home / "net.py", text)
    scene.bob.run("chmod", "600", str(scene.bob.home / "net.py"))
    script = CHECKPOINT.format(tests=str(ROOT / "tests"))
    script += "write_trained(Path(sys.argv[1]), config_of('net:make'))\n"
    done = scene.bob.python(script, str(scene.checkpoints / "source.ckpt"), cwd=scene.bob.home)
    assert not done.returncode, done.stderr
    image = scene.alice.home / "image.png"
    scene.write(scene.alice, image, "")
    path = str(scene.checkpoints / "source.ckpt")
    commands = (("export", path, str(scene.alice.home / "out")), ("predict", path, str(image)))
    return any(scene.executed(*words, scene.here, because="belongs to bob") for words in commands)


@attempt("make the cache on a node's disk beforehand, or a link in its place")
def _node_cache(scene: Scene) -> bool:
    scratch = scene.folder / "scratch"
    scratch.mkdir()
    scratch.chmod(0o1777)
    script = f"""
        from hpc_imagenet.datastore.node_cache.cache import NodeCache
        NodeCache({str(scratch)!r})
    """
    name = scratch / f"hpc_imagenet-{scene.alice.uid}"
    assert scene.as_eve("import os, sys; os.mkdir(sys.argv[1]); os.chmod(sys.argv[1], 0o777)", str(name))
    first = scene.alice.python(textwrap.dedent(script))
    name.rmdir()
    assert scene.as_eve("import os, sys; os.symlink(*sys.argv[1:])", str(scene.alice.home), str(name))
    second = scene.alice.python(textwrap.dedent(script))
    assert all("but its owner is eve" in done.stderr for done in (first, second))
    return not (first.returncode and second.returncode)


@attempt("have a link in /tmp removed or followed as a temporary folder")
def _temporary_folder(scene: Scene) -> bool:
    top, kept = scene.public, scene.precious
    link = top / "hpc_imagenet-session-x"
    assert scene.as_eve("import os, sys; os.symlink(*sys.argv[1:])", str(kept.parent), str(link))
    script = "import sys; from pathlib import Path; from hpc_imagenet.io.tempdir import NodeTempDir; "
    script += "NodeTempDir('session', Path(sys.argv[1])).close()"
    assert not scene.alice.python(script, str(top)).returncode
    return not kept.exists()


@attempt("have a link in a shared folder followed by a download, a lock or a record")
def _links(scene: Scene) -> bool:
    lab = shared_folder(scene.folder / "links")
    victim = scene.precious
    archives = lab / "archives/digits"
    names = [archives / f"ILSVRC2012_img_val.tar{end}" for end in (".part", ".receipt.json", "")]
    names += [lab / "datasets/.digits.lock", lab / "datasets/digits/manifest.json"]
    script = """
        import os, sys
        for name in sys.argv[2:]:
            os.makedirs(os.path.dirname(name), mode=0o770, exist_ok=True)
            os.symlink(sys.argv[1], name)
    """
    assert scene.as_bob(script, str(victim), *map(str, names))
    scene.alice("+stage=pipeline", *DIGITS, f"workspace={lab}", "wait=true", "recipe.epochs=1", code=None)
    return victim.read_text() != "kept"


@attempt("make the folder of the shared ssh connection")
def _control_socket(scene: Scene) -> bool:
    runtime = scene.folder / "runtime"
    runtime.mkdir()
    runtime.chmod(0o1777)
    script = "from hpc_imagenet.remote.shared_connection import _control_path; print(_control_path())"
    done = scene.alice.run(sys.executable, "-c", script, XDG_RUNTIME_DIR=str(runtime))
    assert not done.returncode, done.stderr
    return str(runtime) in done.stdout


@attempt("put an image where a container is expected")
def _container(scene: Scene) -> bool:
    public, group = scene.public, shared_folder(scene.folder / "images")
    scene.write(scene.eve, public / "image.sif", "")
    scene.write(scene.bob, group / "image.sif", "")
    script = """
        import sys
        from hpc_imagenet.config.schema import Cluster
        from hpc_imagenet.launch.slurm_jobs.container import check_container
        check_container(Cluster(container=sys.argv[1], container_runtime="podman"))
    """
    done = [
        scene.alice.python(textwrap.dedent(script), str(folder / "image.sif")) for folder in (public, group)
    ]
    assert "belongs to eve" in done[0].stderr
    assert "other users may write" in done[1].stderr
    return any(not each.returncode for each in done)


@attempt("delete another user's datastore, or cancel their jobs, with the commands of this package")
def _commands(scene: Scene) -> bool:
    version = scene.lab / "datastores/digits/v1"
    version.mkdir(parents=True)
    for path in (version.parent.parent, version.parent, version):
        os.chown(path, scene.alice.uid, GROUP)
        path.chmod(0o2770)
    (version / "deleted.json").write_text("{}")
    scene.bob("datastores", "prune", "--yes", "--days=0", scene.here)
    return not version.exists()


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="second-") as name:
        Path(name).chmod(0o755)
        with ending(Path(name)):
            yield Scene(Path(name))


RESULTS: dict[str, bool] = {}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt(scene: Scene, name: str) -> None:
    scene.mark.unlink(missing_ok=True)
    RESULTS[name] = ATTEMPTS[name](scene)
    assert not RESULTS[name], f"a second user could {name}"
    assert not scene.mark.exists(), f"a second user could {name}"


def test_table_of_the_attempts(scene: Scene) -> None:
    for name, succeeded in RESULTS.items():
        print(f"{'SUCCEEDED' if succeeded else 'failed':9}  {name}")
    print(f"{sum(RESULTS.values())} of {len(RESULTS)} attempts succeeded")
    assert len(ATTEMPTS) >= 20
    assert not any(RESULTS.values())
