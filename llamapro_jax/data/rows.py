"""The row: what every data set, batch and loss in this package agrees on.

A row has a fixed length T and four arrays:

- `tokens` int32: token ids;
- `segment_ids` int32: 1, 2, ... for the documents (or parts of them) in the row, 0 for padding;
- `positions` int32: the position within the segment, from 0;
- `loss_mask` bool: whether the token counts when it is the *target* of a prediction.

A batch is the same four arrays with a leading axis B. Shapes: B batch, T sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Row = dict[str, np.ndarray]

DTYPES: dict[str, type] = {
    "tokens": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.bool_,
}


class RowSource(Protocol):
    """Random access to rows that all have the same length."""

    @property
    def sequence_length(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def read(self, indices: Sequence[int]) -> Row:
        """Rows [n, T], in this order."""


def empty_rows(*shape: int) -> Row:
    """Padding alone: the four arrays, all zero, each of the given shape."""
    return {name: np.zeros(shape, dtype) for name, dtype in DTYPES.items()}


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Positions [..., T] int32 that restart at 0 wherever the segment changes; 0 in padding."""
    index_T = np.arange(segment_ids.shape[-1], dtype=np.int32)
    starts = np.ones(segment_ids.shape, bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    start = np.maximum.accumulate(np.where(starts, index_T, 0), axis=-1)
    return np.where(segment_ids != 0, index_T - start, 0).astype(np.int32)


def complete_row(features: Mapping[str, np.ndarray]) -> Row:
    """The four arrays of a row [T], or of rows [n, T], that has at least `tokens`.

    An absent `segment_ids` means one document and no padding; absent `positions` follow from the
    segments; an absent `loss_mask` lets every token that is not padding count.
    """
    tokens = np.asarray(features["tokens"], np.int32)
    segment_ids = np.asarray(features.get("segment_ids", np.ones_like(tokens)), np.int32)
    positions = features.get("positions")
    if positions is None:
        positions = positions_of(segment_ids)
    loss_mask = features.get("loss_mask", segment_ids != 0)
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": np.asarray(positions, np.int32),
        "loss_mask": np.asarray(loss_mask, np.bool_),
    }


def stack_rows(rows: Sequence[Row], batch_size: int) -> Row:
    """Batch arrays [B, T] from at most B rows; what is missing is padding (segment 0)."""
    batch = empty_rows(batch_size, len(rows[0]["tokens"]))
    for b, row in enumerate(rows):
        for name, array_BT in batch.items():
            array_BT[b] = row[name]
    return batch


def fill_rows(rows: Row, batch_size: int) -> Row:
    """Rows [n, T] and, behind them, as much padding (segment 0) as makes a batch [B, T]."""
    batch = empty_rows(batch_size, rows["tokens"].shape[1])
    for name, array_BT in batch.items():
        array_BT[: len(rows[name])] = rows[name]
    return batch


def targets_and_weights(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """What each position predicts, and whether that counts.

    The target at t is the token at t + 1. Its weight is 1 when both are in the same segment, that
    segment is not padding, and `loss_mask` is set at t + 1; else 0. The last position has weight 0.
    Without `segment_ids` each row is one document and has no padding.

    Takes arrays [B, T] of NumPy or JAX (also inside `jit`) and returns the same kind:
    `targets_BT` int32 and `weights_BT` float32.
    """
    tokens_BT, segment_ids_BT = batch["tokens"], batch.get("segment_ids")
    xp = tokens_BT.__array_namespace__()
    last = ((0, 0), (0, 1))  # padding, for the last position predicts nothing
    targets_BT = xp.pad(tokens_BT[:, 1:], last)
    counts = batch["loss_mask"][:, 1:] != 0
    if segment_ids_BT is not None:
        counts = counts & (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1])
        counts = counts & (segment_ids_BT[:, 1:] != 0)
    weights_BT = xp.pad(counts.astype(xp.float32), last)
    return targets_BT, weights_BT
