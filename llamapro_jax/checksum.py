"""A checksum of each array, taken on the device: proof that frozen weights never moved."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# How many elements `host_checksum` takes at a time: a few times 4 MiB of memory.
_PIECE = 2**20


def _position_hash(shape: tuple[int, ...]) -> jax.Array:
    """An odd uint32 for each position, from its row-major index modulo 2^32.

    The index is summed from an iota a dimension, so that a sharded array is never flattened.
    """
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += iota * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    # The finaliser of MurmurHash3: neighbours get unrelated factors.
    index ^= index >> 16
    index *= jnp.uint32(0x85EBCA6B)
    index ^= index >> 13
    index *= jnp.uint32(0xC2B2AE35)
    index ^= index >> 16
    return index | jnp.uint32(1)


def checksum(array: jax.Array) -> jax.Array:
    """The sum of bit pattern times odd position hash, modulo 2^32, a uint32 scalar.

    One flipped bit changes it by an odd number times a power of two below 2^32, hence always. The
    sum does not depend on its order: any number of devices gives the same.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    return jnp.sum(bits * _position_hash(array.shape), dtype=jnp.uint32)


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [checksum(leaf) for leaf in leaves]


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of 1, 2 or 4 bytes an element, by its path such as "base.0.q"."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in pairs]
    sums = jax.device_get(_checksums([leaf for _, leaf in pairs]))
    return {name: int(value) for name, value in zip(names, sums, strict=True)}


def host_checksum(array: np.ndarray, first: int = 0) -> int:
    """The same of an array in the host's memory, a piece at a time.

    first: the row-major index that its first element has in a larger one, whose checksum is the sum
    of those of its parts modulo 2^32.
    """
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    flat = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    total = 0
    for start in range(0, flat.size, _PIECE):
        bits = flat[start : start + _PIECE].astype(np.uint32)
        place = first + start
        index = np.arange(place, place + bits.size, dtype=np.uint64).astype(np.uint32)
        index ^= index >> 16
        index *= np.uint32(0x85EBCA6B)
        index ^= index >> 13
        index *= np.uint32(0xC2B2AE35)
        index ^= index >> 16
        total += int(np.sum(bits * (index | np.uint32(1)), dtype=np.uint32))
    return total % 2**32
