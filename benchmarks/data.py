"""Tokens a second from prepared data: what a host can feed to its devices.

Data sets of random documents are written, and the batches of a run read from them in turn: by
`Mixture.rows`, and from there onto the devices. Beside them the limits: the same records without
decoding, and the same bytes from a plain file. All are in the page cache, so that it is the
processor that is measured; a disk has to give as many bytes a second as the table says.

    python benchmarks/data.py --lengths 256 4096
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamapro_jax.config import MeshConfig
from llamapro_jax.data.dataset import Rows, open_rows
from llamapro_jax.data.mixture import Mixture
from llamapro_jax.data.packing import pack
from llamapro_jax.data.records import (
    open_builder,
    open_split,
    shard_name,
    write_metadata,
    write_shard,
)
from llamapro_jax.data.rows import DTYPES
from llamapro_jax.errors import UserError
from llamapro_jax.sharding import build_mesh
from llamapro_jax.training.batches import place_batch

VOCABULARY = 32_000
# The columns of the table, in order; the goal is for the first.
PLACED, ROWS, TFDS, RECORDS, FILE = (
    "onto the devices",
    "Mixture.rows",
    "TFDS, row by row",
    "records alone",
    "plain file",
)
SHARDS = 4


def main() -> int:
    args = parse_arguments()
    if min(args.lengths) < 2 or args.tokens < 2 * SHARDS * max(args.lengths):
        print(
            f"error: --tokens {args.tokens} must be some rows for each of {SHARDS} shards, and "
            "--lengths at least 2",
            file=sys.stderr,
        )
        return 2
    print(
        f"{args.tokens:,} tokens in a data set of {SHARDS} shards, {args.batch_tokens:,} in a "
        f"batch; million tokens a second, median of {args.rounds} rounds, and MB/s of records\n"
    )
    columns = (PLACED, ROWS, TFDS, RECORDS, FILE)
    print(f"| tokens a row | sources | {' | '.join(columns)} | MB/s |")
    print("|---|---|" + "---|" * (len(columns) + 1))
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory(dir=args.work_directory) as work:
        for length in args.lengths:
            sets = [write_set(Path(work, f"{length}-{i}"), i, length, args.tokens) for i in (0, 1)]
            for sources in (1, 2):
                rates = measure(sets[:sources], length, args)
                size = sum(file.stat().st_size for file in shards(sets[0])) / args.tokens
                cells = " | ".join(f"{rates[name] / 1e6:,.1f}" for name in columns)
                megabytes = rates[PLACED] * size / 1e6
                print(f"| {length} | {sources} | {cells} | {megabytes:,.0f} |", flush=True)
                found[length] = min(found.get(length, np.inf), rates[PLACED])
    print()
    return print_goals(found, args.goal)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of a row"
    )
    parser.add_argument("--tokens", type=int, default=2**22, help="of a data set (4 million)")
    parser.add_argument("--batch-tokens", type=int, default=2**18, help="of a batch (262,144)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, after one to warm up (9)")
    parser.add_argument("--work-directory", help="where the data sets are written for the time")
    parser.add_argument("--goal", type=float, default=2e6, help="least tokens a second (2,000,000)")
    return parser.parse_args()


def documents(seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        yield rng.integers(0, VOCABULARY, rng.integers(50, 1500)).astype(np.int32)


def write_set(directory: Path, seed: int, length: int, tokens: int) -> Path:
    """A data set as `llamapro prepare` writes it, in several shards."""
    directory.mkdir()
    rows = pack(documents(seed), length)
    count = tokens // length // SHARDS
    written = [
        write_shard(itertools.islice(rows, count), directory / shard_name("train", i))
        for i in range(SHARDS)
    ]
    write_metadata(directory, length, {"train": written})
    return directory


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*array_record*"))


def measure(sets: list[Path], length: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of each way to read the batches of a run, a batch of each in turn."""
    opened = [open_rows(path, sequence_length=length, vocab_size=VOCABULARY) for path in sets]
    sources = [(str(i), rows, 1.0 + i / 2) for i, rows in enumerate(opened)]
    mixture = Mixture(sources, max(1, args.batch_tokens // length), seed=0)
    mesh = build_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    # Without a mixture: as many rows, of the first set.
    numbers = np.random.default_rng(0).integers(0, len(opened[0]), mixture.batch_size).tolist()
    ways: dict[str, Callable[[int], Any]] = {
        PLACED: lambda step: jax.block_until_ready(
            place_batch(functools.partial(mixture.rows, step), mixture.batch_size, length, mesh)
        ),
        ROWS: lambda step: mixture.rows(step, 0, mixture.batch_size),
        TFDS: one_by_one(sets[0], numbers),
        RECORDS: records(sets[0], numbers),
        FILE: plain_file(opened[0], shards(sets[0])[0].with_name("plain"), mixture.batch_size),
    }
    tokens = mixture.batch_size * length
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(args.rounds + 1):
        for name, read in ways.items():
            begin = time.perf_counter()
            read(step)
            if step:
                seconds[name].append(time.perf_counter() - begin)
    return {name: tokens / statistics.median(took) for name, took in seconds.items()}


def one_by_one(directory: Path, numbers: list[int]) -> Callable[[int], Any]:
    """As TFDS reads and decodes them by itself."""
    source = open_split(open_builder(str(directory)), str(directory), "train")
    return lambda step: [source[i] for i in numbers]


def records(directory: Path, numbers: list[int]) -> Callable[[int], Any]:
    source = open_split(open_builder(str(directory)), str(directory), "train").data_source
    return lambda step: source.__getitems__(numbers)


def plain_file(rows: Rows, file: Path, count: int) -> Callable[[int], Any]:
    """The arrays of as many rows, one after the other in a file."""
    size = count * rows.sequence_length * sum(np.dtype(dtype).itemsize for dtype in DTYPES.values())
    file.write_bytes(np.random.default_rng(0).bytes(size))
    return lambda step: np.fromfile(file, np.uint8)


def print_goals(found: dict[int, float], goal: float) -> int:
    """Prints each goal with what was measured. Returns the exit status."""
    for length, rate in found.items():
        print(
            f"goal {length} tokens a row: at least {goal:,.0f} tokens/s onto the devices; "
            f"measured {rate:,.0f}; {'met' if rate >= goal else 'missed'}"
        )
    return 0 if min(found.values()) >= goal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
