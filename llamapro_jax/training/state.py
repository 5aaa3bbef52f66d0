"""What trains and what does not: by structure, checked against the plan, and shown as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import Params
from llamapro_jax.model.params import DtypeOf
from llamapro_jax.model.weights import (
    BLOCK_BY_NAME,
    OUTER_BY_NAME,
    Weight,
    block_parameters,
    block_weights,
    outer_weights,
)
from llamapro_jax.training.guard import Guard, initial

STACKS = ("base", "new")

# ("new",), ("all",), or "new" with any of "embed", "head", "norms".
Spec = Sequence[str]


class TrainState(flax.struct.PyTreeNode):
    """What a step changes. step: int32 scalar, the number of steps taken.

    trainable: the parameters' structure with only the leaves that train, float32. guard: of the
    steps whose update was skipped, which the optimizer's own counts leave out.
    """

    step: jax.Array
    trainable: Params
    opt_state: Any
    guard: Guard


def is_norm(weight: Weight) -> bool:
    return weight.init == "ones"


def trains(spec: Spec, stack: str, weight: Weight) -> bool:
    """Whether a row of the table trains in a stack: "base", "new", or "outer" (in no block)."""
    if "all" in spec:
        return True
    if stack == "new":
        return "new" in spec
    if is_norm(weight):
        return "norms" in spec
    return stack == "outer" and weight.name in spec


def map_leaves(
    params: Params,
    leaf: Callable[[str, Weight, Any], Any],
    keep: Callable[[str, Weight], bool] = lambda stack, weight: True,
) -> Params:
    """`leaf(stack, row, array)` of each array that `keep(stack, row)` says, same structure."""

    def mapped(stack: str, leaves: dict[str, Any], rows: dict[str, Weight]) -> dict[str, Any]:
        return {
            name: leaf(stack, rows[name], array)
            for name, array in leaves.items()
            if keep(stack, rows[name])
        }

    outer = {name: array for name, array in params.items() if name not in STACKS}
    result: Params = mapped("outer", outer, OUTER_BY_NAME)
    for stack in STACKS:
        result[stack] = [mapped(stack, leaves, BLOCK_BY_NAME) for leaves in params[stack]]
    return result


def partition(params: Params, spec: Spec) -> tuple[Params, Params]:
    """(trainable, frozen): the same nested structure, each with only its own leaves.

    The arrays are not copied: a donated train step uses up those of `params` that train.
    """
    trainable = map_leaves(params, lambda *row: row[2], lambda *row: trains(spec, *row))
    frozen = map_leaves(params, lambda *row: row[2], lambda *row: not trains(spec, *row))
    return trainable, frozen


def merge(trainable: Params, frozen: Params) -> Params:
    """The parameters of which `partition` made the two."""
    merged = {**trainable, **frozen}
    for stack in STACKS:
        pairs = zip(trainable[stack], frozen[stack], strict=True)
        merged[stack] = [{**one, **other} for one, other in pairs]
    return merged


def labels(params: Params, spec: Spec) -> Any:
    """ "train" or "freeze" for each leaf, for `optimizer.build_optimizer`."""

    def label(stack: str, weight: Weight, _: Any) -> str:
        return "train" if trains(spec, stack, weight) else "freeze"

    return map_leaves(params, label)


def dtype_of(spec: Spec, compute_dtype: Any, frozen_dtype: str = "compute") -> DtypeOf:
    """For `model.params.load_params`: float32 masters for what trains, the rest as computed with.

    A frozen weight is never kept in float32 when the step computes in bfloat16. frozen_dtype
    "int8": the frozen matrices of the base blocks are kept in 8 bits.
    """

    def dtype(stack: str, weight: Weight) -> Any:
        if trains(spec, stack, weight):
            return jnp.dtype(jnp.float32)
        if frozen_dtype == "int8" and stack == "base" and weight.multiplies:
            return jnp.dtype(jnp.int8)
        return jnp.dtype(compute_dtype)

    return dtype


def init_state(
    trainable: Params, frozen: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step. `frozen` gives its structure alone, no value is read."""

    def init(trainable: Params, frozen: Params) -> tuple[jax.Array, Any, Guard]:
        return jnp.zeros((), jnp.int32), optimizer.init(merge(trainable, frozen)), initial()

    step, opt_state, guard = jax.jit(init)(trainable, frozen)
    return TrainState(step, trainable, opt_state, guard)


def leaves_of(config: ModelConfig, plan: ExpansionPlan) -> Iterator[tuple[str, str, Weight, Any]]:
    """(path, stack, row, shape) of every leaf of the parameters; path such as "new.1.q"."""
    for weight in outer_weights(config):
        yield weight.name, "outer", weight, weight.shape(config)
    for stack in STACKS:
        for number, segment in enumerate(plan.segments):
            blocks = segment.new if stack == "new" else segment.base
            for weight in block_weights(config) if blocks else ():
                shape = (segment.repeats, blocks, *weight.shape(config))
                yield f"{stack}.{number}.{weight.name}", stack, weight, shape


def leaf_path(path: tuple[Any, ...]) -> str:
    """A path of jax's as "new.1.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by a path such as "new.1.q"."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_spec(spec: Spec, config: ModelConfig, plan: ExpansionPlan) -> None:
    """Raises UserError when `trainable` names what this model does not have."""
    if "new" in spec and not plan.num_new:
        raise UserError(
            "trainable: 'new' trains the inserted blocks, and this model has none; insert some "
            "with `llamapro expand`, or set trainable to 'all' to train the whole model."
        )
    if "head" in spec and config.tie_embeddings:
        raise UserError(
            "trainable: 'head' is tied to the embedding in this model and is no tensor of its "
            "own; use 'embed', which trains both."
        )


def check_trainable(
    trainable: Params, config: ModelConfig, plan: ExpansionPlan, spec: Spec
) -> None:
    """Raises UserError unless exactly what the plan and `spec` say is about to train.

    Compared are the leaves by name, their shapes, and for `new` alone the number of parameters
    with that of so many blocks.
    """
    check_spec(spec, config, plan)
    expected = {
        path: tuple(shape)
        for path, stack, weight, shape in leaves_of(config, plan)
        if trains(spec, stack, weight)
    }
    found = {
        leaf_path(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    what = f"trainable: {', '.join(spec)} of {plan.num_blocks} blocks"
    for path in sorted(found.keys() | expected.keys()):
        if path not in expected:
            raise UserError(f"{what}: {path} would train, but the plan says it is frozen.")
        if path not in found:
            raise UserError(f"{what}: {path} is frozen, but the plan says it trains.")
        if found[path] != expected[path]:
            raise UserError(
                f"{what}: {path} has shape {list(found[path])}; the plan says "
                f"{list(expected[path])}."
            )
    count = sum(math.prod(shape) for shape in found.values())
    wanted = plan.num_new * block_parameters(config)
    if tuple(spec) == ("new",) and count != wanted:
        raise UserError(
            f"{what}: {count:,} parameters would train; {plan.num_new} new blocks have {wanted:,}."
        )


@dataclass(frozen=True)
class TableRow:
    """A part of the model. blocks: the depths of the blocks it lies in, none outside of them."""

    what: str
    blocks: tuple[int, ...]
    parameters: int
    dtype: str
    trains: bool


def trainable_table(
    config: ModelConfig, plan: ExpansionPlan, spec: Spec, compute_dtype: Any
) -> list[TableRow]:
    """What trains and what does not, from the embedding to the head."""
    dtype = dtype_of(spec, compute_dtype)
    depths = {s: tuple(b.depth for b in plan.blocks if b.stack == s) for s in STACKS}
    names = {"embed": "embedding", "final_norm": "final norm", "head": "head"}
    if config.tie_embeddings:
        names["embed"] = "embedding and tied head"
    parts: dict[str, tuple[str, list[Weight]]] = {}
    for weight in outer_weights(config):
        parts[names[weight.name]] = ("outer", [weight])
    for stack in STACKS:
        rows = block_weights(config) if depths[stack] else ()
        for weight in rows:
            whole = trains(spec, stack, weight) == trains(spec, stack, BLOCK_BY_NAME["q"])
            name = f"{stack} blocks" if whole else f"norms of {stack} blocks"
            parts.setdefault(name, (stack, []))[1].append(weight)
    order = ["outer", *STACKS]
    table = []
    for name, (stack, rows) in sorted(
        parts.items(), key=lambda part: (part[0] in ("final norm", "head"), order.index(part[1][0]))
    ):
        blocks = depths.get(stack, ())
        table.append(
            TableRow(
                what=name,
                blocks=blocks,
                parameters=sum(row.size(config) for row in rows) * (len(blocks) or 1),
                dtype=jnp.dtype(dtype(stack, rows[0])).name,
                trains=trains(spec, stack, rows[0]),
            )
        )
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 5" of (0, 1, 2, 3, 5)."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def format_table(rows: Sequence[TableRow]) -> str:
    """The table as text, with the sums of what trains and what does not."""
    heads = ("part", "parameters", "dtype", "trains", "blocks")
    cells = [
        (r.what, f"{r.parameters:,}", r.dtype, "yes" if r.trains else "no", _ranges(r.blocks))
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    aligned = "<><<<"
    lines = [
        "  ".join(f"{text:{a}{w}}" for text, a, w in zip(line, aligned, widths, strict=True))
        for line in (heads, *cells)
    ]
    sums = [sum(r.parameters for r in rows if r.trains == wanted) for wanted in (True, False)]
    share = sums[0] / sum(sums)
    lines.append(f"trains {sums[0]:,} ({share:.1%}), frozen {sums[1]:,}")
    return "\n".join(line.rstrip() for line in lines)
