"""What a second user tries with the ports, sockets and shared memory of sessions, jobs and reports."""

from __future__ import annotations

import sys
import textwrap

from command_line import eventually
from second_user_scene import Scene, attempt

READ = "import sys; open(sys.argv[1], 'rb').read()"


@attempt("use the port of a session without its token, enter its folder in /tmp, or find the token in /proc")
def _session(scene: Scene) -> bool:
    settings = ("+stage=session", "cluster=local", f"workspace={scene.open}", "session.listen=loopback")
    scene.careless(*settings)
    (run,) = (scene.open / "runs").glob("*-session*")
    details = run / "attempts/1/session.json"
    try:
        eventually(details.exists, 120)
        script = """
            import glob, json, sys, urllib.request, urllib.error, os
            from pathlib import Path
            port = json.loads(Path(sys.argv[1]).read_text())["port"]
            token = sys.argv[2][::-1]  # else it is found in the command line of this process
            for path in ("api/contents", "api/kernels", "api/terminals", "lab", "api/contents?token=x"):
                try:
                    reply = urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}")
                    if "login" not in reply.url:
                        sys.exit(0)
                except urllib.error.HTTPError as error:
                    assert error.code in (403, 404, 405), error.code
            for folder in glob.glob("/tmp/hpc_imagenet-session-*"):
                try:
                    os.listdir(folder)
                    sys.exit(0)
                except PermissionError:
                    pass
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if token.encode() in (process / "cmdline").read_bytes():
                        sys.exit(0)
                except OSError:
                    pass
            sys.exit(1)
        """
        return scene.as_eve(script, str(details), (run / "token").read_text()[::-1])
    finally:
        scene.careless("cancel", run.name, f"workspace={scene.open}")


@attempt("join the rendezvous of a job with several ranks")
def _rendezvous(scene: Scene) -> bool:
    script = """
        import sys
        from pathlib import Path
        import torch
        from hpc_imagenet.cluster.dist_env import DistEnv
        from hpc_imagenet.runs.store import Run
        from hpc_imagenet.training.distributed import join_ranks
        rank, port = int(sys.argv[1]), int(sys.argv[2])
        join_ranks(Run(Path(sys.argv[3])), DistEnv(rank, 2, rank, 2, port=port), torch.device("cpu"))
        print("joined", flush=True)
        sys.stdin.read()
        torch.distributed.destroy_process_group()
    """
    words = (sys.executable, "-c", textwrap.dedent(script))
    ranks = [scene.alice.start(*words, str(rank), "23456", str(scene.open)) for rank in (0, 1)]
    try:
        assert [rank.stdout and rank.stdout.readline() for rank in ranks] == ["joined\n"] * 2
        attack = """
            import datetime, os, sys
            from pathlib import Path
            os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
            import torch.distributed as dist
            folders = list(Path("/dev/shm").glob("hpc_imagenet-ranks-*"))
            assert folders
            for folder in folders:
                try:
                    os.listdir(folder)
                    sys.exit(0)
                except PermissionError:
                    pass
            try:
                dist.TCPStore("127.0.0.1", 23456, 2, False, datetime.timedelta(seconds=3)).set("a", "b")
            except dist.DistNetworkError:  # nothing listens there
                sys.exit(1)
        """
        return scene.as_eve(attack)
    finally:
        for rank in ranks:
            rank.communicate(timeout=60)


@attempt("read the live report without the token in its address")
def _report(scene: Scene) -> bool:
    server = scene.alice.start(sys.executable, "-m", "hpc_imagenet", "report", "--serve", scene.here)
    try:
        assert server.stdout
        port = server.stdout.readline().rpartition("127.0.0.1:")[2].partition("/")[0]
        assert port.isdigit()
        script = """
            import sys, urllib.request
            for path in ("", "data.json", "x/", "x/data.json", "../", "%2e%2e/"):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/{path}")
                    sys.exit(0)
                except OSError:
                    pass
            sys.exit(1)
        """
        return scene.as_eve(script, port)
    finally:
        server.kill()
        server.communicate()
