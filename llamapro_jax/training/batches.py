"""Batches as arrays on the mesh, of which a process reads the rows that its devices need."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from llamapro_jax.data.rows import DTYPES, Row, RowSource, empty_rows, fill_rows
from llamapro_jax.sharding import batch_sharding

# Rows [start, stop) of a batch, as arrays [stop - start, T].
Read = Callable[[int, int], Row]


def place_batch(read: Read, rows: int, length: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch [rows, length] that `read` gives the rows of, laid out over the mesh.

    Each process calls `read` for what its own devices need, once for rows that several share.
    """
    sharding = batch_sharding(mesh)
    parts: dict[tuple[int, int], Row] = {}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        if (start, stop) not in parts:
            parts[start, stop] = read(start, stop)
        return parts[start, stop][name]

    return {
        name: jax.make_array_from_callback(
            (rows, length), sharding, lambda index, name=name: part(name, index), dtype=dtype
        )
        for name, dtype in DTYPES.items()
    }


def evaluation_batch(
    rows: RowSource, first: int, batch_size: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Rows [first, first + batch_size) of a text; those it lacks are padding.

    So are those that fill the batch up to a multiple of what shares it.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    full = -(-batch_size // groups) * groups

    def read(start: int, stop: int) -> Row:
        chosen = range(first + start, min(first + min(stop, batch_size), len(rows)))
        if not chosen:
            return empty_rows(stop - start, rows.sequence_length)
        return fill_rows(rows.read(chosen), stop - start)

    return place_batch(read, full, rows.sequence_length, mesh)
