"""Attention for NVIDIA GPUs as Pallas kernels (Triton): one forward, two backward.

The technique is FlashAttention-2 (arXiv 2307.08691): a program owns a block of queries, walks over
the blocks of keys that any of them sees, and keeps a running maximum and sum, so that no score
leaves the chip. What differs from `jax.experimental.pallas.ops.gpu.attention`:

- what a query sees is an interval of keys (`visible_keys`), so that packed documents and a sliding
  window cost no work outside of it, and blocks inside of it need no mask;
- keys and values of a group of heads are never repeated: the program that owns a block of keys
  walks over the query heads that share it;
- rows of any length, and heads of any size, by padding;
- the backward pass has blocks of its own, and works on transposed scores where it sums over
  queries, so that no tile is transposed between two products.

Scores are kept in base 2, where the hardware has its exponential.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llamapro_jax.model.kernels import (
    RESIDUALS,
    WHOLE,
    Inputs,
    Part,
    Problem,
    cut_spans,
    key_blocks,
    prepare,
    query_blocks,
    walk,
)

# Finite, so that a row which has seen nothing yet gives no NaN: its sums are scaled by 0 later.
UNSEEN = -1e30
# The least size of a side that the tensor cores multiply.
SMALLEST_BLOCK = 16
LARGEST_HEAD = 128


class Tile(NamedTuple):
    """The blocks of one kernel: rows of queries and of keys, warps, and stages of its pipeline."""

    q: int
    k: int
    warps: int
    stages: int

    def at_most(self, length: int) -> Tile:
        """With no block longer than a row (rounded up to a power of two)."""
        limit = max(SMALLEST_BLOCK, pl.next_power_of_2(length))
        return self._replace(q=min(self.q, limit), k=min(self.k, limit))


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    dkv: Tile
    dq: Tile

    def at_most(self, length: int) -> Tiles:
        """The tiles for rows of this length."""
        tiles = (self.forward, self.dkv, self.dq)
        return Tiles(*(tile.at_most(length) for tile in tiles))

    @property
    def longest(self) -> int:
        """What a padded row is a multiple of: sides are powers of two."""
        return max(side for tile in (self.forward, self.dkv, self.dq) for side in tile[:2])


@dataclass(frozen=True)
class Setup:
    """What is static: the tiles, the scale of the scores, and whether to interpret."""

    tiles: Tiles
    scale: float
    interpret: bool


def tiles_for(dtype: Any, head_dim: int) -> Tiles:
    """Tiles for a Hopper GPU: operands within its 227 KB of shared memory, sums in registers.

    float32 has no tensor cores here (TF32 would not be float32), so its tiles only have to fit.
    """
    if jnp.dtype(dtype).itemsize == 4:
        return Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
    if head_dim <= 64:
        return Tiles(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
    return Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))


def obstacle(problem: Problem) -> str | None:
    """Why this kernel cannot solve the problem, with the mend; None when it can."""
    if problem.platform != "gpu":
        return (
            f"it runs on a GPU, and this is for platform {problem.platform!r}; "
            "set attention to auto or blockwise"
        )
    if problem.head_dim > LARGEST_HEAD:
        return (
            f"heads have {problem.head_dim} dimensions, and its tiles hold at most "
            f"{LARGEST_HEAD}; set attention to auto or blockwise"
        )
    if problem.dtype not in ("bfloat16", "float16", "float32"):
        return f"dtype {problem.dtype} is not bfloat16, float16 or float32; set compute_dtype"
    return None


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    part: Part = WHOLE,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal self-attention, [B, T, H, C]; see `llamapro_jax.model.kernels`.

    tiles: other tiles than those for this dtype and head size. interpret: run the kernels as
    plain JAX, on any platform (for tests).
    """
    T, C = q_BTHC.shape[1], q_BTHC.shape[3]
    tiles = (tiles or tiles_for(q_BTHC.dtype, C)).at_most(T // part.spans)
    head = max(SMALLEST_BLOCK, pl.next_power_of_2(C))

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, head - C))) if head != C else x

    inputs = prepare(
        padded(q_BTHC),
        padded(k_BSKC),
        padded(v_BSKC),
        segment_ids_BT=segment_ids_BT,
        sliding_window=sliding_window,
        part=part,
        multiple=tiles.longest,
    )
    out_BTHC = _attention(inputs, Setup(tiles, C**-0.5, interpret))
    return cut_spans(out_BTHC, part.spans, T)[..., :C]


class Gradient(NamedTuple):
    """What the backward kernels read beside the inputs."""

    dout: jax.Array  # [B, T, H, C]
    lse_BHT: jax.Array  # of the scores, in base 2
    delta_BHT: jax.Array  # the sum over C of out * dout


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(inputs: Inputs, setup: Setup) -> jax.Array:
    return _forward(inputs, setup)[0]


def _attention_fwd(inputs: Inputs, setup: Setup) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse_BHT = _forward(inputs, setup)
    out, lse_BHT = checkpoint_name(out, RESIDUALS), checkpoint_name(lse_BHT, RESIDUALS)
    return out, (inputs, out, lse_BHT)


def _attention_bwd(
    setup: Setup, residuals: tuple[Any, ...], dout: jax.Array
) -> tuple[tuple[jax.Array | None, ...]]:
    inputs, out, lse_BHT = residuals
    delta_BTH = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    gradient = Gradient(dout, lse_BHT, delta_BTH.swapaxes(1, 2))
    dq = _backward_dq(inputs, gradient, setup)
    dk, dv = _backward_dkv(inputs, gradient, setup)
    return (Inputs(dq, dk, dv, None, None, None),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product summed in float32; of float32 operands in float32 proper, not TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision)


def _first_row(starts_ref: Any, block_q: int) -> Any:
    """The index in the row of the first query of this program; its blocks are the grid's first."""
    count = pl.num_programs(0) // starts_ref.shape[0]
    i = pl.program_id(0)
    return starts_ref[lax.div(i, count)] + lax.rem(i, count) * block_q


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    first_ref: Any,
    starts_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    block_k: int,
    scale: float,
) -> None:
    block_q, C = q_ref.shape
    row = _first_row(starts_ref, block_q)
    rows_q = row + jnp.arange(block_q, dtype=jnp.int32)
    q, first_q = q_ref[...], first_ref[...]

    def step(j: Any, carry: Any, masked: bool) -> Any:
        high_q, sum_q, out = carry
        keys = pl.ds(j * block_k, block_k)
        scores = _dot(q, k_ref[keys, :].T) * (scale * math.log2(math.e))
        if masked:
            cols_k = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
            seen = (cols_k[None] <= rows_q[:, None]) & (cols_k[None] >= first_q[:, None])
            scores = jnp.where(seen, scores, UNSEEN)
        higher_q = jnp.maximum(high_q, jnp.max(scores, axis=1))
        shrink_q = jnp.exp2(high_q - higher_q)
        weights = jnp.exp2(scores - higher_q[:, None])
        sum_q = sum_q * shrink_q + jnp.sum(weights, axis=1)
        out = out * shrink_q[:, None] + _dot(weights.astype(v_ref.dtype), v_ref[keys, :])
        return higher_q, sum_q, out

    carry = (
        jnp.full((block_q,), UNSEEN, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
        jnp.zeros((block_q, C), jnp.float32),
    )
    high_q, sum_q, out = walk(*key_blocks(first_q, row, block_q, block_k), step, carry)
    out_ref[...] = (out / sum_q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = high_q + jnp.log2(sum_q)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    last_ref: Any,
    starts_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    block_q: int,
    scale: float,
) -> None:
    block_k = k_ref.shape[0]
    col = pl.program_id(0) * block_k
    cols_k = col + jnp.arange(block_k, dtype=jnp.int32)
    k, v, last_k = k_ref[...], v_ref[...], last_ref[...]
    spans = starts_ref.shape[0]
    span = q_ref.shape[0] // spans

    def head(g: Any, carry: Any) -> Any:
        def step(i: Any, carry: Any, masked: bool, begin: int, start: Any) -> Any:
            dk, dv = carry
            queries = pl.ds(begin + i * block_q, block_q)
            q, dout = q_ref[queries, g, :], dout_ref[queries, g, :]
            scores = _dot(k, q.T) * (scale * math.log2(math.e))
            if masked:
                rows_q = start + i * block_q + jnp.arange(block_q, dtype=jnp.int32)
                seen = (cols_k[:, None] <= rows_q[None]) & (rows_q[None] <= last_k[:, None])
                scores = jnp.where(seen, scores, UNSEEN)
            weights = jnp.exp2(scores - lse_ref[g, queries][None])
            dv += _dot(weights.astype(dout.dtype), dout)
            dscores = weights * (_dot(v, dout.T) - delta_ref[g, queries][None])
            dk += _dot(dscores.astype(q.dtype), q)
            return dk, dv

        for n in range(spans):
            start = starts_ref[n]
            blocks = query_blocks(last_k, col, start, span // block_q, block_q, block_k)
            of_span = functools.partial(step, begin=n * span, start=start)
            carry = walk(*blocks, of_span, carry)
        return carry

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    first_ref: Any,
    starts_ref: Any,
    dq_ref: Any,
    *,
    block_k: int,
    scale: float,
) -> None:
    block_q = q_ref.shape[0]
    row = _first_row(starts_ref, block_q)
    rows_q = row + jnp.arange(block_q, dtype=jnp.int32)
    q, dout, first_q = q_ref[...], dout_ref[...], first_ref[...]
    lse_q, delta_q = lse_ref[...], delta_ref[...]

    def step(j: Any, dq: Any, masked: bool) -> Any:
        keys = pl.ds(j * block_k, block_k)
        k = k_ref[keys, :]
        scores = _dot(q, k.T) * (scale * math.log2(math.e))
        if masked:
            cols_k = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
            seen = (cols_k[None] <= rows_q[:, None]) & (cols_k[None] >= first_q[:, None])
            scores = jnp.where(seen, scores, UNSEEN)
        weights = jnp.exp2(scores - lse_q[:, None])
        dscores = weights * (_dot(dout, v_ref[keys, :].T) - delta_q[:, None])
        return dq + _dot(dscores.astype(k.dtype), k)

    dq = walk(*key_blocks(first_q, row, block_q, block_k), step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _call(kernel: Any, tile: Tile, setup: Setup, name: str, **options: Any) -> Any:
    return pl.pallas_call(
        functools.partial(kernel, scale=setup.scale),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=setup.interpret,
        name=name,
        **options,
    )


def _forward(inputs: Inputs, setup: Setup) -> tuple[jax.Array, jax.Array]:
    """The output, and the log-sum-exp of the scores in base 2 [B, H, T]."""
    B, T, H, C = inputs.q.shape
    tile = setup.tiles.forward
    query, row = _query_block(tile, C), _whole_row(inputs)
    first = pl.BlockSpec((None, tile.q), lambda i, b, h: (b, i))
    return _call(
        functools.partial(_forward_kernel, block_k=tile.k),
        tile,
        setup,
        "attention_forward",
        grid=(T // tile.q, B, H),
        in_specs=[query, row, row, first, _starts(inputs)],
        out_specs=[query, pl.BlockSpec((None, None, tile.q), lambda i, b, h: (b, h, i))],
        out_shape=[
            jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
    )(inputs.q, inputs.k, inputs.v, inputs.first_BT, inputs.starts)


def _backward_dq(inputs: Inputs, gradient: Gradient, setup: Setup) -> jax.Array:
    B, T, H, C = inputs.q.shape
    tile = setup.tiles.dq
    query, row = _query_block(tile, C), _whole_row(inputs)
    stats = pl.BlockSpec((None, None, tile.q), lambda i, b, h: (b, h, i))
    first = pl.BlockSpec((None, tile.q), lambda i, b, h: (b, i))
    return _call(
        functools.partial(_dq_kernel, block_k=tile.k),
        tile,
        setup,
        "attention_backward_dq",
        grid=(T // tile.q, B, H),
        in_specs=[query, row, row, query, stats, stats, first, _starts(inputs)],
        out_specs=query,
        out_shape=jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
    )(inputs.q, inputs.k, inputs.v, *gradient, inputs.first_BT, inputs.starts)


def _backward_dkv(inputs: Inputs, gradient: Gradient, setup: Setup) -> tuple[jax.Array, jax.Array]:
    B, T, H, C = inputs.q.shape
    S, K = inputs.k.shape[1:3]
    tile = setup.tiles.dkv
    # A program reads the query heads of one group: a block of G heads beside one another.
    group = pl.BlockSpec((None, T, H // K, C), lambda j, b, h: (b, 0, h, 0))
    stats = pl.BlockSpec((None, H // K, T), lambda j, b, h: (b, h, 0))
    block = pl.BlockSpec((None, tile.k, None, C), lambda j, b, h: (b, j, h, 0))
    last = pl.BlockSpec((None, tile.k), lambda j, b, h: (b, j))
    return _call(
        functools.partial(_dkv_kernel, block_q=tile.q),
        tile,
        setup,
        "attention_backward_dkv",
        grid=(S // tile.k, B, K),
        in_specs=[group, block, block, group, stats, stats, last, _starts(inputs)],
        out_specs=[block, block],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.k, inputs.v)],
    )(inputs.q, inputs.k, inputs.v, *gradient, inputs.last_BS, inputs.starts)


def _query_block(tile: Tile, head_dim: int) -> pl.BlockSpec:
    """A block of the queries of one head; the grid is (block, row, head)."""
    return pl.BlockSpec((None, tile.q, None, head_dim), lambda i, b, h: (b, i, h, 0))


def _whole_row(inputs: Inputs) -> pl.BlockSpec:
    """All keys or values of a row, of the head that query head `h` shares."""
    _, S, K, C = inputs.k.shape
    group = inputs.q.shape[2] // K
    return pl.BlockSpec((None, S, None, C), lambda i, b, h: (b, 0, lax.div(h, group), 0))


def _starts(inputs: Inputs) -> pl.BlockSpec:
    return pl.BlockSpec(inputs.starts.shape, lambda *_: (0,))
