"""Useful FLOPs against the published and derived numbers."""

from __future__ import annotations

import pytest

from llamapro_jax.architecture import described
from llamapro_jax.config import ArchitectureConfig
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.flops import keys_seen, step_flops
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import block_parameters


def of_7b(new: int) -> tuple[ModelConfig, ExpansionPlan]:
    return described(ArchitectureConfig("llama2_7b", new))


def test_new_parameters_of_7b() -> None:
    config, plan = of_7b(8)
    assert block_parameters(config) == 202_383_360
    assert plan.num_new * block_parameters(config) == 1_619_066_880


@pytest.mark.parametrize(
    ("new", "spec", "total"),
    [(8, ("new",), 38.28), (8, ("all",), 53.38), (0, ("all",), 42.86)],
)
def test_flops_of_7b(new: int, spec: tuple[str, ...], total: float) -> None:
    flops = step_flops(*of_7b(new), spec, 4096)
    assert round(flops.total / 1e9, 2) == total


def test_flops_of_7b_by_part() -> None:
    flops = step_flops(*of_7b(8), ("new",), 4096)
    A, h, a = 0.404750336, 0.262144, 0.033554432
    assert flops.forward == pytest.approx((40 * A + h) * 1e9)
    assert flops.activation_gradients == pytest.approx((36 * A + h) * 1e9)
    assert flops.weight_gradients == pytest.approx(8 * A * 1e9)
    assert flops.attention == pytest.approx((40 + 72) * a * 1e9)
    assert round(flops.linear / 1e9, 2) == 34.52
    assert round(flops.attention / 1e9, 2) == 3.76


def test_what_else_trains_adds_its_share() -> None:
    config, plan = of_7b(8)
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
