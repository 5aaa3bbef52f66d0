"""Documents to rows of one fixed length: concatenate, then split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llamapro_jax.data.rows import Row, empty_rows
from llamapro_jax.errors import UserError


def pack(documents: Iterable[Sequence[int]], sequence_length: int) -> Iterator[Row]:
    """Rows of `sequence_length` tokens that hold the documents in order, each token exactly once.

    A document is its token ids, begin and end tokens included. What does not fit into a row
    continues in the next one as a new segment with positions from 0. Only the last row has padding.
    Raises UserError when `sequence_length` is below 2, as such rows have nothing to predict.
    """
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}; it must be at least 2.")
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
