"""Several sources with weights to batches: a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from llamapro_jax.config_data import ROWS
from llamapro_jax.data.rows import Row, RowSource, empty_rows
from llamapro_jax.errors import UserError

Weight = float | Fraction
Source = tuple[str, RowSource, Weight]


class Mixture:
    """Batches from sources `(name, rows, weight)`; a weight is a share of the rows.

    Row k of the run (k = step x batch_size + b) is decided by arithmetic alone: which source it is
    from by the weights, taken as the decimal numbers they are written as, and which row of that
    source by the permutation of (seed, name, epoch). So the state of the data is the step; any
    part of any batch can be read by any host; each source's rows come once an epoch, in another
    order each time; and after any number of rows each source has had its share to within the
    number of sources. Adding a source leaves the order within the others as it was.

    Raises UserError for no source, duplicate names, an empty source, sources of different sequence
    lengths, a weight that is not a positive number, a batch size below 1 and a negative seed.
    """

    def __init__(self, sources: Sequence[Source], batch_size: int, seed: int) -> None:
        _check(sources, batch_size, seed)
        self.names = [name for name, _, _ in sources]
        self.batch_size = batch_size
        self.sequence_length = sources[0][1].sequence_length
        self._rows = [rows for _, rows, _ in sources]
        self._shares = whole_shares([weight for _, _, weight in sources])
        self.lengths = [len(rows) for _, rows, _ in sources]
        self.shares = [Fraction(share, sum(self._shares)) for share in self._shares]
        self._orders = [_Order(len(rows), seed, name) for name, rows, _ in sources]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The global batch of a step (from 0): the row's arrays [B, T], and `source` [B] int32."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows [start, stop) of the global batch of `step`, equal to the same rows of `batch`."""
        places = self._places(step, start, stop)
        of_source: dict[int, tuple[list[int], list[int]]] = {}
        for b, (source, index) in enumerate(places):
            where, indices = of_source.setdefault(source, ([], []))
            where.append(b)
            indices.append(index)
        read = {
            source: (where, self._rows[source].read(indices))
            for source, (where, indices) in of_source.items()
        }
        batch = _interleave(list(read.values()), stop - start, self.sequence_length)
        batch["source"] = np.array([source for source, _ in places], np.int32)
        return batch

    def places(self, step: int) -> list[tuple[str, int]]:
        """Of each row of the global batch of a step, its source's name and its number there."""
        found = self._places(step, 0, self.batch_size)
        return [(self.names[source], index) for source, index in found]

    def _places(self, step: int, start: int, stop: int) -> list[tuple[int, int]]:
        chosen = picks(step * self.batch_size + start, stop - start, self._shares)
        return [(source, self._orders[source][count]) for source, count in chosen]


def _interleave(
    parts: Sequence[tuple[list[int], Row]], rows: int, length: int
) -> dict[str, np.ndarray]:
    """Rows [n, T] of each part at its places of the batch."""
    if len(parts) == 1:
        return dict(parts[0][1])
    batch = empty_rows(rows, length)
    for where, part in parts:
        for name, array_NT in part.items():
            batch[name][where] = array_NT
    return batch


def exact(weight: Weight) -> Fraction:
    """A float is the decimal number that it prints as."""
    return weight if isinstance(weight, Fraction) else Fraction(repr(float(weight)))


def parts(
    weights: Sequence[float | Literal["rows"]], lengths: Sequence[int], share: Weight = 1.0
) -> list[Fraction]:
    """Each source's part of `share`, in exactly the ratio of the weights.

    The weight `rows` is the source's number of rows, so that one pass over all of them takes each
    row once.
    """
    taken = [
        Fraction(length) if weight == ROWS else exact(weight)
        for weight, length in zip(weights, lengths, strict=True)
    ]
    return [exact(share) * weight / sum(taken) for weight in taken]


def whole_shares(weights: Sequence[Weight]) -> list[int]:
    """The smallest whole numbers in exactly the ratio of the weights as they print in decimal."""
    fractions = [exact(weight) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*whole)
    return [share // divisor for share in whole]


def counts_before(k: int, shares: Sequence[int]) -> list[int]:
    """How many of the first k rows each source gives: its share to within the number of sources.

    Split off one source after the other: of the rows that are left, the floor of the remaining
    sources' share passes on. Each count grows with k by 0 or 1, and one at a time, which floors of
    the shares taken singly would not give. Python's integers keep it exact for any k.
    """
    left, remaining, counts = k, sum(shares), []
    for share in shares:
        passed = left * (remaining - share) // remaining
        counts.append(left - passed)
        left, remaining = passed, remaining - share
    return counts


def picks(first: int, count: int, shares: Sequence[int]) -> list[tuple[int, int]]:
    """Rows [first, first + count) of the mixture: the source of each, and how many of that source
    came before it."""
    found = []
    before = counts_before(first, shares)
    for k in range(first + 1, first + count + 1):
        after = counts_before(k, shares)
        source = next(i for i, counted in enumerate(after) if counted > before[i])
        found.append((source, before[source]))
        before = after
    return found


class _Order:
    """The order of a source's rows, epoch after epoch.

    An epoch's permutation sorts the raw output of a Philox generator keyed by (seed, name, epoch).
    Raw output is specified for all time, unlike `Generator.permutation`, which NumPy may change.
    """

    def __init__(self, length: int, seed: int, name: str) -> None:
        self._length = length
        self._key = f"{seed} {name}"
        self._epoch_and_order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, count: int) -> int:
        epoch, index = divmod(count, self._length)
        # One tuple, taken and set whole: a reader in another thread never sees half of it.
        cached = self._epoch_and_order
        if cached is None or cached[0] != epoch:
            cached = self._epoch_and_order = (epoch, self._permutation(epoch))
        return int(cached[1][index])

    def _permutation(self, epoch: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self._key} {epoch}".encode()).digest()
        key = int.from_bytes(digest[:16], "little")
        raw = np.random.Philox(key=key).random_raw(self._length)
        kind = np.uint32 if self._length <= 2**32 else np.uint64
        return np.argsort(raw, kind="stable").astype(kind)


def _check(sources: Sequence[Source], batch_size: int, seed: int) -> None:
    if not sources:
        raise UserError("data: names no source; give at least one with name, path and weight.")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must not be negative.")
    names = [name for name, _, _ in sources]
    for name, rows, weight in sources:
        if names.count(name) > 1:
            raise UserError(f"data source {name!r}: the name is used twice; rename one of them.")
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"data source {name!r}: weight is {weight}; it must be positive. "
                "To leave a source out, remove it."
            )
        if len(rows) == 0:
            raise UserError(f"data source {name!r}: is empty; remove it or give it text.")
    lengths = {name: rows.sequence_length for name, rows, _ in sources}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise UserError(f"data sources have different sequence lengths ({found}); make them equal.")
