"""Frozen matrices in 8 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import PLANS, expanded_params, model_config, random_batch, run_config

from llamapro_jax.config import MeshConfig
from llamapro_jax.model.quantized import Quantized, quantize, take
from llamapro_jax.model.weights import BLOCK, BLOCK_BY_NAME
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.sharding import build_mesh
from llamapro_jax.training.abstract import abstract_arguments
from llamapro_jax.training.state import dtype_of, init_state, labels, map_leaves, partition
from llamapro_jax.training.step import build_train_step

# One kind of group: the step is compiled twice here, and each kind takes as long.
PLAN = PLANS["2 of 4"]
CONFIG = model_config(PLAN)
MATRICES = [weight.name for weight in BLOCK if weight.multiplies]


@pytest.mark.parametrize("name", MATRICES)
def test_no_value_moves_by_more_than_half_a_step(name: str) -> None:
    weight = BLOCK_BY_NAME[name]
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((2, 3, *weight.shape(CONFIG))).astype(np.float32)
    found = quantize(jnp.asarray(matrix), weight)
    assert found.values.dtype == jnp.int8
    # One scale for each output channel, the largest magnitude of what is summed into it.
    summed = tuple(2 + weight.dims.index(dim) for dim in weight.contracted)
    largest = np.abs(matrix).max(axis=summed, keepdims=True)
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    error = np.abs(take(found, weight, jnp.float32) - matrix)
    assert (error <= found.scale * 0.5001).all()
    assert int(jnp.abs(found.values).max()) == 127


def test_zeros_stay_zeros() -> None:
    weight = BLOCK_BY_NAME["down"]
    found = quantize(jnp.zeros(weight.shape(CONFIG)), weight)
    assert not take(found, weight, jnp.bfloat16).any()


def quantized_frozen(params: Any) -> Any:
    dtype = dtype_of(("new",), "float32", "int8")

    def leaf(stack: str, weight: Any, array: jax.Array) -> Any:
        return quantize(array, weight) if dtype(stack, weight) == jnp.int8 else array

    return map_leaves(params, leaf)


def test_a_step_over_an_int8_base_trains_the_same_blocks_on_nearly_the_same_loss() -> None:
    run = run_config(rows=8)
    exact = expanded_params(CONFIG, PLAN)
    losses = []
    for params in (exact, quantized_frozen(exact)):
        trainable, frozen = partition(jax.tree.map(jnp.copy, params), run.trainable)
        optimizer = build_optimizer(run.optimizer, 20, labels(params, run.trainable))
        step = build_train_step(CONFIG, PLAN, run, optimizer)
        state = init_state(trainable, frozen, optimizer)
        before = jax.tree.map(jnp.copy, frozen)
        of_this = []
        for seed in range(6):
            state, metrics = step(state, frozen, random_batch(seed % 2, rows=8))
            of_this.append(float(metrics["loss"]))
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
            assert one.dtype == other.dtype and bool((one == other).all())
        losses.append(of_this)
    (first, *_, last), approximate = losses[0], losses[1]
    assert last < first and approximate[-1] < approximate[0]
    np.testing.assert_allclose(approximate, losses[0], rtol=0.02)
    assert approximate != losses[0]


def test_the_base_is_stored_in_8_bits_and_nothing_else_is() -> None:
    run = replace(run_config(compute_dtype="bfloat16"), frozen_dtype="int8")
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        int8 = abstract_arguments(CONFIG, PLAN, run, mesh)
    for leaves in int8.frozen["base"]:
        for name, leaf in leaves.items():
            assert isinstance(leaf, Quantized) == BLOCK_BY_NAME[name].multiplies, name
    assert int8.frozen["head"].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(int8.state.trainable))
