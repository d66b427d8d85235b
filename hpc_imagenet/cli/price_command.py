"""The price command: what a submission will cost, as `price=true` prints it, or as JSON."""

from __future__ import annotations

import argparse

from hpc_imagenet.cli.command import Command, add_json
from hpc_imagenet.errors import UserError
from hpc_imagenet.runs.store import RunStore


def _price(store: RunStore, options: argparse.Namespace) -> int:
    if unknown := [item for item in options.settings if "=" not in item and not item.startswith("~")]:
        raise UserError(f"price: {unknown[0]} is not an option or SETTING=VALUE; see price --help")
    from hpc_imagenet.cli.price_plan import print_plan_prices
    from hpc_imagenet.cli.submit import prepare
    from hpc_imagenet.config.compose import compose

    settings = [item for item in options.settings if item != "price=true"]
    configs = compose([*settings, "price=true"], options.multirun, options.config_dir)
    print_plan_prices(prepare(configs), options.json)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", metavar="SETTING=VALUE", nargs="*", help="those of the submission")
    parser.add_argument("-m", "--multirun", action="store_true", help="price a sweep")
    parser.add_argument("-cd", "--config-dir", metavar="FOLDER", help="your own conf/ in addition")
    add_json(parser)


COMMANDS = {
    "price": Command(
        "Print time, GPU-hours, energy and money of a submission's trainings, and submit none of them.",
        _price,
        _add_arguments,
        needs_runs=False,
        composes=True,
        epilog="The same as price=true at the end of a submission. A training of a shape that was never "
        "timed is timed by a short job first.",
    )
}
