"""Attention in plain JAX, block by block: for CPUs, and wherever no kernel fits.

FlashAttention's recurrence (arXiv 2205.14135) with a backward pass of its own: scores exist for one
block of queries and one of keys at a time, never as [B, H, T, T]. Blocks that no query of a block
sees (later ones, other documents, outside of the window) are never computed; blocks that all of
them see whole need no mask.

Two things make it fast on a CPU. Scores are kept transposed, [keys, queries], so that the maximum
and the sum run over the major axis, where they vectorise. And every product is of the form A @ B or
A @ B^T with the sum over the last axis of A: XLA's other forms run at a third of the rate, so the
operands are transposed once, by block, rather than the scores in each product.

N is the key/value heads of a row, R the queries of a block times the G query heads that share a
key/value head, S the keys of a block, and C the head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llamapro_jax.model.kernels import (
    RESIDUALS,
    WHOLE,
    Inputs,
    Part,
    cut_spans,
    key_blocks,
    prepare,
    query_blocks,
    round_up,
    walk,
)

# Finite, so that a query which has seen nothing yet gives no NaN: its sums are scaled by 0 later.
UNSEEN = -1e30
# Queries and keys of a block, as measured: a longer one skips less of the triangle and, times the
# heads of a group, leaves the cache of a core; a shorter one has more overhead.
BLOCK, LONG_BLOCK = 128, 256
LONG = 1024
SMALLEST_BLOCK = 16


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    part: Part = WHOLE,
    block: int | None = None,
) -> jax.Array:
    """Causal self-attention, [B, T, H, C]; see `llamapro_jax.model.kernels`.

    block: queries and keys of a block, other than what suits the length.
    """
    T, H = q_BTHC.shape[1:3]
    dtype = q_BTHC.dtype
    block = block or block_for(T // part.spans, H // k_BSKC.shape[2])
    operands = (q_BTHC, k_BSKC, v_BSKC)
    if k_BSKC.shape[1] <= block:
        # XLA's CPU backend runs no product of bfloat16 summed in float32 outside of a loop, and a
        # single block is in none. Such a row is short: float32 costs it little.
        operands = tuple(x.astype(jnp.float32) for x in operands)
    inputs = prepare(
        *operands,
        segment_ids_BT=segment_ids_BT,
        sliding_window=sliding_window,
        part=part,
        multiple=block,
    )
    return cut_spans(_attention(inputs, block), part.spans, T).astype(dtype)


def block_for(length: int, group: int) -> int:
    """The size of a block, for G heads in a group. Rows are cut evenly: little is padded."""
    longest = LONG_BLOCK if length > LONG and group == 1 else BLOCK
    blocks = -(-length // longest)
    return round_up(-(-length // blocks), SMALLEST_BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(inputs: Inputs, block: int) -> jax.Array:
    return _forward(inputs, block)[0]


def _attention_fwd(inputs: Inputs, block: int) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = _forward(inputs, block)
    out, lse = checkpoint_name(out, RESIDUALS), checkpoint_name(lse, RESIDUALS)
    return out, (inputs, out, lse)


def _attention_bwd(block: int, residuals: tuple[Any, ...], dout: jax.Array) -> tuple[Inputs]:
    inputs, out, lse = residuals
    delta_BTH = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    dq, dk, dv = lax.map(
        lambda row: _backward_row(Inputs(*row[0], inputs.starts), *row[1:], block),
        (inputs[:-1], dout, lse, delta_BTH),
    )
    return (Inputs(dq, dk, dv, None, None, None),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _by_query(x_THC: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """Blocks of queries, [blocks, N, R, ...], of [T, H, ...]."""
    T, H, *rest = x_THC.shape
    split = x_THC.reshape(T // block, block, kv_heads, H // kv_heads, *rest)
    split = jnp.moveaxis(split, 1, 3)
    return split.reshape(T // block, kv_heads, H // kv_heads * block, *rest)


def _from_query(x: jax.Array, block: int) -> jax.Array:
    """The inverse of `_by_query`: [T, H, ...]."""
    blocks, N, R, *rest = x.shape
    split = jnp.moveaxis(x.reshape(blocks, N, R // block, block, *rest), 3, 1)
    return split.reshape(blocks * block, N * (R // block), *rest)


def _by_key(x_TKC: jax.Array, block: int) -> jax.Array:
    """Blocks of keys or values, [blocks, N, S, C]."""
    T, K, C = x_TKC.shape
    return x_TKC.reshape(T // block, block, K, C).swapaxes(1, 2)


def _dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """A @ B of every head, or A @ B^T, summed in float32."""
    contract = ((2,), (2 if transposed else 1,))
    return lax.dot_general(a, b, (contract, ((0,), (0,))), preferred_element_type=jnp.float32)


def _query_starts(row: Inputs, block: int) -> jax.Array:
    """The index in the row of the first query of every block, [blocks]."""
    span = row.q.shape[0] // row.starts.shape[0]
    return (row.starts[:, None] + jnp.arange(0, span, block, dtype=jnp.int32)).reshape(-1)


def _seen(start: jax.Array, col: jax.Array, first_T: jax.Array, group: int) -> jax.Array:
    """Which query of the block from index `start` sees which key of that from `col`, [S, R]."""
    steps = jnp.arange(first_T.shape[0], dtype=jnp.int32)
    rows, cols = start + steps, col + steps[:, None]
    return jnp.tile((cols <= rows) & (cols >= first_T), (1, group))


def _forward(inputs: Inputs, block: int) -> tuple[jax.Array, jax.Array]:
    """The output, and the log-sum-exp of the scores [B, T, H]."""
    return lax.map(lambda row: _forward_row(Inputs(*row, inputs.starts), block), inputs[:-1])


def _forward_row(row: Inputs, block: int) -> tuple[jax.Array, jax.Array]:
    _, H, C = row.q.shape
    N = row.k.shape[1]
    group, scale = H // N, C**-0.5
    queries = _by_query(row.q, N, block)
    keys, values_t = _by_key(row.k, block), _by_key(row.v, block).swapaxes(2, 3)

    def query_block(
        start: jax.Array, first: jax.Array, q: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def step(j: jax.Array, carry: Any, masked: bool) -> Any:
            high, total, out_t = carry
            scores = _dot(keys[j], q, transposed=True)  # [N, S, R]
            if masked:
                seen = _seen(start, j * block, first, group)
                scores = jnp.where(seen, scores, UNSEEN)
            higher = jnp.maximum(high, jnp.max(scores, axis=1))
            weights = jnp.exp((scores - higher[:, None]) * scale)
            shrink = jnp.exp((high - higher) * scale)
            total = total * shrink + jnp.sum(weights, axis=1)
            out_t = out_t * shrink[:, None] + _dot(values_t[j], weights.astype(row.v.dtype))
            return higher, total, out_t

        R = group * block
        zero = jnp.zeros((N, R), jnp.float32)
        carry = (zero + UNSEEN, zero, jnp.zeros((N, C, R), jnp.float32))
        high, total, out_t = walk(*key_blocks(first, start, block, block), step, carry)
        out = (out_t / total[:, None]).swapaxes(1, 2).astype(row.q.dtype)
        return out, high * scale + jnp.log(total)

    blocks = (_query_starts(row, block), row.first_BT.reshape(-1, block), queries)
    out, lse = lax.map(lambda xs: query_block(*xs), blocks)
    return _from_query(out, block), _from_query(lse, block)


def _backward_row(
    row: Inputs, dout: jax.Array, lse: jax.Array, delta: jax.Array, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of the queries, keys and values of a row."""
    _, H, C = row.q.shape
    S, N, _ = row.k.shape
    group, scale = H // N, C**-0.5
    starts, firsts = _query_starts(row, block), row.first_BT.reshape(-1, block)
    count = len(firsts) // len(row.starts)  # blocks of queries in a span
    queries, douts, lses, deltas = (_by_query(x, N, block) for x in (row.q, dout, lse, delta))
    keys, values = _by_key(row.k, block), _by_key(row.v, block)

    def key_block(dqs_t: jax.Array, xs: Any) -> Any:
        col, last, k, v = xs
        k_t = k.swapaxes(1, 2)

        def step(i: jax.Array, carry: Any, masked: bool) -> Any:
            dqs_t, dk, dv = carry
            q, dout = queries[i], douts[i]
            scores = _dot(k, q, transposed=True)  # [N, S, R]
            if masked:
                seen = _seen(starts[i], col, firsts[i], group)
                scores = jnp.where(seen, scores, UNSEEN)
            weights = jnp.exp(scores * scale - lses[i][:, None])
            dweights = _dot(v, dout, transposed=True)
            dscores = (weights * (dweights - deltas[i][:, None])).astype(row.q.dtype)
            dv += _dot(weights.astype(row.v.dtype), dout)
            dk += _dot(dscores, q)
            return dqs_t.at[i].add(_dot(k_t, dscores)), dk, dv

        zero = jnp.zeros(k.shape, jnp.float32)
        carry = (dqs_t, zero, zero)
        for span, start in enumerate(row.starts):
            bounds = query_blocks(last, col, start, count, block, block)
            carry = walk(*(span * count + bound for bound in bounds), step, carry)
        dqs_t, dk, dv = carry
        return dqs_t, ((dk * scale).astype(row.k.dtype), dv.astype(row.v.dtype))

    cols = jnp.arange(0, S, block, dtype=jnp.int32)
    zeros = jnp.zeros((len(queries), N, C, group * block), jnp.float32)
    blocks = (cols, row.last_BS.reshape(-1, block), keys, values)
    dqs_t, (dk, dv) = lax.scan(key_block, zeros, blocks)
    dq = (dqs_t * scale).astype(row.q.dtype).swapaxes(2, 3)
    return _from_query(dq, block), *(x.swapaxes(1, 2).reshape(S, N, C) for x in (dk, dv))
