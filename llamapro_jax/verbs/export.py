"""Write a model as a Hugging Face directory that transformers, vLLM and llama.cpp load.

Sharded safetensors, config, tokenizer, model card. What was not trained comes byte for byte from
the converted checkpoint. After writing, the files are read back and their logits compared.
--delta writes only the new blocks and the plan; `llamapro apply` puts them onto the same base.
"""

from __future__ import annotations

import argparse
import math

HELP = "a model or a run as a Hugging Face directory"
EXAMPLE = """\
llamapro export runs/llama2_7b_pro exports/llama2-7b-pro
llamapro export runs/llama2_7b_pro exports/half --strength 0.5 --dtype bfloat16
llamapro export runs/llama2_7b_pro exports/delta --delta"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="run, Flax checkpoint, or directory")
    parser.add_argument("destination", metavar="OUT", help="new directory")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: as the base is stored)"
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, help="0..1, how much the new blocks add"
    )
    parser.add_argument(
        "--generations", type=int, metavar="G", help="the model as it was after generation G"
    )
    parser.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="largest file (default 5)"
    )
    parser.add_argument("--license", default="other", help="for the model card (default: other)")
    parser.add_argument("--delta", action="store_true", help="only the new blocks and the plan")


def run(args: argparse.Namespace) -> None:
    from llamapro_jax.delta import write_delta
    from llamapro_jax.errors import UserError
    from llamapro_jax.export import export

    if not 0 < args.shard_size < math.inf:
        raise UserError(f"--shard-size is {args.shard_size}; it must be a positive number.")
    shard_bytes = int(args.shard_size * 1e9)
    if args.delta:
        if args.dtype or args.strength != 1.0 or args.generations is not None:
            raise UserError("--delta takes the new blocks as they are; leave out other options.")
        count = write_delta(args.source, args.destination, shard_bytes)
        print(f"{args.destination}: {count:,} parameters of the new blocks")
        return
    done = export(
        args.source,
        args.destination,
        dtype=args.dtype,
        strength=args.strength,
        generation=args.generations,
        shard_bytes=shard_bytes,
        licence=args.license,
    )
    print(
        f"{args.destination}: {done.parameters:,} parameters in {done.dtype}; reloaded logits "
        + (
            "are bitwise those of the model"
            if done.largest_difference == 0
            else f"differ by at most {done.largest_difference:.3g}, from the cast to {done.dtype}"
        )
    )
    if done.frozen_bits:
        print(f"0 of {done.frozen_bits:,} frozen bits changed")
