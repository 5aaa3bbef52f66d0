"""Context parallelism."""

from __future__ import annotations

import jax

from llamapro_jax.sharding import activation, place


def spread(array_BT: jax.Array) -> jax.Array:
    return place(array_BT, activation("BT"))
