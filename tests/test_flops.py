"""Useful FLOPs and parameter counts against the published and derived numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from steps import model_config

from llamapro_jax.expansion import ExpansionPlan, spread
from llamapro_jax.flops import compiled_matmul_flops, keys_seen, matmul_flops_of_hlo, step_flops
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import block_parameters, total_parameters

# (blocks, hidden, intermediate, heads, key/value heads, vocabulary)
SIZES = {
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "13B": (40, 5120, 13824, 40, 40, 32000),
    "70B": (80, 8192, 28672, 64, 8, 32000),
    "Mistral-7B": (32, 4096, 14336, 32, 8, 32000),
    "Llama-3-8B": (32, 4096, 14336, 32, 8, 128256),
}


def published(name: str, new: int) -> tuple[ModelConfig, ExpansionPlan]:
    blocks, hidden, intermediate, heads, kv_heads, vocabulary = SIZES[name]
    plan = ExpansionPlan(blocks)
    if new:
        plan = plan.expand(spread(blocks, new))
    return (
        model_config(
            plan,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads,
            vocab_size=vocabulary,
        ),
        plan,
    )


@pytest.mark.parametrize(
    ("name", "new", "parameters"),
    [
        ("7B", 0, 6_738_415_616),
        ("7B", 8, 8_357_482_496),
        ("13B", 8, 15_553_500_160),
        ("70B", 8, 75_821_883_392),
        ("Mistral-7B", 8, 8_986_628_096),
        ("Llama-3-8B", 8, 9_775_157_248),
    ],
)
def test_parameters(name: str, new: int, parameters: int) -> None:
    assert total_parameters(published(name, new)[0]) == parameters


def test_new_parameters_of_7b() -> None:
    config, plan = published("7B", 8)
    assert block_parameters(config) == 202_383_360
    assert plan.num_new * block_parameters(config) == 1_619_066_880


@pytest.mark.parametrize(
    ("new", "spec", "total"),
    [(8, ("new",), 38.28), (8, ("all",), 53.38), (0, ("all",), 42.86)],
)
def test_flops_of_7b(new: int, spec: tuple[str, ...], total: float) -> None:
    flops = step_flops(*published("7B", new), spec, 4096)
    assert round(flops.total / 1e9, 2) == total


def test_flops_of_7b_by_part() -> None:
    flops = step_flops(*published("7B", 8), ("new",), 4096)
    A, h, a = 0.404750336, 0.262144, 0.033554432
    assert flops.forward == pytest.approx((40 * A + h) * 1e9)
    assert flops.activation_gradients == pytest.approx((36 * A + h) * 1e9)
    assert flops.weight_gradients == pytest.approx(8 * A * 1e9)
    assert flops.attention == pytest.approx((40 + 72) * a * 1e9)
    assert round(flops.linear / 1e9, 2) == 34.52
    assert round(flops.attention / 1e9, 2) == 3.76


def test_what_else_trains_adds_its_share() -> None:
    config, plan = published("7B", 8)
    new = step_flops(config, plan, ("new",), 4096)
    head = step_flops(config, plan, ("new", "head"), 4096)
    norms = step_flops(config, plan, ("new", "norms"), 4096)
    h = 2 * config.vocab_size * config.hidden_size
    assert head.total - new.total == h
    assert norms.activation_gradients == norms.forward  # the backward pass reaches block 0
    assert norms.weight_gradients == new.weight_gradients


def test_keys_seen() -> None:
    assert keys_seen(4096, None) == keys_seen(4096, 9999) == 2048
    assert keys_seen(1000, 10) == pytest.approx(9.95)


def test_counts_products_in_loops_branches_and_fusions() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]), None

        x, _ = jax.lax.scan(body, x, w)
        return jnp.einsum("bt,bs->ts", x, x)

    x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    compiled = jax.jit(f).lower(x, w).compile()
    assert compiled_matmul_flops(compiled) == 15 * 2 * 4 * 8 * 8 + 2 * 8 * 8 * 4


def test_does_not_guess() -> None:
    loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x))
    with pytest.raises(ValueError, match="trip count"):
        compiled_matmul_flops(loop.lower(jnp.ones((2, 2))).compile())
    text = (
        "ENTRY %main (p: f32[2,2]) -> f32[2,2] {\n"
        "  %p = f32[2,2]{1,0} parameter(0)\n"
        '  ROOT %c = f32[2,2]{1,0} custom-call(%p, %p), custom_call_target="__cublas$gemm"\n'
        "}\n"
    )
    with pytest.raises(ValueError, match="cublas"):
        matmul_flops_of_hlo(text)
