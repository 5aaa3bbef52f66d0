"""From a source to the arrays of the step: segments of stacked leaves, each in its dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import INITIALIZERS, Params
from llamapro_jax.model.weights import Tensor, Weight, block_weights, outer_weights
from llamapro_jax.sources import Source

# Stack ("base", "new", or "outer" for what is in no block) and row of the table -> dtype.
DtypeOf = Callable[[str, Weight], Any]


def load_params(source: Source, dtype_of: DtypeOf) -> Params:
    """Reads a model into host memory in the layout of `model.llama`, and places it on the device.

    dtype_of: the dtype in which each leaf is kept; the cast from the stored one happens here.
    """
    config, plan = source.config, source.plan

    def array(tensor: Tensor, dtype: Any) -> np.ndarray:
        return tensor.weight.from_hf(source.read(tensor), config).astype(dtype)

    params: Params = {
        weight.name: jnp.asarray(array(Tensor(weight, None), dtype_of("outer", weight)))
        for weight in outer_weights(config)
    }
    for stack in ("base", "new"):
        params[stack] = []
        for segment in plan.segments:
            rows = segment.rows(stack)
            leaves = {}
            for weight in block_weights(config) if rows[0] else ():
                dtype = dtype_of(stack, weight)
                shape = (segment.repeats, len(rows[0]), *weight.shape(config))
                leaf = np.empty(shape, dtype)
                for i, group in enumerate(rows):
                    for j, depth in enumerate(group):
                        leaf[i, j] = array(Tensor(weight, depth), dtype)
                leaves[weight.name] = jnp.asarray(leaf)
            params[stack].append(leaves)
    return params


def init_params(key: jax.Array, config: ModelConfig, plan: ExpansionPlan, dtype: Any) -> Params:
    """Random parameters from the initializers of the table; norms are ones, biases zeros."""
    names: dict[str, int] = {}

    def draw(weight: Weight, name: str, leading: tuple[int, ...] = ()) -> jax.Array:
        # The key of a leaf depends on its name and order alone, so that it does not change when
        # another row joins the table.
        names[name] = names.get(name, 0) + 1
        digest = sum(ord(c) * 31**i for i, c in enumerate(f"{name}{names[name]}")) % 2**31
        leaf_key = jax.random.fold_in(key, digest)
        return INITIALIZERS[weight.init](leaf_key, (*leading, *weight.shape(config)), dtype)

    params: Params = {w.name: draw(w, w.name) for w in outer_weights(config)}
    for stack in ("base", "new"):
        params[stack] = []
        for segment in plan.segments:
            blocks = segment.new if stack == "new" else segment.base
            rows = block_weights(config) if blocks else ()
            leading = (segment.repeats, blocks)
            params[stack].append({w.name: draw(w, f"{stack}.{w.name}", leading) for w in rows})
    return params


def block_row(params: Params, plan: ExpansionPlan, depth: int) -> dict[str, jax.Array]:
    """The leaves of the block at `depth`, unstacked."""
    for number, segment in enumerate(plan.segments):
        for stack in ("base", "new"):
            for i, group in enumerate(segment.rows(stack)):
                if depth in group:
                    j = group.index(depth)
                    return {name: leaf[i, j] for name, leaf in params[stack][number].items()}
    raise IndexError(depth)
