"""Put the new blocks of a delta onto the base that they were trained on.

BASE is a Flax checkpoint, a Hugging Face directory or a hub id. Another base than the delta's own
is refused: its tensors are hashed and compared with what the delta recorded.
"""

from __future__ import annotations

import argparse

HELP = "put the new blocks of a delta onto their base"
EXAMPLE = "llamapro apply meta-llama/Llama-2-7b-hf exports/delta exports/llama2-7b-pro"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the model that the delta was made on")
    parser.add_argument("delta", metavar="DELTA", help="what `llamapro export --delta` wrote")
    parser.add_argument("destination", metavar="OUT", help="new directory")
    parser.add_argument(
        "--to", choices=("flax", "hf"), help="format of OUT (default: that of BASE)"
    )


def run(args: argparse.Namespace) -> None:
    from llamapro_jax.delta import apply_delta

    fingerprint = apply_delta(args.base, args.delta, args.destination, args.to)
    print(f"{args.destination}: written, fingerprint {fingerprint.digest[:12]}")
