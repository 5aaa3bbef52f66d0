"""Fused attention kernels, each causal self-attention over packed rows.

All take `(q_BTHC, k_BSKC, v_BSKC, *, segment_ids_BT, sliding_window, part)` and return [B, T, H, C]
in the dtype of `q`. Keys and segment ids are those of a whole row; queries are the same row, or the
`Part` of it that one of several devices has (`llamapro_jax.model.context`). No ids (None) means one
segment a row.

A segment is a run of equal ids, so the keys that a query sees are one interval of indices,
`[first, query]`: what `visible_keys` gives, and what the kernels skip blocks by. Padding is a
segment like any other.

B batch, T query length, S key length, H query heads, K key/value heads, G = H/K, C head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    context: int = 1  # devices that share a row


@dataclass(frozen=True)
class Part:
    """The queries of a row that one of `count` devices has: all of them when there is but one.

    A row is cut into `2 * count` chunks; the device has chunk `index` and chunk
    `2 * count - 1 - index`, one after the other. The later a chunk, the more keys its queries see;
    the two together see the same number on every device. `index` may be traced.
    """

    index: Any = 0
    count: int = 1

    @property
    def spans(self) -> int:
        """How many runs of consecutive queries these are."""
        return 1 if self.count == 1 else 2

    def starts(self, length: int) -> tuple[Any, ...]:
        """The index in the row, which has this length, of the first query of each span."""
        if self.count == 1:
            return (0,)
        chunk = length // (2 * self.count)
        return (self.index * chunk, (2 * self.count - 1 - self.index) * chunk)


WHOLE = Part()


class Inputs(NamedTuple):
    """Padded operands, and what the queries see. T is `spans` times the length of a padded span."""

    q: jax.Array  # [B, T, H, C]
    k: jax.Array  # [B, S, K, C]
    v: jax.Array  # [B, S, K, C]
    first_BT: jax.Array  # the first key that a query sees
    last_BS: jax.Array  # the last index of a query that sees a key
    starts: jax.Array  # [spans] int32: the index in the row of the first query of a span


def prepare(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    part: Part,
    multiple: int,
) -> Inputs:
    """Operands in which the length of a span and that of the keys are multiples of `multiple`.

    What is added to a span stands for the indices after it: it sees what those see, and has nothing
    to add to a sum, for it and its gradient are zeros.
    """
    B, S = k_BSKC.shape[:2]
    chunk = q_BTHC.shape[1] // part.spans
    span = round_up(chunk, multiple)
    keys = round_up(S - chunk + span, multiple)  # the last span too ends within the keys
    visible = visible_keys(segment_ids_BT, (B, S), sliding_window)
    first_BS, last_BS = (pad_visible(x_BS, keys) for x_BS in visible)
    starts = part.starts(S)
    return Inputs(
        pad_spans(q_BTHC, part.spans, span),
        pad_length(k_BSKC, keys),
        pad_length(v_BSKC, keys),
        take_spans(first_BS, starts, span),
        last_BS,
        jnp.asarray(starts, jnp.int32),
    )


def take_spans(x_BS: jax.Array, starts: tuple[Any, ...], span: int) -> jax.Array:
    """What belongs to the queries, of what belongs to a row: the spans side by side."""
    if len(starts) == 1:
        return x_BS
    spans = [jax.lax.dynamic_slice_in_dim(x_BS, start, span, axis=1) for start in starts]
    return jnp.concatenate(spans, axis=1)


def pad_spans(x_BTHC: jax.Array, spans: int, span: int) -> jax.Array:
    """Zeros after the end of every span, up to the length `span`."""
    B, T, *rest = x_BTHC.shape
    padded = pad_length(x_BTHC.reshape(B * spans, T // spans, *rest), span)
    return padded.reshape(B, spans * span, *rest)


def cut_spans(x_BTHC: jax.Array, spans: int, length: int) -> jax.Array:
    """The inverse of `pad_spans`; `length` is that of all spans together."""
    B, T, *rest = x_BTHC.shape
    cut = x_BTHC.reshape(B * spans, T // spans, *rest)[:, : length // spans]
    return cut.reshape(B, length, *rest)


def key_blocks(first_Q: jax.Array, row: Any, block_q: int, block_k: int) -> tuple[Any, ...]:
    """Bounds for `walk`: the blocks of keys that a block of queries, from index `row`, sees."""
    return (
        jax.lax.div(jnp.min(first_Q), block_k),
        jax.lax.div(jnp.max(first_Q) + (block_k - 1), block_k),
        jax.lax.div(row + 1, block_k),
        jax.lax.div(row + (block_q + block_k - 1), block_k),
    )


def query_blocks(
    last_K: jax.Array, col: Any, start: Any, count: int, block_q: int, block_k: int
) -> tuple[Any, ...]:
    """Bounds for `walk`: the blocks of queries that see a block of keys, from index `col`.

    They are those of one span, `count` blocks from index `start`.
    """

    def block(index: Any) -> Any:
        return jnp.minimum(jax.lax.div(jnp.maximum(index - start, 0), block_q), count)

    return (
        block(col),
        block(col + (block_k + block_q - 2)),
        block(jnp.min(last_K) + 1),
        block(jnp.max(last_K) + block_q),
    )


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
