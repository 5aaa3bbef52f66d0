"""Print what a model is: each block, base or new, copied from which, of which generation.

MODEL is a Flax checkpoint, a run, or a Hugging Face directory. No weights are read, but for a run
whose model is a Hugging Face directory: that one is hashed, to see that it is still the same.
"""

from __future__ import annotations

import argparse

HELP = "the plan of a model, block by block"
EXAMPLE = """\
llamapro inspect models/llama2-7b-pro
llamapro inspect models/llama2-7b-pro --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Flax checkpoint, run, directory, hub id")
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")


def run(args: argparse.Namespace) -> None:
    from llamapro_jax import inspect

    description = inspect.describe(args.model)
    print(inspect.as_json(description) if args.json else inspect.as_text(description))
