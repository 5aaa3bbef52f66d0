"""Measure what a model learned and what it forgot: perplexity, bits per byte, shift, KL.

Each text is a UTF-8 file, a .jsonl with a field `text`, or a directory of them. A model with new
blocks is measured with them on, off (the base, bit for bit), and at each --strength between.
Unshifted, marginal and shifted are the shares of positions whose most likely token is first,
second or third, or later under the base; KL is from the base, in nats a token. For a run the table
is also kept in RUN/evaluation.json with the step of the run, where `llamapro report` finds it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from llamapro_jax.compilation_cache import AUTO, enabled

HELP = "perplexity on texts, and how far the model moved from its base"
EXAMPLE = """\
llamapro evaluate runs/llama2_7b_pro --text prose=data/prose.txt code=data/code.jsonl
llamapro evaluate runs/llama2_7b_pro --text code=src --strength 0.25 0.5 0.75 --json result.json
llamapro evaluate runs/instruct --text prose=data/prose.txt --base models/llama2-7b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="Flax checkpoint, run, Hugging Face directory or hub id")
    add(
        "--text",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        required=True,
        help="a text and what the table calls it",
    )
    add("--generations", type=int, metavar="G", help="the model after G expansions; 0 the original")
    add(
        "--strength",
        type=float,
        metavar="S",
        nargs="+",
        action="extend",
        help="also with what the new blocks add times S, 0 to 1",
    )
    add("--base", metavar="PATH", help="compare with this model (default: MODEL's own base)")
    add("--max-rows", type=int, metavar="N", help="at most the first N rows of each text")
    add(
        "--sequence-length",
        type=int,
        metavar="T",
        help="tokens in a row (default: the run's, else what the model takes, at most 2048)",
    )
    add("--batch-size", type=int, default=8, metavar="B", help="rows at a time (default 8)")
    add("--dtype", default="float32", metavar="TYPE", help="float32 (the default) or bfloat16")
    add("--json", metavar="OUT", help="write all figures into this file")
    add("--allow-bin", action="store_true", help="read .bin weights, which needs PyTorch")


@enabled(AUTO)
def run(args: argparse.Namespace) -> None:
    texts = parse_texts(args.text)
    if args.json:
        check_output(args.json)

    from llamapro_jax.data.text import text_files

    for path in texts.values():  # a text that is missing is found before the model is opened
        text_files(path)

    from llamapro_jax.evaluate import as_json, as_table, default_sequence_length, evaluate
    from llamapro_jax.files import write_json
    from llamapro_jax.model.api import open_model
    from llamapro_jax.training.run_directory import RunSource

    options = {"dtype": args.dtype, "allow_bin": args.allow_bin}
    model = open_model(args.model, generation=args.generations, **options)
    base = open_model(args.base, **options) if args.base else None
    strengths = None
    if args.strength:
        strengths = sorted({1.0, *args.strength, 0.0}, reverse=True)
    length = args.sequence_length
    length = default_sequence_length(model) if length is None else length
    results = evaluate(
        model,
        texts,
        strengths=strengths,
        base=base,
        sequence_length=length,
        batch_size=args.batch_size,
        max_rows=args.max_rows,
        progress=True,
    )
    title = f"{args.model} in {args.dtype}, rows of {length} tokens"
    if args.generations is not None:
        title += f", after {args.generations} expansions"
    table = as_table(results)
    print_table(table, title)
    about = {
        "model": args.model,
        "step": model.source.step if isinstance(model.source, RunSource) else None,
        "base": args.base,
        "generations": args.generations,
        "dtype": args.dtype,
        "sequence_length": length,
        "max_rows": args.max_rows,
    }
    if isinstance(model.source, RunSource):
        shown = {"title": title, "step": about["step"], "max_rows": args.max_rows}
        write_json(model.source.directory / "evaluation.json", {**shown, **table})
    if args.json:
        write_json(args.json, {**about, "results": as_json(results)})


def check_output(path: str) -> None:
    """Raises UserError when a file cannot be written at `path`."""
    from pathlib import Path

    from llamapro_jax.errors import UserError

    if Path(path).is_dir():
        raise UserError(f"--json {path}: is a directory; name the file to write, such as out.json.")
    if not Path(path).parent.is_dir():
        raise UserError(f"--json {path}: {Path(path).parent} is not a directory; make it first.")


def parse_texts(arguments: Sequence[str]) -> dict[str, str]:
    """NAME=PATH arguments. Raises UserError for another form or a name given twice."""
    from llamapro_jax.errors import UserError

    texts: dict[str, str] = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not name or not path:
            raise UserError(f"--text {argument}: must be NAME=PATH, such as code=data/code.txt.")
        if name in texts:
            raise UserError(f"--text {argument}: {name!r} names two texts; give each its own name.")
        texts[name] = path
    return texts


def print_table(table: Mapping[str, Sequence[Any]], title: str) -> None:
    """Prints the table on standard output; "-" stands for a figure that there is not."""
    from rich.console import Console
    from rich.table import Table

    rich_table = Table(title=title, title_justify="left")
    for i, column in enumerate(table["columns"]):
        rich_table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
    for row in table["rows"]:
        rich_table.add_row(*map(cell, row))
    console = Console()
    # A file or a pipe has no width of its own: nothing may wrap there.
    (console if console.is_terminal else Console(width=200)).print(rich_table)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
