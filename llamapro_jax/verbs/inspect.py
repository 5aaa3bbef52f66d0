"""Print what a model is, block by block, or what is in a prepared data set, row by row.

A model is a Flax checkpoint, a run, or a Hugging Face directory: each block, base or new, copied
from which, of which generation. No weights are read, but for a run whose model is a Hugging Face
directory: that one is hashed, to see that it is still the same.

A data set is a TFDS directory with the feature `tokens`, such as `llamapro prepare` writes: its
counts, and a few rows as text, segment by segment, with the tokens that train in colour and the
masked ones dim (in brackets where there is no colour).
"""

from __future__ import annotations

import argparse

HELP = "what a model is, block by block; what a data set holds, row by row"
EXAMPLE = """\
llamapro inspect models/llama2-7b-pro
llamapro inspect models/llama2-7b-pro --json
llamapro inspect data/code --rows 2
llamapro inspect data/code --split validation --row 17"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="MODEL|DATA",
        help="Flax checkpoint, run, Hugging Face directory or hub id; or a prepared data set",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    data = parser.add_argument_group("of a data set")
    data.add_argument("--split", help="such as train or validation[:10%%] (default: train)")
    which = data.add_mutually_exclusive_group()
    which.add_argument(
        "--rows", type=int, metavar="N", help="decode N rows, spread over the split (default: 3)"
    )
    which.add_argument("--row", type=int, metavar="I", help="decode row I alone, from 0")
    data.add_argument(
        "--tokenizer", metavar="PATH", help="directory of the tokenizer (default: the data set's)"
    )


def run(args: argparse.Namespace) -> None:
    from llamapro_jax import inspect

    options = {name: getattr(args, name) for name in ("split", "rows", "row", "tokenizer")}
    options = {name: value for name, value in options.items() if value is not None}
    if inspect.is_data_set(args.path, expected=bool(options)):
        _show_data(args, options)
        return
    inspect.refuse_options(args.path, options)
    description = inspect.describe(args.path)
    print(inspect.as_json(description) if args.json else inspect.as_text(description))


def _show_data(args: argparse.Namespace, options: dict[str, str | int]) -> None:
    from rich.console import Console

    from llamapro_jax.data import show
    from llamapro_jax.inspect import as_json

    description = show.describe(args.path, **options)
    if args.json:
        print(as_json(description))
    else:
        show.print_description(description, Console())
