"""Causal grouped-query attention: the reference that every kernel is compared with.

B batch, T query length, S key length, H query heads, K key/value heads, G = H/K, C head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    """Which key each query may see, [B, T, S] bool: same segment, not later, inside the window."""
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])
    if sliding_window is not None:
        seen_BTS &= distance_BTS < sliding_window
    return seen_BTS


def reference_attention(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention with float32 scores, [B, T, H, C] in the dtype of `q`.

    A query that may see nothing (padding) gets the mean of the values, not NaN: its row is all
    the lowest finite score.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32
    ) * (C**-0.5)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKC.dtype)
    out_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", weights_BKGTS, v_BSKC)
    return out_BTKGC.reshape(B, T, H, C)
