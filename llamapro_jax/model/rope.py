"""Rotary position embeddings in the layout of Hugging Face: halves, not interleaved pairs.

B batch, T length, H heads, C head dim. Source: transformers, `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position for each pair of channels, [C/2] float32, scaling applied."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = (1.0 / (np.float32(config.rope_theta) ** exponent)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    # 1 for wavelengths that fit high_freq_factor times into the original length, 0 for those that
    # do not fit low_freq_factor times, a line between.
    kept = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each [B, T, C/2] float32, for integer positions [B, T]."""
    angles_BTC = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles_BTC), jnp.sin(angles_BTC)


def apply_rope(x_BTHC: jax.Array, cos_BTC: jax.Array, sin_BTC: jax.Array) -> jax.Array:
    """Rotates the halves of each head by its position, in float32; the dtype of `x` comes back."""
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTC[:, :, None, :], sin_BTC[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)
