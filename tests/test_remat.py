"""What each rematerialisation policy computes again and what it keeps, in the compiled step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from steps import begin, expanded_params, model_config, random_batch, run_config

from llamapro_jax.expansion import ExpansionPlan, spread
from llamapro_jax.flops import step_flops
from llamapro_jax.model.config import Remat
from llamapro_jax.model.weights import block_weights
from llamapro_jax.program import compiled_matmul_flops
from llamapro_jax.training.state import merge
from llamapro_jax.training.step import build_train_step, summed_loss

# Prefix of 2, then three times a new block and 2 base blocks, then a new block alone.
PLAN = ExpansionPlan(8).expand(spread(8, 4))
CONFIG = model_config(PLAN)
ROWS, LENGTH = 4, 16
# Blocks that the backward pass reaches: all from the first new one on.
REACHED = PLAN.num_blocks - PLAN.new_depths[0]
POLICIES: tuple[Remat, ...] = ("none", "minimal", "attention", "full")


def compiled(remat: Remat, attention: str = "reference", dtype: Any = "float32") -> Any:
    run = run_config(
        remat=remat,
        rows=ROWS,
        length=LENGTH,
        loss_chunk=ROWS * LENGTH,
        attention=attention,
        compute_dtype=dtype,
    )
    state, frozen, optimizer = begin(run, expanded_params(CONFIG, PLAN))
    step = build_train_step(CONFIG, PLAN, run, optimizer)
    batch = random_batch(rows=ROWS, length=LENGTH)
    return step.lower(state, frozen, batch).compile(), (state, frozen, batch)


def computed_again(remat: Remat, blocks: int) -> float:
    """FLOPs beyond the step's own when `blocks` blocks run again, by the shapes."""
    tokens = ROWS * LENGTH
    # The reference computes the scores of all pairs.
    attention = 4 * CONFIG.num_heads * CONFIG.head_dim * LENGTH * tokens
    if remat == "none":
        return 0
    # The reference gives its output no name, so that scores come again; its output, which only the
    # gradient of a weight reads, in new blocks alone.
    if remat == "minimal":
        of_new = PLAN.num_new - (REACHED - blocks)
        return attention / 2 * (blocks + of_new)
    # What the backward pass does not read is not computed again: the last product of a block.
    block = sum(2 * w.size(CONFIG) for w in block_weights(CONFIG) if w.multiplies) * tokens
    down = 2 * CONFIG.hidden_size * CONFIG.intermediate_size * tokens
    return blocks * (block + attention - down)


@pytest.mark.slow
@pytest.mark.parametrize("remat", POLICIES)
def test_matrix_products_computed_again(remat: Remat) -> None:
    tokens = ROWS * LENGTH
    linear = step_flops(CONFIG, PLAN, ("new",), LENGTH).linear * tokens
    attention = 4 * CONFIG.num_heads * CONFIG.head_dim * LENGTH * tokens
    program, _ = compiled(remat)
    again = compiled_matmul_flops(program) - linear - attention * (PLAN.num_blocks + 2 * REACHED)
    # XLA may merge the last block's second pass, which is in no loop, with its first.
    assert computed_again(remat, REACHED - 1) <= again <= computed_again(remat, REACHED)


@pytest.mark.slow
def test_every_policy_gives_the_same_step() -> None:
    results = {}
    for remat in POLICIES:
        program, arguments = compiled(remat, "blockwise")
        state, metrics = program(*arguments)
        results[remat] = (jax.device_get(state.trainable), float(metrics["grad_norm"]))
    for remat, (trainable, norm) in results.items():
        assert norm == pytest.approx(results["none"][1], rel=1e-5), remat
        for one, other in zip(
            jax.tree.leaves(trainable), jax.tree.leaves(results["none"][0]), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-5)


def residuals(remat: Remat) -> int:
    """Bytes that the loss keeps for its gradient, by jax's own account."""
    run = run_config(rows=ROWS, length=LENGTH)
    state, frozen, _ = begin(run, expanded_params(CONFIG, PLAN))
    batch = {name: jnp.asarray(array) for name, array in random_batch(0, ROWS, LENGTH).items()}

    def loss(trainable: Any) -> jax.Array:
        return summed_loss(
            merge(trainable, frozen),
            batch,
            config=CONFIG,
            plan=PLAN,
            dtype=jnp.bfloat16,
            loss_chunk=64,
            remat=remat,
            attention="blockwise",
        )

    kept = saved_residuals(loss, state.trainable)
    weights = {leaf.shape for leaf in jax.tree.leaves((state.trainable, frozen))}
    matrices = {shape for shape in weights if len(shape) > 3}
    copies = [aval for aval, _ in kept if aval.shape in matrices and aval.dtype == jnp.bfloat16]
    assert not copies, f"{remat} keeps copies of weights: {copies}"
    return sum(aval.size * aval.dtype.itemsize for aval, _ in kept if aval.shape not in weights)


def test_each_policy_keeps_less_than_the_one_before_and_none_a_copy_of_a_weight() -> None:
    kept = [residuals(remat) for remat in POLICIES]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), kept
