"""Insert zero-initialised copies of some blocks, and prove that the model is still the same.

--blocks 8 is the paper's plan: the base blocks in 8 groups, a copy of the top block of each group
on top of it. --after names base blocks, counted from 0, each followed by a copy of itself.
SRC may be a Flax checkpoint, a Hugging Face directory or a run. An expanded model or a run grows
again: its new blocks become part of the base, and only those inserted now will train.
"""

from __future__ import annotations

import argparse

HELP = "insert zero-initialised blocks; the identity is proven"
EXAMPLE = """\
llamapro expand models/llama2-7b models/llama2-7b-pro --blocks 8
llamapro expand models/llama2-7b models/top-heavy --after 15,23,31
llamapro expand runs/code models/code-then-law --blocks 4"""


def positions(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 3,7,11") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="model to grow")
    parser.add_argument("destination", metavar="OUT", help="new directory")
    parser.add_argument("--blocks", type=int, metavar="N", help="how many blocks to insert")
    parser.add_argument(
        "--per-group", type=int, metavar="P", help="copies on top of each group (default 1)"
    )
    parser.add_argument(
        "--after", type=positions, metavar="I,J,...", help="blocks to copy, counted from 0"
    )
    parser.add_argument(
        "--to", choices=("flax", "hf"), help="format of OUT (default: that of SRC)"
    )
    parser.add_argument(
        "--no-proof", action="store_true", help="skip the identity proof (two forward passes)"
    )
    parser.add_argument(
        "--allow-bin", action="store_true", help="as for convert, when SRC is a directory of .bin"
    )


def run(args: argparse.Namespace) -> None:
    from llamapro_jax.expand import expand

    proof = expand(
        args.source,
        args.destination,
        blocks=args.blocks,
        per_group=args.per_group,
        positions=args.after,
        to=args.to,
        prove=not args.no_proof,
        allow_bin=args.allow_bin,
    )
    print(f"{args.destination}: written")
    print(proof if proof is not None else "identity not proven (--no-proof)")
