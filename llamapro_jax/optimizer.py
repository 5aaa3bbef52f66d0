"""AdamW on what trains, nothing on the rest, and the schedules of the learning rate.

What trains is decided by labels that come from the structure of the parameters (which stack, which
row of the table), never from matching names.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llamapro_jax.config import OptimizerConfig
from llamapro_jax.model.weights import BLOCK_BY_NAME, OUTER_BY_NAME, Weight


def build_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of step 0, 1, ... of a run of `steps`.

    The warmup rises linearly and is already above 0 at step 0, so that no step is wasted; the
    peak is reached after `config.warmup(steps)` steps. A decay ends, at `final_ratio` of the peak,
    where step `steps` would be.
    """
    peak, warmup = config.learning_rate, config.warmup(steps)
    final = peak * config.final_ratio
    rest = steps - warmup
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_ratio)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd" and config.decay(steps):
        decay = config.decay(steps)
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def row_of(path: tuple[Any, ...]) -> Weight:
    """The row of the table of the leaf at a path of the parameters, such as ("new", 1, "q")."""
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return OUTER_BY_NAME[names[0]] if len(names) == 1 else BLOCK_BY_NAME[names[-1]]


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay is for: matrices, not norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: row_of(path).decays, params)


def chosen(take: jax.Array, new: Any, old: Any) -> Any:
    """The tree `new` where the scalar `take` holds, else `old` to the bit."""
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, same state and bits, whose moments stay as they are without `take`.

    The moments are chosen before the update is computed from them. Of a choice made afterwards, as
    around a transformation of optax's, XLA keeps the moments before and after, for each leaf.
    """

    def update(
        gradients: Any, state: optax.ScaleByAdamState, params: Any = None, *, take: jax.Array
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = chosen(take, optax.tree.update_moment(gradients, state.mu, b1, 1), state.mu)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
        nu = chosen(take, nu, state.nu)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return updates, optax.ScaleByAdamState(jnp.where(take, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate`, whose schedule does not move on without `take`."""
    inner = optax.scale_by_learning_rate(schedule)

    def update(updates: Any, state: Any, params: Any = None, *, take: jax.Array) -> tuple[Any, Any]:
        updates, after = inner.update(updates, state, params)
        return updates, chosen(take, after, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def build_optimizer(
    config: OptimizerConfig, steps: int, labels: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the whole parameters, `labels` being "train" or "freeze" for each leaf.

    Clipping and AdamW see the leaves that train and no others. The frozen side has no state and
    its updates are zero; see `training.step.apply_gradients` for what is passed in its place.
    `update` takes `take=`, a boolean scalar: without it the state stays as it is, to the bit, and
    the updates are meaningless.
    """
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    # The parts of `optax.adamw`, in its structure.
    adamw = optax.chain(
        scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        scale_by_learning_rate(build_schedule(config, steps)),
    )
    train = optax.chain(*clip, adamw)
    return optax.multi_transform({"train": train, "freeze": optax.set_to_zero()}, labels)
