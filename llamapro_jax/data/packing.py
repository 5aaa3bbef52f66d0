"""Documents to rows of one fixed length: concatenated and split, or each whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamapro_jax.data.rows import Row, empty_rows
from llamapro_jax.errors import UserError


def pack(documents: Iterable[Sequence[int]], sequence_length: int) -> Iterator[Row]:
    """Rows of `sequence_length` tokens that hold the documents in order, each token exactly once.

    A document is its token ids, begin and end tokens included. What does not fit into a row
    continues in the next one as a new segment with positions from 0. Only the last row has padding.
    Raises UserError when `sequence_length` is below 2, as such rows have nothing to predict.
    """
    _check(sequence_length)
    row, used, segment = empty_rows(sequence_length), 0, 0
    for document in documents:
        tokens = np.asarray(document, np.int32)
        start = 0
        while start < len(tokens):
            count = min(sequence_length - used, len(tokens) - start)
            segment += 1
            place = slice(used, used + count)
            row["tokens"][place] = tokens[start : start + count]
            row["segment_ids"][place] = segment
            row["positions"][place] = np.arange(count)
            row["loss_mask"][place] = True
            start += count
            used += count
            if used == sequence_length:
                yield row
                row, used, segment = empty_rows(sequence_length), 0, 0
    if used:
        yield row


def pack_whole(
    examples: Iterable[tuple[np.ndarray, np.ndarray]], sequence_length: int, open_rows: int = 64
) -> Iterator[Row]:
    """Rows of `sequence_length` tokens that hold each example whole, once, as a segment.

    An example is its token ids and loss mask, 1 to `sequence_length` long. It goes into the row
    with the least room that has enough (best fit) of at most `open_rows` that are not finished;
    when none has, the fullest of them is finished. Rows come in the order they are finished in, the
    last ones in the order they were begun, and follow from the examples and their order alone.

    Raises:
      UserError: `sequence_length` is below 2.
      ValueError: an example is empty or too long.
    """
    _check(sequence_length)
    rows: list[_OpenRow] = []  # the oldest first; of equal ones it is taken
    for tokens, loss_mask in examples:
        if not 1 <= len(tokens) <= sequence_length:
            raise ValueError(f"an example of {len(tokens)} tokens in rows of {sequence_length}")
        fitting = [row for row in rows if row.room >= len(tokens)]
        if fitting:
            best = min(fitting, key=lambda row: row.room)
        else:
            if len(rows) == open_rows:
                yield _finish(rows, min(rows, key=lambda row: row.room))
            best = _OpenRow(empty_rows(sequence_length), sequence_length)
            rows.append(best)
        best.add(tokens, loss_mask)
        if best.room == 0:
            yield _finish(rows, best)
    for row in rows:
        yield row.arrays


@dataclass(eq=False)
class _OpenRow:
    """A row that examples are still added to. room: tokens that are free; segments: so far."""

    arrays: Row
    room: int
    segments: int = 0

    def add(self, tokens: np.ndarray, loss_mask: np.ndarray) -> None:
        start = len(self.arrays["tokens"]) - self.room
        place = slice(start, start + len(tokens))
        self.segments += 1
        self.room -= len(tokens)
        self.arrays["tokens"][place] = tokens
        self.arrays["segment_ids"][place] = self.segments
        self.arrays["positions"][place] = np.arange(len(tokens))
        self.arrays["loss_mask"][place] = loss_mask


def _finish(rows: list[_OpenRow], row: _OpenRow) -> Row:
    rows.remove(row)
    return row.arrays


def _check(sequence_length: int) -> None:
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}; it must be at least 2.")
