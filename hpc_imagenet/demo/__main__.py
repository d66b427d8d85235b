"""The whole way in a few minutes: archives over HTTP → index → datastore → two backbones → leaderboard.

    python -m hpc_imagenet.demo [SETTING=VALUE …]

It writes the digits archives, serves them on this machine, and then gives the same command that the real
archives would get; nothing behind it knows that the source is a toy. With cluster=NAME the jobs go to a Slurm
cluster, whose nodes could not reach such a server: there the download takes the archives from a folder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from hpc_imagenet.cli import main as door
from hpc_imagenet.cli.commands import print_error
from hpc_imagenet.demo import digits
from hpc_imagenet.demo.http_server import serving
from hpc_imagenet.errors import UserError

SWEEP = (
    "+stage=pipeline",
    "dataset=digits",
    "model=resnet18,mobilenet_v3_small",
    "wait=true",
)

NEXT = """
Where to look next:
  the run folders above                      frozen config, logs, metrics, checkpoints
  . .venv/bin/activate                       puts python and hpc-imagenet on the PATH
  python -m hpc_imagenet jobs                every run and its state
  python -m hpc_imagenet +stage=pipeline dry_run=true
                                             what the same would be for ImageNet itself (155 GB)
  README.md                                  clusters, recipes, settings"""


def main() -> None:
    """Run the demo and exit: 0 when both backbones are trained."""
    settings = sys.argv[1:]
    began = time.monotonic()
    try:
        code = _pipeline(settings)
    except UserError as error:
        code = print_error(error)
    except KeyboardInterrupt:
        print("\ninterrupted: the archives are served no more; make demo goes on from here", file=sys.stderr)
        code = 130
    if code == 0:
        words = ["report", *(word for word in settings if word.startswith("workspace="))]
        print(f"\n$ python -m hpc_imagenet {' '.join(words)}")
        door.run(words)
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        print(f"the whole way took {minutes}:{seconds:02}")
        print(NEXT)
    sys.exit(code)


def _pipeline(settings: list[str]) -> int:
    if any(word.startswith("cluster=") and word != "cluster=local" for word in settings):
        return _sweep(*settings)
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-demo-") as folder:
        digits.write_digits(Path(folder) / "digits")
        with serving(Path(folder) / "digits") as url:
            return _sweep("cluster=local", f"dataset.source={url}", *settings)


def _sweep(*settings: str) -> int:
    command = ["-m", *SWEEP, *dict.fromkeys(settings)]
    print(f"$ python -m hpc_imagenet {' '.join(command)}", flush=True)
    return door.run(command)


if __name__ == "__main__":
    main()
