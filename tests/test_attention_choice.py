"""The choice of attention reaches the model and the training step."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps

from llamapro_jax.errors import UserError
from llamapro_jax.model.attention import choose, problem_of
from llamapro_jax.model.llama import hidden_states
from llamapro_jax.training.step import build_eval_step, build_train_step

PLAN = steps.PLANS["2 of 4"]
T = 48


def packed_rows(config: Any, rows: int = 2) -> dict[str, jax.Array]:
    """Three documents a row of unequal, odd lengths; the last is padding."""
    lengths = (19, 22, 7)
    ids = np.repeat([1, 2, 0], lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, T))
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "segment_ids": jnp.asarray(np.tile(ids, (rows, 1)), jnp.int32),
        "positions": jnp.asarray(np.tile(positions, (rows, 1)), jnp.int32),
        "loss_mask": jnp.ones((rows, T), bool),
    }


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5, "num_kv_heads": 1}])
def test_the_model_is_the_same_with_a_fused_kernel(changes: dict[str, Any]) -> None:
    config = steps.model_config(PLAN, **changes)
    params = steps.random_params(config, PLAN)
    batch = packed_rows(config)

    def run(attention: Any) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            x_BTD = hidden_states(
                params,
                batch["tokens"],
                batch["positions"],
                batch["segment_ids"],
                config=config,
                segments=PLAN.segments,
                dtype=jnp.float32,
                attention=attention,
            )
            real = (batch["segment_ids"] > 0)[..., None]
            return jnp.sum(jnp.sin(x_BTD) * real), x_BTD * real

        (_, x_BTD), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return x_BTD, gradients

    expected, fused = run("reference"), run("blockwise")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-3),
        fused,
        expected,
    )


def largest_square(text: str, length: int) -> int:
    """Elements of the largest array of a program that has two dimensions of `length` or more."""
    shapes = (
        [int(size) for size in found.split(",")] for found in re.findall(r"\[([0-9,]+)\]", text)
    )
    squares = [shape for shape in shapes if sum(size >= length for size in shape) >= 2]
    return max((int(np.prod(shape)) for shape in squares), default=0)


@pytest.mark.parametrize(("attention", "builds_all_pairs"), [("reference", True), ("auto", False)])
def test_a_long_step_never_holds_all_pairs(attention: str, builds_all_pairs: bool) -> None:
    """From 512 tokens on, `auto` takes the blockwise kernel on a CPU, in step and evaluation."""
    length = 1024
    config = steps.model_config(PLAN, max_position_embeddings=length)
    run = steps.run_config(rows=1, length=length, attention=attention)
    params = steps.random_params(config, PLAN)
    state, frozen, optimizer = steps.begin(run, params)
    batch = steps.random_batch(rows=1, length=length)
    train = build_train_step(config, PLAN, run, optimizer).lower(state, frozen, batch)
    evaluate = build_eval_step(config, PLAN, "float32", attention=run.training.attention)
    for program in (train, evaluate.lower(params, batch)):
        scores = largest_square(program.compile().as_text(), length)
        assert (scores >= config.num_heads * length**2) == builds_all_pairs


def test_a_choice_that_cannot_run_is_refused() -> None:
    q, k = jnp.zeros((1, 64, 4, 8)), jnp.zeros((1, 64, 2, 8))
    problem = problem_of(q, k, None, None, "cpu")
    assert choose("auto", problem) == "reference"
    for name in ("splash", "cudnn", "pallas_gpu"):
        with pytest.raises(UserError, match=f"attention: '{name}' cannot run here"):
            choose(name, problem)
    with pytest.raises(UserError, match="Did you mean 'splash'"):
        choose("spalsh", problem)
