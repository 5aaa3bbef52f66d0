"""Convert a Hugging Face (PyTorch) LLaMA or Mistral checkpoint to a Flax checkpoint.

SRC is a directory with safetensors, or a hub id (org/name@revision). The dtype is kept. OUT gets
the arrays (Orbax), config.json, the tokenizer, and a fingerprint: a hash of every tensor.
"""

from __future__ import annotations

import argparse

HELP = "a Hugging Face checkpoint as a Flax checkpoint"
EXAMPLE = """\
llamapro convert meta-llama/Llama-2-7b-hf models/llama2-7b
llamapro convert ./Llama-2-7b-hf models/llama2-7b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="directory or hub id")
    parser.add_argument("destination", metavar="OUT", help="new directory")
    parser.add_argument(
        "--allow-bin",
        action="store_true",
        help="read pytorch_model.bin when there are no safetensors (weights only; needs torch)",
    )


def run(args: argparse.Namespace) -> None:
    from llamapro_jax.convert import convert

    fingerprint = convert(args.source, args.destination, allow_bin=args.allow_bin)
    print(
        f"{args.destination}: {len(fingerprint.tensors)} tensors, "
        f"fingerprint {fingerprint.digest[:12]}"
    )
