"""Global batches: each process reads what its devices need, padding fills the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from devices import Devices, fixture

from llamapro_jax.config import MeshConfig
from llamapro_jax.data.rows import Row, stack_rows

LENGTH = 6
devices = fixture(8)


class Counting:
    """Rows whose tokens are their number, and a record of which were read."""

    sequence_length = LENGTH

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        self.seen.append(index)
        ones = np.ones(LENGTH, np.int32)
        return {
            "tokens": ones * index,
            "segment_ids": ones,
            "positions": np.arange(LENGTH, dtype=np.int32),
            "loss_mask": ones.astype(bool),
        }

    def read(self, indices: Sequence[int]) -> Row:
        return stack_rows([self[index] for index in indices], len(indices))


def evaluated(length: int, first: int, batch_size: int, mesh: tuple[int, ...]) -> Any:
    """(tokens of the first column, padding or not, rows read, largest part on a device)"""
    import jax

    from llamapro_jax.sharding import build_mesh
    from llamapro_jax.training.batches import evaluation_batch

    rows = Counting(length)
    count = int(np.prod(mesh))
    batch = evaluation_batch(
        rows, first, batch_size, build_mesh(MeshConfig(*mesh), jax.devices()[:count])
    )
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "loss_mask": "bool",
    }
    tokens = np.asarray(batch["tokens"])
    parts = [shard.data.shape for shard in batch["tokens"].addressable_shards]
    return tokens[:, 0], np.asarray(batch["segment_ids"])[:, 0], rows.seen, max(parts)


@pytest.mark.parametrize(
    ("length", "first", "batch_size", "mesh", "tokens", "part"),
    [
        (20, 4, 4, (1, 1, 1, 1), [4, 5, 6, 7], 4),
        (6, 4, 4, (1, 1, 1, 1), [4, 5, None, None], 4),
        (20, 4, 8, (2, 2, 2, 1), [4, 5, 6, 7, 8, 9, 10, 11], 2),
        (20, 6, 6, (2, 2, 1, 1), [6, 7, 8, 9, 10, 11, None, None], 2),
        (5, 0, 8, (1, 8, 1, 1), [0, 1, 2, 3, 4, None, None, None], 1),
    ],
)
def test_rows_lie_over_data_and_fsdp_and_padding_fills(
    devices: Devices,
    length: int,
    first: int,
    batch_size: int,
    mesh: tuple[int, ...],
    tokens: list[int | None],
    part: int,
) -> None:
    found, segments, read, largest = devices(evaluated, length, first, batch_size, mesh)
    assert largest == (part, LENGTH)
    assert [int(t) if s else None for t, s in zip(found, segments, strict=True)] == tokens
    # Each row once, though several devices and four arrays have it.
    assert sorted(read) == [token for token in tokens if token is not None]
