"""Fused attention kernels, each causal self-attention over packed rows.

All take `(q_BTHC, k_BTKC, v_BTKC, *, segment_ids_BT, sliding_window)` and return [B, T, H, C] in
the dtype of `q`; `segment_ids_BT` None means one segment a row. A segment is a run of equal ids, so
the keys that a query sees are one interval of indices, `[first, query]`: what `visible_keys` gives,
and what the kernels skip blocks by. Padding is a segment like any other.

B batch, T length, H query heads, K key/value heads, G = H/K, C head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# The name (`jax.ad_checkpoint.checkpoint_name`) of a kernel's output and log-sum-exp. A
# rematerialisation policy that saves it never runs the forward kernel again.
RESIDUALS = "attention"


@dataclass(frozen=True)
class Problem:
    """What decides whether a kernel can run: the machine, the shapes and the rows."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: str
    length: int
    query_heads: int
    kv_heads: int
    head_dim: int
    packed: bool  # segment ids are given
    sliding_window: int | None


def visible_keys(
    segment_ids_BT: jax.Array | None, shape: tuple[int, int], sliding_window: int | None
) -> tuple[jax.Array, jax.Array]:
    """The first key that each query sees and the last query that sees each key, [B, T] int32.

    Query `i` sees key `j` where `first[i] <= j <= i`, which is where `j <= i <= last[j]`. Neither
    ever decreases along a row.
    """
    T = shape[1]
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), shape)
    if segment_ids_BT is None:
        first_BT, last_BT = jnp.zeros_like(index_BT), jnp.full_like(index_BT, T - 1)
    else:
        ends_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
        border_B1 = jnp.ones_like(ends_BT, shape=(shape[0], 1))
        starts_BT = jnp.concatenate([border_B1, ends_BT], axis=1)
        ends_BT = jnp.concatenate([ends_BT, border_B1], axis=1)
        first_BT = jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)
        last_BT = jax.lax.cummin(jnp.where(ends_BT, index_BT, T - 1), axis=1, reverse=True)
    if sliding_window is not None:
        first_BT = jnp.maximum(first_BT, index_BT - (sliding_window - 1))
        last_BT = jnp.minimum(last_BT, index_BT + (sliding_window - 1))
    return first_BT, last_BT


def pad_visible(visible_BT: jax.Array, length: int) -> jax.Array:
    """Extends what `visible_keys` gave to `length`: the new rows see themselves alone."""
    B, T = visible_BT.shape
    alone_BT = jnp.broadcast_to(jnp.arange(T, length, dtype=jnp.int32), (B, length - T))
    return jnp.concatenate([visible_BT, alone_BT], axis=1)


def pad_length(x_BTHC: jax.Array, length: int) -> jax.Array:
    """Zeros after the end of every row, up to `length`; the array itself when none are missing."""
    missing = length - x_BTHC.shape[1]
    return jnp.pad(x_BTHC, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x_BTHC


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def walk(
    low: Any, full_low: Any, full_high: Any, high: Any, step: Callable[..., Any], carry: Any
) -> Any:
    """Runs `carry = step(block, carry, masked)` for the blocks of [low, high).

    Those of [full_low, full_high) are seen whole and need no mask; the bounds may be traced.
    """
    full_high = jnp.maximum(full_high, low)
    full_low = jnp.minimum(full_low, full_high)
    masked, full = (functools.partial(step, masked=masked) for masked in (True, False))
    carry = jax.lax.fori_loop(low, full_low, masked, carry)
    carry = jax.lax.fori_loop(full_low, full_high, full, carry)
    return jax.lax.fori_loop(full_high, high, masked, carry)
