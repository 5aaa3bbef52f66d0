"""Context parallelism: the devices along the mesh axis `context` share the tokens of a row.

Under a causal mask a later token has more to see. So n devices cut a row into 2n chunks, and device
i has chunks i and 2n-1-i: all compute the same number of (query, key) pairs. In this order, "laid
out", a row is an array whose length is sharded over `context`.

Queries stay where they are. Keys and values are gathered along the axis, once more in the backward
pass unless everything is saved, and their gradients are summed and scattered back. So a device
holds those of whole rows for one layer at a time: in bfloat16 `4 * S * K * C` bytes a row, for its
own K heads. Llama-3-8B, whose heads are grouped, needs 512 MiB at 131,072 tokens, and LLaMA2-7B,
whose heads are not, as much at 32,768; divided by the devices along `tensor`.

B batch, T the tokens of a row that a device has, S those of the whole row, K key/value heads, C
head dim. In `spread`, which sees all devices, T is the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.model.kernels import Part
from llamapro_jax.sharding import activation, axis_size, place

AXIS = "context"


def order(length: int, parts: int) -> np.ndarray:
    """The index in a row of each token in laid-out order, [length] int32.

    `row[order(length, parts)]` is laid out for so many devices; `np.argsort` of it undoes that.
    """
    return _lay_out(np.arange(length, dtype=np.int32)[None], parts, np)[0]


def spread(row_BT: jax.Array) -> jax.Array:
    """A batch array [B, T] in laid-out order, its length sharded over `context`.

    Takes whole rows, as a batch enters a step. Without a mesh, or with one device along the axis,
    nothing moves.
    """
    parts = axis_size(AXIS)
    return place(row_BT if parts == 1 else _lay_out(row_BT, parts, jnp), activation("BT"))


def attention(
    kernel: Callable[..., jax.Array],
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array:
    """Causal self-attention of the queries that this device has, [B, T, H, C].

    Runs inside of a `jax.shard_map` over all axes of the mesh: the arguments are what a device has
    of arrays in laid-out order. `kernel` is the `attention` of one of `llamapro_jax.model.kernels`.
    """
    parts = jax.lax.axis_size(AXIS)

    def whole(x_BT: jax.Array) -> jax.Array:
        return _natural(jax.lax.all_gather(x_BT, AXIS), parts)

    return kernel(
        q_BTHC,
        whole(k_BTKC),
        whole(v_BTKC),
        segment_ids_BT=None if segment_ids_BT is None else whole(segment_ids_BT),
        sliding_window=sliding_window,
        part=Part(jax.lax.axis_index(AXIS), parts),
    )


def _lay_out(row_BT: Any, parts: int, numpy: Any) -> Any:
    """Whole rows [B, T] in laid-out order; `numpy` is numpy or jax.numpy."""
    B, T = row_BT.shape
    early, late = numpy.split(row_BT.reshape(B, 2, parts, T // (2 * parts)), 2, axis=1)
    return numpy.stack([early[:, 0], late[:, 0, ::-1]], axis=2).reshape(B, T)


def _natural(gathered: jax.Array, parts: int) -> jax.Array:
    """Whole rows [B, S, ...] in their own order, of what each device has, [parts, B, T, ...]."""
    _, B, T, *rest = gathered.shape
    early, late = jnp.split(gathered.reshape(parts, B, 2, T // 2, *rest), 2, axis=2)
    chunks = jnp.concatenate([early[:, :, 0], late[::-1, :, 0]])
    return jnp.moveaxis(chunks, 0, 1).reshape(B, parts * T, *rest)
