"""From a source to the arrays of the step: segments of stacked leaves, each in its dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import INITIALIZERS, Params
from llamapro_jax.model.quantized import Quantized, quantize
from llamapro_jax.model.weights import Tensor, Weight, block_weights, outer_weights
from llamapro_jax.sharding import HostParts, scale_spec, weight_sharding
from llamapro_jax.sources import Source, read_part

# Stack ("base", "new", or "outer" for what is in no block) and row of the table -> dtype.
DtypeOf = Callable[[str, Weight], Any]

# Depths of the blocks of a leaf [repeats, blocks, ...]; None: a leaf outside of the blocks.
Depths = tuple[tuple[int, ...], ...] | None


def build_params(
    config: ModelConfig, plan: ExpansionPlan, leaf: Callable[[str, Weight, Depths], Any]
) -> Params:
    """Parameters in the layout of `model.llama`, each leaf as `leaf(stack, row, depths)` gives."""
    params: Params = {w.name: leaf("outer", w, None) for w in outer_weights(config)}
    for stack in ("base", "new"):
        params[stack] = []
        for segment in plan.segments:
            depths = tuple(tuple(group) for group in segment.rows(stack))
            rows = block_weights(config) if depths[0] else ()
            params[stack].append({w.name: leaf(stack, w, depths) for w in rows})
    return params


def leaf_shape(weight: Weight, config: ModelConfig, depths: Depths) -> tuple[int, ...]:
    leading = () if depths is None else (len(depths), len(depths[0]))
    return (*leading, *weight.shape(config))


def _leading(depths: Depths) -> int:
    return 0 if depths is None else 2


def load_params(source: Source, dtype_of: DtypeOf, mesh: Mesh | None = None) -> Params:
    """Reads a model a tensor at a time into the arrays of the step.

    dtype_of: the dtype in which each leaf is kept; the cast from the stored one happens here. int8
    is `model.quantized`. mesh: where the leaves are laid out as `sharding.LAYOUT` says; they are
    born so, and the host holds one leaf at a time, of it only what its devices need. None: all is
    on the default device.
    """
    config, plan = source.config, source.plan

    def leaf(stack: str, weight: Weight, depths: Depths) -> Any:
        dtype = jnp.dtype(dtype_of(stack, weight))
        shape, leading = leaf_shape(weight, config, depths), _leading(depths)
        first = Tensor(weight, None if depths is None else depths[0][0])
        read_as = source.dtype(first) if dtype == jnp.int8 else dtype
        sharding = None if mesh is None else weight_sharding(mesh, weight, leading)
        host = HostParts(shape, read_as, sharding)
        where: dict[tuple[int, ...], int | None] = {(): None}
        if depths is not None:
            where = {(i, j): d for i, group in enumerate(depths) for j, d in enumerate(group)}
        for at, depth in where.items():
            tensor = Tensor(weight, depth)
            if not host.has_all:
                for bounds, part in host.parts.items():
                    part[at] = read_part(source, tensor, bounds[leading:])
                continue
            # Read whole, a tensor is compared with its hash.
            whole = weight.from_hf(source.read(tensor), config)
            for bounds, part in host.parts.items():
                part[at] = whole[tuple(slice(*bound) for bound in bounds[leading:])]
        return _quantized(host.place(), weight) if dtype == jnp.int8 else host.place()

    return build_params(config, plan, leaf)


def abstract_params(
    config: ModelConfig, plan: ExpansionPlan, dtype_of: DtypeOf, mesh: Mesh | None = None
) -> Params:
    """The parameters of `load_params` as shapes, dtypes and shardings, for a program alone."""

    def leaf(stack: str, weight: Weight, depths: Depths) -> Any:
        dtype = jnp.dtype(dtype_of(stack, weight))
        shape, leading = leaf_shape(weight, config, depths), _leading(depths)
        sharding = None if mesh is None else weight_sharding(mesh, weight, leading)
        array = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        if dtype != jnp.int8:
            return array
        scales = tuple(
            1 if dim in weight.contracted else size
            for dim, size in zip(weight.dims, shape[leading:], strict=True)
        )
        if sharding is not None:
            sharding = sharding.update(spec=scale_spec(weight, sharding.spec))
        scale = jax.ShapeDtypeStruct((*shape[:leading], *scales), jnp.float32, sharding=sharding)
        return Quantized(array, scale)

    return build_params(config, plan, leaf)


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def _quantized(leaf: jax.Array, weight: Weight) -> Quantized:
    return quantize(leaf, weight)


def init_params(key: jax.Array, config: ModelConfig, plan: ExpansionPlan, dtype: Any) -> Params:
    """Random parameters from the initializers of the table; norms are ones, biases zeros."""
    names: dict[str, int] = {}

    def draw(stack: str, weight: Weight, depths: Depths) -> jax.Array:
        # The key of a leaf depends on its name and order alone, so that it does not change when
        # another row joins the table.
        name = weight.name if depths is None else f"{stack}.{weight.name}"
        names[name] = names.get(name, 0) + 1
        digest = sum(ord(c) * 31**i for i, c in enumerate(f"{name}{names[name]}")) % 2**31
        leaf_key = jax.random.fold_in(key, digest)
        return INITIALIZERS[weight.init](leaf_key, leaf_shape(weight, config, depths), dtype)

    return build_params(config, plan, draw)


def block_row(params: Params, plan: ExpansionPlan, depth: int) -> dict[str, jax.Array]:
    """The leaves of the block at `depth`, unstacked."""
    for number, segment in enumerate(plan.segments):
        for stack in ("base", "new"):
            for i, group in enumerate(segment.rows(stack)):
                if depth in group:
                    j = group.index(depth)
                    return {name: leaf[i, j] for name, leaf in params[stack][number].items()}
    raise IndexError(depth)
