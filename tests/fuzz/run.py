"""Coverage-guided fuzzing of the readers with atheris: `python -m tests.fuzz.run TARGET --minutes M`.

`pip install -e '.[fuzz]'` installs atheris. TARGET is a name in `targets.TARGETS`, or `all`, one after
the other. Inputs that reached new code stay in `--corpus`, from which the next run goes on; an input that
fails is written to `crash-…`, `timeout-…` or `oom-…` in it, and its path is printed. Exit code 1: one was
found.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # as pytest does

SECONDS, MEGABYTES, LENGTH = 10, 2048, 100_000  # limits of one call, and bytes of one input


def main() -> None:
    """Fuzz one target, or all."""
    from targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=10, help="minutes for each target")
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    arguments = parser.parse_args()
    targets = list(TARGETS) if arguments.target == "all" else [arguments.target]
    failed = False
    for name in targets:
        folder = arguments.corpus / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(TARGETS[name].seeds()):
            (folder / f"seed-{number}").write_bytes(seed)
        # In a process of its own, since libFuzzer ends its process.
        command = [sys.executable, __file__, "--fuzz", name, str(folder), str(int(arguments.minutes * 60))]
        failed |= subprocess.run(command, check=False).returncode != 0
    sys.exit(failed)


def fuzz(name: str, folder: str, seconds: str) -> None:
    """Fuzz one target in this process."""
    import atheris

    with atheris.instrument_imports(include=["hpc_imagenet"]):
        from targets import TARGETS

        import hpc_imagenet.report.jobs_table
        import hpc_imagenet.training.loading.decode  # noqa: F401
    options = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}"]
    options += [f"-max_len={LENGTH}", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1"]

    def read(data: bytes) -> None:
        try:
            TARGETS[name].read(data)
        except BaseException:
            path = Path(folder, f"crash-{hashlib.sha1(data).hexdigest()}")
            path.write_bytes(data)
            print(f"written to {path}", flush=True)
            raise

    atheris.Setup([sys.argv[0], *options, folder], read)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(*sys.argv[2:])
    else:
        main()
