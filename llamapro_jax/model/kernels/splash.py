"""Attention for TPUs: jax's Pallas kernel "splash attention", with block sizes by shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from llamapro_jax.model.kernels import (
    RESIDUALS,
    WHOLE,
    Part,
    Problem,
    cut_spans,
    pad_length,
    pad_spans,
    round_up,
    take_spans,
)

# A vector register of a TPU is this wide: blocks are multiples of it.
LANES = 128
# Longest first. A longer block is faster as long as it pads little.
BLOCKS = (1024, 512, 256, 128)
# The keys of a block are multiplied in parts of this length, so that scores fit into VMEM.
COMPUTE_BLOCK = 512
# Padding that a longer block may add to a row.
TOLERATED_PADDING = 1 / 16


def obstacle(problem: Problem) -> str | None:
    """Why this kernel cannot solve the problem, with the mend; None when it can."""
    if problem.platform != "tpu":
        return (
            f"it runs on a TPU, and this is for platform {problem.platform!r}; "
            "set attention to auto or blockwise"
        )
    if problem.dtype not in ("bfloat16", "float32"):
        return f"dtype {problem.dtype} is not bfloat16 or float32; set compute_dtype"
    return None


def block_for(length: int) -> int:
    """The longest block that adds little padding to rows of `length`."""
    shortest = round_up(length, LANES)
    allowed = max(shortest, int(length * (1 + TOLERATED_PADDING)))
    return next(block for block in BLOCKS if round_up(length, block) <= allowed)


def block_sizes(queries: int, keys: int) -> splash_attention_kernel.BlockSizes:
    """Blocks of the three kernels: the forward pass, and both of the backward pass."""
    compute = min(keys, COMPUTE_BLOCK)
    return splash_attention_kernel.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=compute,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=compute,
        block_q_dq=queries,
        block_kv_dq=keys,
    )


@dataclass(frozen=True)
class Visible(splash_attention_mask.Mask):
    """Query `i` sees key `j` where `0 <= i - j < window`; `span` queries begin at each start.

    jax's masks compare all queries of a block with all its keys to learn that most blocks are seen
    whole or not at all, which takes a minute for a long row. The corners of a block tell.
    """

    starts: tuple[int, ...]
    span: int
    keys: int
    window: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.starts) * self.span, self.keys

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """The index in the row of each query; jax's name."""
        indices = np.array(self.starts)[:, None] + np.arange(self.span)
        return indices.reshape(-1).astype(np.int32)

    def mask_function(self, q_ids: Any, kv_ids: Any) -> Any:
        """What the kernel computes where a block is seen in part; jax's name."""
        seen = q_ids >= kv_ids
        return seen if self.window is None else seen & (q_ids - self.window < kv_ids)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Of a block within a span, which query sees which key; one element if all are alike."""
        queries = self.q_sequence[block[0]]
        keys = np.arange(*block[1].indices(self.keys), dtype=np.int32)
        nearest, farthest = queries[0] - keys[-1], queries[-1] - keys[0]
        window = self.keys if self.window is None else self.window
        whole = nearest >= 0 and farthest < window
        if whole or farthest < 0 or nearest >= window:
            return np.array([[whole]])
        return self.mask_function(queries[:, None], keys[None])


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    part: Part = WHOLE,
    interpret: bool = False,
) -> jax.Array:
    """Causal self-attention, [B, T, H, C]; see `llamapro_jax.model.kernels`.

    interpret: run the kernels as plain JAX, on any platform (for tests).
    """
    (_, T, H, C), S = q_BTHC.shape, k_BSKC.shape[1]
    chunk = T // part.spans
    blocks = block_sizes(block_for(chunk), block_for(S))
    span = round_up(chunk, blocks.block_q)
    length = round_up(S - chunk + span, blocks.block_kv)
    kernel = _kernel(H, S, span, length, sliding_window, part, blocks, interpret)
    # The kernel does not scale the scores.
    q_BTHC = pad_spans(q_BTHC * jnp.asarray(C**-0.5, q_BTHC.dtype), part.spans, span)
    operands = (q_BTHC, pad_length(k_BSKC, length), pad_length(v_BSKC, length))
    by_head = [x.swapaxes(1, 2) for x in operands]
    if segment_ids_BT is None:
        out_BHTC = jax.vmap(kernel)(*by_head)
    else:
        ids_BS = jnp.pad(segment_ids_BT.astype(jnp.int32), ((0, 0), (0, length - S)))
        ids_BT = take_spans(ids_BS, part.starts(S), span)
        ids = splash_attention_kernel.SegmentIds(ids_BT, ids_BS)
        out_BHTC = jax.vmap(kernel)(*by_head, ids)
    return cut_spans(out_BHTC.swapaxes(1, 2), part.spans, T)


def _kernel(
    heads: int,
    S: int,
    span: int,
    length: int,
    sliding_window: int | None,
    part: Part,
    blocks: splash_attention_kernel.BlockSizes,
    interpret: bool,
) -> splash_attention_kernel.SplashAttentionKernel:
    """The kernel for the queries of `part`, `span` of them padded, and `length` padded keys.

    Which blocks to skip is known for the queries of all parts when the program is traced; each
    device takes what is its own.
    """
    parts = [Part(index, part.count) for index in range(part.count)]
    starts = tuple(start for each in parts for start in each.starts(S))
    mask = Visible(starts, span, length, sliding_window)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=part.count,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def own(x: jax.Array) -> jax.Array:
        axis = 1 if x.ndim == 3 else 0  # of tables of blocks, [1, T, S], and of indices, [T]
        size = x.shape[axis] // part.count
        return jax.lax.dynamic_slice_in_dim(x, part.index * size, size, axis)

    return kernel if part.count == 1 else jax.tree.map(own, kernel)
