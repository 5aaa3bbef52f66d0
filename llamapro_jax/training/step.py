"""The compiled training step and the compiled evaluation step.

Gradients are taken with respect to what trains, and nothing else: frozen weights are a plain
argument that is neither differentiated, donated nor returned. So the program has no frozen weight
gradient, whatever reads the gradients (a norm, a clip, an accumulator).

B batch, T sequence length, D model, N = B * T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from llamapro_jax.config import RunConfig
from llamapro_jax.data.rows import targets_and_weights
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.loss import summed_cross_entropy
from llamapro_jax.model.config import AttentionChoice, ModelConfig, Remat
from llamapro_jax.model.context import spread
from llamapro_jax.model.llama import Params, head_weight, hidden_states
from llamapro_jax.optimizer import build_schedule, chosen
from llamapro_jax.sharding import activation, axis_size
from llamapro_jax.training.guard import judge
from llamapro_jax.training.state import TrainState, merge

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def summed_loss(
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    plan: ExpansionPlan,
    dtype: Any,
    loss_chunk: int,
    with_new: bool = True,
    remat: Remat = "none",
    attention: AttentionChoice = "reference",
) -> jax.Array:
    """The sum of -log p over the batch's valid target tokens, a float32 scalar (nats).

    batch: the arrays [B, T] of `data.rows`; without `segment_ids` each row is one document and has
    no padding, and more attention kernels run. On a mesh each row is whole on its devices; it is
    laid out over `context` here, after the targets were taken from the tokens' neighbours.
    """
    targets_BT, weights_BT = targets_and_weights(batch)
    segment_ids_BT = batch.get("segment_ids")
    x_BTD = hidden_states(
        params,
        spread(batch["tokens"]),
        spread(batch["positions"]),
        None if segment_ids_BT is None else spread(segment_ids_BT),
        config=config,
        segments=plan.segments,
        dtype=dtype,
        with_new=with_new,
        remat=remat,
        attention=attention,
    )
    return summed_cross_entropy(
        x_BTD, head_weight(params), spread(targets_BT), spread(weights_BT), loss_chunk
    )


def count_targets(batch: Batch) -> jax.Array:
    """Number of tokens of the batch that are predicted, int32."""
    _, weights_BT = targets_and_weights(batch)
    return jnp.sum(weights_BT > 0, dtype=jnp.int32)


def count_microbatches(rows: int, microbatch: int | Literal["auto"], groups: int) -> int:
    """Parts of a batch of `rows`, of which each of `groups` groups of devices takes `microbatch`.

    "auto" is one part: on devices with little memory `training.fit` has put a number in its place.
    """
    return 1 if microbatch == "auto" else rows // (microbatch * groups)


def loss_and_gradients(
    loss: Callable[[Params, Batch], jax.Array], trainable: Params, batch: Batch, microbatches: int
) -> tuple[jax.Array, Params]:
    """The sum of `loss` over `microbatches` parts of the batch, in turn, and its gradient."""
    gradient = jax.value_and_grad(loss)
    if microbatches == 1:
        return gradient(trainable, batch)
    rows_spec = activation("B")

    def one(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(trainable, part)), None

    # A part takes some rows of each device, so that none moves to another.
    def split(array: jax.Array) -> jax.Array:
        rows, length = array.shape
        by_device = jnp.reshape(
            array,
            (rows // microbatches, microbatches, length),
            out_sharding=None if rows_spec is None else jax.P(rows_spec[0], None, None),
        )
        return by_device.swapaxes(0, 1)

    parts = jax.tree.map(split, dict(batch))
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(one, (jnp.zeros((), jnp.float32), zeros), parts)[0]


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, a float32 scalar."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def apply_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    frozen: Params,
    gradients: Params,
    take: jax.Array,
) -> TrainState:
    """`state` with one update taken where the scalar `take` holds, else as it was, to the bit.

    The number of steps is left to the caller. The optimizer is one of the whole parameters. The
    frozen side gets constant zeros for its gradients, and what it gives back for them is dropped,
    so that nothing of it is computed. `take` is a choice for each element, which XLA makes as it
    writes the update over what was there; a `lax.cond` would keep the gradients and both states.
    """
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    updates, opt_state = optimizer.update(
        merge(gradients, zeros), state.opt_state, merge(state.trainable, frozen), take=take
    )
    of_trainable = {name: updates[name] for name in state.trainable}
    for stack in ("base", "new"):
        pairs = zip(updates[stack], state.trainable[stack], strict=True)
        of_trainable[stack] = [{name: every[name] for name in kept} for every, kept in pairs]
    updated = optax.apply_updates(state.trainable, of_trainable)
    return state.replace(trainable=chosen(take, updated, state.trainable), opt_state=opt_state)


def build_train_step(
    config: ModelConfig,
    plan: ExpansionPlan,
    run: RunConfig,
    optimizer: optax.GradientTransformationExtraArgs,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """A jitted `(state, frozen, batch) -> (state, metrics)`. The state passed in is used up.

    batch: arrays [B, T] of `data.rows`. metrics, all scalars: `loss` (nats a target token),
    `tokens` (target tokens), `grad_norm` (of what trains, before clipping), `learning_rate`, and
    those of `training.guard.judge`: with a loss or a gradient that is no number, or a spike, the
    update is skipped. The step then counts, since the batch is a function of it; for the optimizer
    and its schedule it did not happen.
    """
    schedule = build_schedule(run.optimizer, run.training.steps)
    remat: Remat = "none" if run.training.remat == "auto" else run.training.remat

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = count_targets(batch)
        # Each part is divided by the count of the whole batch, so that parts with few targets do
        # not weigh more. A batch of padding alone has loss 0.
        scale = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)

        def loss(trainable: Params, part: Batch) -> jax.Array:
            nll = summed_loss(
                merge(trainable, frozen),
                part,
                config=config,
                plan=plan,
                dtype=jnp.dtype(run.compute_dtype),
                loss_chunk=run.training.loss_chunk,
                remat=remat,
                attention=run.training.attention,
            )
            return nll * scale

        rows = batch["tokens"].shape[0]
        parts = count_microbatches(rows, run.training.microbatch, axis_size("data", "fsdp"))
        mean, gradients = loss_and_gradients(loss, state.trainable, batch, parts)
        norm = global_norm(gradients)
        taken = state.step - state.guard.skipped
        take, guard, judged = judge(state.guard, mean, norm, taken, run.training.spike_sigma)
        metrics = {
            "loss": mean,
            "tokens": tokens,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(taken), jnp.float32),
            **judged,
        }
        updated = apply_gradients(optimizer, state, frozen, gradients, take)
        return updated.replace(step=state.step + 1, guard=guard), metrics

    return jax.jit(step, donate_argnums=0)


def build_eval_step(
    config: ModelConfig,
    plan: ExpansionPlan,
    compute_dtype: Any,
    with_new: bool = True,
    loss_chunk: int = 1024,
    attention: AttentionChoice = "reference",
) -> Callable[[Params, Batch], Metrics]:
    """A jitted `(params, batch) -> {"nll", "tokens"}`: summed loss (nats) and target tokens.

    params: the whole, such as `merge(state.trainable, frozen)`, which copies nothing.
    with_new=False: the model without its last generation of blocks.
    """

    def step(params: Params, batch: Batch) -> Metrics:
        nll = summed_loss(
            params,
            batch,
            config=config,
            plan=plan,
            dtype=jnp.dtype(compute_dtype),
            loss_chunk=loss_chunk,
            with_new=with_new,
            attention=attention,
        )
        return {"nll": nll, "tokens": count_targets(batch)}

    return jax.jit(step)
