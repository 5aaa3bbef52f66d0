"""Tokenise and pack texts once, into data sets that training reads by row number.

CONFIG is a YAML file, and any setting can be changed behind it as key.path=value;
docs/configuration.md lists them. Each source becomes a TFDS data set in ArrayRecord,
output/NAME. All sources are checked before the first is read. After a kill the same command
goes on with what is not finished; a data set that is there is left as it is.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamapro_jax.data.preparation.config import PrepareConfig
    from llamapro_jax.data.preparation.prepare import Preparation

HELP = "tokenise and pack texts once, into data sets for training"
EXAMPLE = """\
llamapro prepare configs/prepare_llama_pro.yaml
llamapro prepare configs/prepare_llama_pro.yaml workers=8 sources.0.path=texts/proof-pile-2"""
STOPPED = "stopped; run the same command again to go on with what is not finished"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the data sets")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", help="a setting that differs from CONFIG"
    )


def run(args: argparse.Namespace) -> None:
    from llamapro_jax.data.preparation.config import load_prepare_config

    planned = preparations(load_prepare_config(args.config, args.overrides))
    # All are looked at before the first is made: files and options of another data set in the
    # place of one are found now, not in hours.
    done = [one.is_done() for one in planned]
    for one, there in zip(planned, done, strict=True):
        if not there:
            one.check_beginning()
    for one, there in zip(planned, done, strict=True):
        if there:
            print(f"{one.directory}: is prepared already", flush=True)
        else:
            one.run()
    print_table(planned)


def preparations(config: PrepareConfig) -> list[Preparation]:
    """All sources, checked: tokenizer, files, template. Raises UserError for the first that fails.

    A hub id's tokenizer is downloaded, nothing else of the model.
    """
    from llamapro_jax.data.preparation.prepare import Preparation
    from llamapro_jax.data.readers.documents import Content
    from llamapro_jax.hf import hub
    from llamapro_jax.hf.tokenizer import load_tokenizer
    from llamapro_jax.local_copies import path_here

    tokenizer = load_tokenizer(hub.resolve(config.tokenizer, patterns=hub.TOKENIZER_PATTERNS))
    tokenizer.encode("", eos=True)  # raises without an end token, which documents end with
    return [
        Preparation(
            Content(path_here(source.path), source.kind, source.field, source.split),
            tokenizer,
            config.sequence_length,
            config.target(source),
            template=source.template,
            held_out=source.held_out,
            max_bad=source.max_bad,
            workers=config.workers,
            label=source.name,
        )
        for source in config.sources
    ]


def print_table(planned: list[Preparation]) -> None:
    """What was made of each source, and the lines for a run's configuration."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llamapro_jax.data.preparation.shards import HELD_OUT

    table = Table(title="prepared", title_justify="left")
    for i, column in enumerate(
        ("source", "documents", "tokens", "rows", "padding", "bad", "left out", "where")
    ):
        table.add_column(column, justify="left" if i in (0, 7) else "right", overflow="fold")
    for one in planned:
        table.add_row(*map(escape, figures(one)))
    console = Console()
    # A file or a pipe has no width of its own: nothing may wrap there.
    (console if console.is_terminal else Console(width=200)).print(table)
    print("For a run's configuration:")
    for one in planned:
        print(f"  - {{name: {one.label}, kind: tfds, path: {one.directory}}}")
    held_out = [one for one in planned if one.held_out > 0]
    if held_out:
        print("and for its data.eval:")
    for one in held_out:
        where = f"name: {one.label}, kind: tfds, path: {one.directory}, split: {HELD_OUT}"
        print(f"  - {{{where}}}")


def figures(one: Preparation) -> tuple[str, ...]:
    """A row of the table. Left out are conversations, and turns at the end of them, too long."""
    from llamapro_jax.data.preparation.prepare import read_fingerprint

    record = read_fingerprint(one.directory)
    assert record is not None
    cells = record["rows"] * record["sequence_length"]
    dropped, turns_cut = record.get("dropped", 0), record.get("turns_cut", 0)
    left_out = f"{dropped:,} conversations, {turns_cut:,} turns" if dropped or turns_cut else "-"
    return (
        one.label or "",
        f"{record['documents']:,}",
        f"{record['tokens']:,}",
        f"{record['rows']:,}",
        f"{100 * (1 - record['tokens'] / cells):.2f} %",
        f"{record.get('bad', 0):,}",
        left_out,
        str(one.directory),
    )
