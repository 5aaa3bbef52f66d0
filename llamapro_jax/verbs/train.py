"""Train what the plan says: the new blocks, or more, on the texts of a configuration.

The same command again goes on from the last checkpoint. CONFIG is a YAML file, and any setting
can be changed behind it as key.path=value; docs/configuration.md lists them all. Ctrl-C and
SIGTERM end the step, save, and exit with status 130 and 42. Two runs never write into one
directory: the second is refused, or with --takeover the first one ends, with status 45.
"""

from __future__ import annotations

import argparse
import sys

from llamapro_jax import exit_codes

HELP = "train the new blocks (or more) on texts; run again to resume"
EXAMPLE = """\
llamapro train configs/llama2_7b_pro.yaml
llamapro train configs/llama2_7b_pro.yaml optimizer.learning_rate=3e-4 output=runs/second"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="end the run that trains in the output directory now, and go on from its newest "
        "checkpoint",
    )
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", help="a setting that differs from CONFIG"
    )


def run(args: argparse.Namespace) -> int:
    from llamapro_jax.config import load_config

    config = load_config(args.config, args.overrides)

    from llamapro_jax import xla

    flags = xla.apply(config.xla)  # before jax is imported, below

    from llamapro_jax.launch.processes import is_first, joined
    from llamapro_jax.training.loop import train
    from llamapro_jax.training.stopping import Stopped, end_if_compiling

    try:
        with joined():
            if is_first():
                print(*flags, sep="\n", end="\n" * bool(flags), flush=True)
            train(config, takeover=args.takeover)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        end_if_compiling(stopped.status)
        return stopped.status
    except SystemExit as told:  # process 0 has shown why
        end_if_compiling(exit_codes.status_of(told))
        raise
    return exit_codes.DONE
