"""The useful floating-point operations of a training step.

Useful ones are what the training needs and nothing that an implementation adds (recomputation,
masked halves of the attention, gradients nobody reads). A multiplication and an addition count as
two. Only matrix products count.

D model, F feed-forward, H query heads, C head dim, V vocabulary, T sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import OUTER_BY_NAME, block_weights
from llamapro_jax.training.state import trains


@dataclass(frozen=True)
class StepFlops:
    """FLOPs a token of forward and backward pass.

    forward, activation_gradients, weight_gradients: of the linear layers, the head included.
    attention: of the causal scores and the weighted sum of values, forward and backward.
    """

    forward: float
    activation_gradients: float
    weight_gradients: float
    attention: float

    @property
    def linear(self) -> float:
        return self.forward + self.activation_gradients + self.weight_gradients

    @property
    def total(self) -> float:
        return self.linear + self.attention


def keys_seen(sequence_length: int, sliding_window: int | None) -> float:
    """How many keys a query of a full row attends to on average: half the row without a window."""
    T = sequence_length
    W = min(sliding_window or T, T)
    return W - W * W / (2 * T)


def first_trained(plan: ExpansionPlan, spec: Sequence[str]) -> int | None:
    """Depth of the lowest block that the backward pass reaches; None: it reaches no block."""
    outer_or_base = {"all", "embed", "norms"} & set(spec)
    if outer_or_base:
        return 0
    return plan.new_depths[0] if "new" in spec and plan.new_depths else None


def step_flops(
    config: ModelConfig, plan: ExpansionPlan, spec: Sequence[str], sequence_length: int
) -> StepFlops:
    """Useful FLOPs a token of one training step, by what trains.

    From the table and the plan: forward through every block and the head; the gradient of the
    activations from the head down to the lowest block with something to train; the gradient of the
    weights that train. The paper's 7B model with 8 new blocks at T = 4096: 38.28 G.
    """
    matrices = [weight for weight in block_weights(config) if weight.multiplies]
    block = sum(2 * weight.size(config) for weight in matrices)
    head = 2 * config.vocab_size * config.hidden_size
    keys = keys_seen(sequence_length, config.sliding_window)
    attention = 4 * config.num_heads * config.head_dim * keys

    blocks = plan.num_blocks
    first = first_trained(plan, spec)
    reached = 0 if first is None else blocks - first
    trained = {"new": plan.num_new, "base": blocks - plan.num_new}
    weights = sum(
        2 * weight.size(config) * count
        for stack, count in trained.items()
        for weight in matrices
        if trains(spec, stack, weight)
    )
    head_row = OUTER_BY_NAME["embed" if config.tie_embeddings else "head"]
    if trains(spec, "outer", head_row):
        weights += head
    below_head = first is not None or trains(spec, "outer", OUTER_BY_NAME["final_norm"])
    return StepFlops(
        forward=block * blocks + head,
        activation_gradients=block * reached + (head if below_head else 0),
        weight_gradients=weights,
        attention=attention * (blocks + 2 * reached),
    )
