"""The Transformer block, and the forward pass over the two stacks of blocks.

Legend: B batch, T query length, S key length, D model, H query heads, K key/value heads, C head
dim, F feed-forward, V vocabulary.

Parameters in the step: `{"embed": [V, D], "final_norm": [D], "head": [V, D] (absent when tied),
"base": [a dict a segment: leaf [repeats, base, ...]], "new": [likewise]}`. Segments are those of
`ExpansionPlan.segments`; a stack that a segment lacks is an empty dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llamapro_jax.expansion import Segment
from llamapro_jax.model.attention import attention as fused_attention
from llamapro_jax.model.attention import platform_of, reference_attention
from llamapro_jax.model.config import AttentionChoice, ModelConfig, Remat
from llamapro_jax.model.quantized import take
from llamapro_jax.model.remat import WEIGHT, rematerialised
from llamapro_jax.model.rope import apply_rope, rope_tables
from llamapro_jax.model.weights import BLOCK_BY_NAME, OUTER_BY_NAME
from llamapro_jax.sharding import activation, current_platform

Params = dict[str, Any]


class KeyValues(NamedTuple):
    """Keys and values of one block for the positions seen so far, each [B, S, K, C]."""

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """What every block of one forward pass shares.

    segment_ids_BT: which document of its row a token is in, of whole rows. mask_BTS and write_at
    (the slot of the first query): with a key/value cache instead.
    """

    cos_BTC: jax.Array
    sin_BTC: jax.Array
    mask_BTS: jax.Array | None = None
    write_at: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None


# A longer group of blocks is compiled as a loop: a program grows with each block in it.
LONGEST_UNROLLED = 16

INITIALIZERS = {
    "normal": nn.initializers.normal(0.02),
    "ones": nn.initializers.ones,
    "zeros": nn.initializers.zeros,
}


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Normalises in float32 and scales in the dtype of `x`, as transformers does."""
    x32 = x_BTD.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale_D.astype(x_BTD.dtype) * normed.astype(x_BTD.dtype)


class Block(nn.Module):
    """One Transformer block: attention and SwiGLU, each added to its input.

    Base and inserted blocks are the same module; only their parameters differ. attention_choice:
    who computes attention over whole rows; with a cache it is the reference.
    """

    config: ModelConfig
    attention_choice: AttentionChoice = "reference"

    def weight(self, name: str, dtype: jnp.dtype) -> jax.Array:
        row = BLOCK_BY_NAME[name]
        value = self.param(name, INITIALIZERS[row.init], row.shape(self.config))
        return checkpoint_name(take(value, row, dtype), WEIGHT)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: KeyValues | None = None
    ) -> tuple[jax.Array, KeyValues | None]:
        with jax.named_scope("attention"):
            out_BTD, cache = self.attention(x_BTD, context, cache)
            x_BTD = x_BTD + out_BTD
        with jax.named_scope("mlp"):
            return x_BTD + self.mlp(x_BTD), cache

    def attention(
        self, x_BTD: jax.Array, context: Context, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        dtype, config = x_BTD.dtype, self.config
        h_BTD = rms_norm(x_BTD, self.weight("attention_norm", dtype), config.rms_norm_eps)
        q_BTHC = jnp.einsum("BTD,DHC->BTHC", h_BTD, self.weight("q", dtype))
        k_BTKC = jnp.einsum("BTD,DKC->BTKC", h_BTD, self.weight("k", dtype))
        v_BTKC = jnp.einsum("BTD,DKC->BTKC", h_BTD, self.weight("v", dtype))
        if config.attention_bias:
            q_BTHC += self.weight("q_bias", dtype)
            k_BTKC += self.weight("k_bias", dtype)
            v_BTKC += self.weight("v_bias", dtype)
        q_BTHC = checkpoint_name(apply_rope(q_BTHC, context.cos_BTC, context.sin_BTC), "q")
        k_BTKC = checkpoint_name(apply_rope(k_BTKC, context.cos_BTC, context.sin_BTC), "k")
        v_BTKC = checkpoint_name(v_BTKC, "v")
        if cache is None:
            out_BTHC = fused_attention(
                q_BTHC,
                k_BTKC,
                v_BTKC,
                segment_ids_BT=context.segment_ids_BT,
                sliding_window=config.sliding_window,
                implementation=self.attention_choice,
            )
        else:
            start = (0, context.write_at, 0, 0)
            cache = KeyValues(
                jax.lax.dynamic_update_slice(cache.k, k_BTKC.astype(cache.k.dtype), start),
                jax.lax.dynamic_update_slice(cache.v, v_BTKC.astype(cache.v.dtype), start),
            )
            out_BTHC = reference_attention(q_BTHC, *cache, context.mask_BTS)
        out_BTD = checkpoint_name(
            jnp.einsum(
                "BTHC,HCD->BTD",
                out_BTHC,
                self.weight("o", dtype),
                out_sharding=activation("BTD"),
            ),
            "o",
        )
        if config.attention_bias:
            out_BTD += self.weight("o_bias", dtype)
        return out_BTD, cache

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        dtype, bias = x_BTD.dtype, self.config.mlp_bias
        h_BTD = rms_norm(x_BTD, self.weight("mlp_norm", dtype), self.config.rms_norm_eps)
        gate_BTF = jnp.einsum("BTD,DF->BTF", h_BTD, self.weight("gate", dtype))
        up_BTF = jnp.einsum("BTD,DF->BTF", h_BTD, self.weight("up", dtype))
        if bias:
            gate_BTF += self.weight("gate_bias", dtype)
            up_BTF += self.weight("up_bias", dtype)
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, "gate"), checkpoint_name(up_BTF, "up")
        out_BTD = jnp.einsum(
            "BTF,FD->BTD",
            nn.silu(gate_BTF) * up_BTF,
            self.weight("down", dtype),
            out_sharding=activation("BTD"),
        )
        if bias:
            out_BTD += self.weight("down_bias", dtype)
        return out_BTD


def apply_block(
    config: ModelConfig,
    leaves: dict[str, jax.Array],
    x_BTD: jax.Array,
    context: Context,
    cache: KeyValues | None = None,
    attention: AttentionChoice = "reference",
) -> tuple[jax.Array, KeyValues | None]:
    """One block with the given leaves (unstacked). [B, T, D] in, [B, T, D] and the cache out."""
    return Block(config, attention).apply({"params": leaves}, x_BTD, context, cache)


def run_blocks(
    body: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x_BTD: jax.Array,
    segments: Sequence[Segment],
    base: Sequence[Any],
    new: Sequence[Any],
    with_new: bool = True,
) -> tuple[jax.Array, tuple[list[Any], list[Any]]]:
    """Carries `x` through all blocks in the order of depth, `body(x, leaves_of_a_block)` each.

    base, new: for each segment a tree of arrays [repeats, blocks, ...]. What `body` returns
    beside `x` comes back in the same two structures. with_new=False leaves the inserted blocks
    out: what runs is the model as it was before they were inserted.
    """
    # A scan even over a single block: jax keeps a weight for the backward pass as the scan's own
    # input, but a weight that was sliced or reshaped by hand it would stack up as a copy.
    base_out, new_out = [], []
    for segment, base_leaves, new_leaves in zip(segments, base, new, strict=True):

        def group(x: jax.Array, leaves: Any, segment: Segment = segment) -> Any:
            of_base, of_new = None, None
            if segment.new and with_new:
                x, of_new = jax.lax.scan(body, x, leaves[1], unroll=_unrolled(segment.new))
            if segment.base:
                x, of_base = jax.lax.scan(body, x, leaves[0], unroll=_unrolled(segment.base))
            return x, (of_base, of_new)

        x_BTD, (of_base, of_new) = jax.lax.scan(group, x_BTD, (base_leaves, new_leaves))
        base_out.append(of_base)
        new_out.append(of_new)
    return x_BTD, (base_out, new_out)


def _unrolled(blocks: int) -> bool:
    """Whether the loop over the blocks of a group is unrolled: on GPUs.

    A loop hands what it keeps to the loop around it by a copy. XLA's GPU compiler leaves out that
    copy, and those back, when the inner loop is none: LLaMA2-7B + 8 moves 23 % fewer bytes through
    memory in a step and needs 4 to 5 GiB less (as compiled, 4 rows). TPU programs gain nothing.
    """
    return platform_of(current_platform()) == "gpu" and blocks <= LONGEST_UNROLLED


def embed(params: Params, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Token embeddings, [B, T, D]."""
    with jax.named_scope("embed"):
        table_VD = take(params["embed"], OUTER_BY_NAME["embed"], dtype)
        return table_VD.at[tokens_BT].get(out_sharding=activation("BTD"))


def head_weight(params: Params) -> jax.Array:
    """The output projection [V, D]: the embedding when the head is tied."""
    return params["head"] if "head" in params else params["embed"]


def hidden_states(
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    config: ModelConfig,
    segments: Sequence[Segment],
    dtype: jnp.dtype,
    with_new: bool = True,
    remat: Remat = "none",
    attention: AttentionChoice = "reference",
) -> jax.Array:
    """The final normed hidden states, [B, T, D] in `dtype`.

    Tokens attend to earlier ones of their own segment; without `segment_ids_BT`, of their row.
    with_new=False: without the inserted blocks. remat: what is kept for the backward pass, see
    `model.remat`. attention: who computes it, see `model.attention`.
    """
    context = Context(*rope_tables(config, positions_BT), segment_ids_BT=segment_ids_BT)

    def body(x_BTD: jax.Array, leaves: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        x_BTD, _ = apply_block(config, leaves, x_BTD, context, attention=attention)
        return x_BTD, None

    body = rematerialised(body, remat)
    x_BTD = embed(params, tokens_BT, dtype)
    x_BTD, _ = run_blocks(body, x_BTD, segments, params["base"], params["new"], with_new)
    return rms_norm(x_BTD, params["final_norm"], config.rms_norm_eps)


def logits(params: Params, x_BTD: jax.Array) -> jax.Array:
    """Scores of the next token, [B, T, V] float32."""
    with jax.named_scope("head"):
        head_VD = head_weight(params).astype(x_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)
