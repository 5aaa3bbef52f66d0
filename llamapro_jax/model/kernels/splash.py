"""Attention for TPUs: jax's Pallas kernel "splash attention", with block sizes by shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from llamapro_jax.model.kernels import RESIDUALS, Problem, pad_length, round_up

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


def block_sizes(block: int) -> splash_attention_kernel.BlockSizes:
    """Blocks of the three kernels: the forward pass, and both of the backward pass."""
    compute = min(block, COMPUTE_BLOCK)
    return splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )


def attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal self-attention, [B, T, H, C]; see `llamapro_jax.model.attention.attention`.

    interpret: run the kernels as plain JAX, on any platform (for tests).
    """
    _, T, H, C = q_BTHC.shape
    block = block_for(T)
    length = round_up(T, block)
    # Rows are padded at their end, where no token of the row can see.
    mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask((length, length))
    if sliding_window is not None and sliding_window < length:
        mask = splash_attention_mask.LocalMask((length, length), (sliding_window - 1, 0), 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * H),
        block_sizes=block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def by_head(x_BTHC: jax.Array) -> jax.Array:
        return pad_length(x_BTHC, length).swapaxes(1, 2)

    # The kernel does not scale the scores.
    q_BHTC = by_head(q_BTHC * jnp.asarray(C**-0.5, q_BTHC.dtype))
    if segment_ids_BT is None:
        out_BHTC = jax.vmap(kernel)(q_BHTC, by_head(k_BTKC), by_head(v_BTKC))
    else:
        ids_BT = jnp.pad(segment_ids_BT.astype(jnp.int32), ((0, 0), (0, length - T)))
        ids = splash_attention_kernel.SegmentIds(ids_BT, ids_BT)
        out_BHTC = jax.vmap(kernel)(q_BHTC, by_head(k_BTKC), by_head(v_BTKC), ids)
    return out_BHTC.swapaxes(1, 2)[:, :T]
