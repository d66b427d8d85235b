"""Demo of the whole pipeline in minutes: archives over HTTP, index, datastore, two backbones, leaderboard.

    python -m hpc_imagenet.demo [SETTING=VALUE …]

It writes the digits archives, serves them on this machine, and runs the same command as for the real
archives. With cluster=NAME the jobs go to a Slurm cluster, whose nodes cannot reach a server on this machine:
there the download stage makes the archives itself.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from pathlib import Path

from hpc_imagenet.cli import main as cli
from hpc_imagenet.cli.main import print_error
from hpc_imagenet.config.host import config_dir
from hpc_imagenet.config.input.overrides import key_of, with_defaults
from hpc_imagenet.config.input.stored_settings import stored_value
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
  python -m hpc_imagenet jobs                all runs and their states
  python -m hpc_imagenet +stage=pipeline dry_run=true
                                             the same plan for ImageNet (155 GB)
  README.md                                  clusters, recipes, settings

The report with curves, classes and data; open it in a browser: {page}"""


def main() -> None:
    """Run the demo and exit: 0 when both backbones are trained."""
    settings = sys.argv[1:]
    began = time.monotonic()
    try:
        code = _pipeline(settings)
        if code == 0:
            page = report(settings)
            minutes, seconds = divmod(round(time.monotonic() - began), 60)
            print(f"\ntotal time {minutes}:{seconds:02} (min:s)")
            print(NEXT.format(page=page))
    except UserError as error:
        code = print_error(error)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: the server of the archives has stopped; `make demo` resumes from here",
            file=sys.stderr,
        )
        code = 130
    sys.exit(code)


def report(settings: list[str]) -> str:
    """Print the leaderboard of the demo's workspace, write its page, and return the path of the page.

    Raises:
        UserError: the page cannot be written.
    """
    # Where the jobs ran, whatever host is stored; there a relative path begins elsewhere.
    chosen = with_defaults(
        ["cluster=local"], [word for word in settings if key_of(word) in ("workspace", "cluster")]
    )
    if folder := config_dir(settings):
        chosen += ["--config-dir", folder]
    workspace = dict(word.split("=", 1) for word in chosen if "=" in word).get("workspace")
    page = f"{workspace or stored_value('workspace') or 'workspace'}/report.html"
    for arguments in (["report", *chosen], ["report", "--html", page, *chosen]):
        print(f"\n$ python -m hpc_imagenet {shlex.join(arguments)}")
        cli.run(arguments)
    return page


def _pipeline(settings: list[str]) -> int:
    if any(setting.startswith("cluster=") and setting != "cluster=local" for setting in settings):
        return _sweep(*settings)
    with tempfile.TemporaryDirectory(prefix="hpc-imagenet-demo-") as folder:
        digits.write_digits(Path(folder) / "digits")
        with serving(Path(folder) / "digits") as url:
            return _sweep(*with_defaults(["cluster=local", f"dataset.source={url}"], settings))


def _sweep(*settings: str) -> int:
    command = ["-m", *with_defaults(SWEEP, settings)]
    print(f"$ python -m hpc_imagenet {shlex.join(command)}", flush=True)
    return cli.run(command)


if __name__ == "__main__":
    main()
