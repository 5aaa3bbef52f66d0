"""Check that what lies in a directory is still what was written there, to the bit.

A Flax checkpoint, a run, an export or any Hugging Face directory, a delta, a prepared data set:
every file is read, every tensor that has a recorded hash is compared with it, and all problems are
listed. With --base also that the model, without its new blocks, is that base bit for bit. Nothing
is written, and no code that comes with a model is run. The exit status is 0 when all is good and 1
when something is not.
"""

from __future__ import annotations

import argparse

HELP = "is it still what was written? hashes, structure, and that the base is the base"
EXAMPLE = """\
llamapro verify models/llama2-7b-pro --base models/llama2-7b
llamapro verify runs/llama2_7b_pro
llamapro verify exports/llama2-7b-pro --base meta-llama/Llama-2-7b-hf --json
llamapro verify data/code"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        help="Flax checkpoint, run, Hugging Face directory or hub id, delta, prepared data set",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="a model that it grew from, in any format: prove that it is unchanged within",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")


def run(args: argparse.Namespace) -> int:
    import json

    from llamapro_jax.verify import verify

    findings = verify(args.path, args.base)
    print(json.dumps(findings.as_json(), indent=2) if args.json else findings.as_text())
    return 0 if findings.good else 1
