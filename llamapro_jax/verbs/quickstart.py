"""The whole path on a small model: minutes on two CPU cores, no network, no PyTorch.

Makes a real base from text that every Python carries, converts and grows it, teaches the new blocks
Python code, measures what it learned and forgot beside full fine-tuning, exports it and loads it
again. Each step is shown as the command that does it. The same command again keeps what is done.
Exit status 1 when one of the checks at the end fails.
"""

from __future__ import annotations

import argparse

HELP = "the whole path on a small model, in minutes"
EXAMPLE = """\
llamapro quickstart
llamapro quickstart --out runs/second --seed 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        default="runs/quickstart",
        metavar="DIR",
        help="where everything goes (default runs/quickstart)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights and order (default 0)"
    )
    # For tests: the path alone, with too little training to pass the checks on learning.
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from llamapro_jax.errors import UserError

    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must not be negative.")

    from dataclasses import replace
    from pathlib import Path

    from llamapro_jax.quickstart.path import quickstart
    from llamapro_jax.quickstart.settings import FULL, TINY

    settings = replace(TINY if args.tiny else FULL, seed=args.seed)
    try:
        return 0 if quickstart(Path(args.out), settings) else 1
    except KeyboardInterrupt:
        print("\nWhat is done is kept; the same command again goes on from here.")
        raise
