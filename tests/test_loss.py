"""The chunked cross-entropy against its naive form."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamapro_jax.loss import summed_cross_entropy

N, D, V = 37, 12, 29


def inputs(dtype: Any = np.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((N, D)), dtype)
    head = jnp.asarray(rng.standard_normal((V, D)), dtype)
    targets = jnp.asarray(rng.integers(0, V, N), jnp.int32)
    weights = jnp.asarray(rng.random(N) < 0.6, jnp.float32) * 1.5
    return x, head, targets, weights


def naive(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    logits = x.astype(jnp.float32) @ head.astype(jnp.float32).T
    chosen = jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]
    return -(chosen * weights).sum()


@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 1000])
def test_loss_and_gradients_equal_the_naive_form(chunk: int) -> None:
    """Also where the chunk does not divide the tokens: what is padded in has no weight."""
    args = inputs()
    expected, (x_grad, head_grad) = jax.value_and_grad(naive, (0, 1))(*args)
    assert float(summed_cross_entropy(*args, chunk)) == pytest.approx(float(expected), rel=1e-6)
    found, grads = jax.jit(jax.value_and_grad(summed_cross_entropy, (0, 1)), static_argnums=4)(
        *args, chunk
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(grads[0], x_grad, atol=1e-5)
    np.testing.assert_allclose(grads[1], head_grad, atol=1e-5)


def test_gradient_of_one_argument_alone_and_a_scaled_loss() -> None:
    args = inputs()
    for argument in (0, 1):
        expected = jax.grad(lambda *a: 0.25 * naive(*a), argument)(*args)
        found = jax.grad(lambda *a: 0.25 * summed_cross_entropy(*a, 8), argument)(*args)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16() -> None:
    args = inputs(jnp.bfloat16)
    expected, grads = jax.value_and_grad(naive, (0, 1))(*args)
    found, ours = jax.value_and_grad(summed_cross_entropy, (0, 1))(*args, 8)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-2)
    for one, other in zip(ours, grads, strict=True):
        assert one.dtype == jnp.bfloat16
        difference = np.abs(np.float32(one) - np.float32(other)).max()
        assert difference < 0.02 * np.abs(np.float32(other)).max()


def test_a_float32_head_that_trains_gets_a_float32_gradient() -> None:
    """Masters are float32 though the step computes in bfloat16."""
    x, head, targets, weights = inputs(jnp.bfloat16)
    head = head.astype(jnp.float32)
    grad = jax.grad(summed_cross_entropy, 1)(x, head, targets, weights, 8)
    assert grad.dtype == jnp.float32


def largest_buffer(function: Any, *args: Any) -> int:
    """Elements of the largest array whose last dimension is the vocabulary's."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", text)}
    return max(int(np.prod(shape)) for shape in shapes if shape[-1] == 1024)


@pytest.mark.parametrize("differentiated", [(), (0,), (0, 1)])
def test_no_more_logits_than_a_chunk_at_a_time(differentiated: tuple[int, ...]) -> None:
    tokens, width, vocabulary, chunk = 512, 8, 1024, 64
    args = (
        jnp.ones((tokens, width)), jnp.ones((vocabulary, width)),
        jnp.zeros(tokens, jnp.int32), jnp.ones(tokens),
    )

    def chunked(*args: Any) -> Any:
        return summed_cross_entropy(*args, chunk)

    def with_gradients(loss: Any) -> Any:
        return jax.value_and_grad(loss, differentiated) if differentiated else loss

    assert largest_buffer(with_gradients(chunked), *args) == chunk * vocabulary
    assert largest_buffer(with_gradients(naive), *args) == tokens * vocabulary


def test_a_frozen_head_costs_no_gradient() -> None:
    """Two products with the head (loss, gradient of x); a third only when the head trains."""
    from llamapro_jax.program import compiled_matmul_flops

    args = inputs()
    one = 2 * 40 * D * V  # 37 tokens in chunks of 8
    for differentiated, products in (((0,), 2), ((0, 1), 3)):
        function = jax.value_and_grad(lambda *a: summed_cross_entropy(*a, 8), differentiated)
        compiled = jax.jit(function).lower(*args).compile()
        assert compiled_matmul_flops(compiled) == products * one
