"""Frozen matrices in 8 bits: one scale for each output channel, dequantised where they are used."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from llamapro_jax import sharding
from llamapro_jax.model.weights import Weight

LARGEST = 127


class Quantized(flax.struct.PyTreeNode):
    """A matrix, or a stack of them, as `values * scale`.

    values: int8, in the shape of the matrix. scale: float32, the same shape with 1 in the place of
    the dimensions that a product sums over.
    """

    values: jax.Array
    scale: jax.Array


def quantize(array: jax.Array, weight: Weight) -> Quantized:
    """Rounds to the nearest of 255 steps between the largest magnitudes of each output channel."""
    axes = tuple(weight.dims.index(d) - len(weight.dims) for d in weight.contracted)
    array = array.astype(jnp.float32)
    largest = jnp.max(jnp.abs(array), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    return Quantized(jnp.round(array / scale).astype(jnp.int8), scale)


def take(leaf: jax.Array | Quantized, weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """The weight of one block as it is multiplied: gathered over the mesh, in `dtype`.

    What travels over the network is the smaller form: the cast comes first, dequantising after.
    """
    if not isinstance(leaf, Quantized):
        return sharding.use(leaf.astype(dtype), weight)
    values = sharding.use(leaf.values, weight)
    scale = sharding.use_scale(leaf.scale, weight)
    return values.astype(dtype) * scale.astype(dtype)
