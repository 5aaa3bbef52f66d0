"""Schedules, labels, decay and clipping of the optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import PLANS, expanded_params, model_config

from llamapro_jax.config import OptimizerConfig
from llamapro_jax.optimizer import build_optimizer, build_schedule, decay_mask
from llamapro_jax.training.state import labels, leaf_path
from llamapro_jax.training.step import global_norm

PLAN = PLANS["unequal groups"]
CONFIG = model_config(PLAN, attention_bias=True, mlp_bias=True)


def rates(steps: int = 100, **values: Any) -> np.ndarray:
    schedule = build_schedule(OptimizerConfig(learning_rate=1.0, **values), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_warmup_rises_linearly_from_above_zero() -> None:
    rate = rates(schedule="constant", warmup_steps=9)
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert (rate[10:] == 1.0).all()


def test_warmup_ratio_is_of_the_steps_and_none_starts_at_the_peak() -> None:
    assert int(np.argmax(rates(steps=200, warmup_ratio=0.06))) == 12
    assert rates(warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine(warmup: int) -> None:
    rate = rates(schedule="cosine", warmup_steps=warmup, final_ratio=0.1)
    middle = warmup + (100 - warmup) // 2
    np.testing.assert_allclose(rate[[warmup, middle, 100]], [1.0, 0.55, 0.1], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 20])
def test_linear(warmup: int) -> None:
    rate = rates(schedule="linear", warmup_steps=warmup, final_ratio=0.2)
    middle = warmup + (100 - warmup) // 2
    np.testing.assert_allclose(rate[[warmup, middle, 100]], [1.0, 0.6, 0.2], rtol=1e-5)


def test_wsd_is_constant_then_falls_linearly() -> None:
    rate = rates(schedule="wsd", warmup_steps=10, decay_ratio=0.3)
    assert (rate[10:71] == 1.0).all()
    np.testing.assert_allclose(rate[[85, 100]], [0.5, 0.0], atol=1e-6)
    assert (rates(schedule="wsd", warmup_steps=10, decay_ratio=0.0)[10:] == 1.0).all()


def one_update(config: OptimizerConfig, spec: tuple[str, ...], scale: float = 1.0) -> Any:
    """(params, updates, state) of one update in which every gradient is `scale`."""
    params = jax.tree.map(lambda leaf: leaf + 1.0, expanded_params(CONFIG, PLAN))
    optimizer = build_optimizer(config, 10, labels(params, spec))
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), params)

    # Compiled as one program: leaf by leaf it would be a hundred small ones.
    def update(gradients: Any, params: Any) -> Any:
        return optimizer.update(gradients, optimizer.init(params), params, take=jnp.bool_(True))

    return params, *jax.jit(update)(gradients, params)


def by_path(tree: Any) -> dict[str, Any]:
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_labels_follow_the_structure() -> None:
    params = expanded_params(CONFIG, PLAN)
    found = {path for path, label in by_path(labels(params, ("new",))).items() if label == "train"}
    assert found == {path for path in by_path(params) if path.startswith("new.")}
    norms = by_path(labels(params, ("new", "norms", "embed")))
    assert norms["final_norm"] == norms["base.0.mlp_norm"] == norms["embed"] == "train"
    assert norms["head"] == norms["base.0.q"] == norms["base.0.q_bias"] == "freeze"


def test_decay_is_for_matrices_that_train() -> None:
    params = expanded_params(CONFIG, PLAN)
    decays = {path for path, yes in by_path(decay_mask(params)).items() if yes}
    matrices = ("q", "k", "v", "o", "gate", "up", "down", "embed", "head")
    assert decays == {path for path in by_path(params) if path.split(".")[-1] in matrices}

    config = OptimizerConfig(learning_rate=1.0, schedule="constant", weight_decay=0.5)
    params, updates, _ = one_update(config, ("new",), scale=0.0)
    for path, update in by_path(updates).items():
        weight = by_path(params)[path]
        decayed = path.startswith("new.") and path in decays
        rate = 1.0 / 2 if decayed else 0.0  # one step of warmup: half of the peak at step 0
        np.testing.assert_allclose(update, -rate * 0.5 * weight, rtol=1e-6, err_msg=path)


def test_clip_sees_only_what_trains() -> None:
    """The clipped gradient's norm, read from Adam's first moment."""
    config = OptimizerConfig(clip_norm=1.0, b1=0.0)
    _, _, state = one_update(config, ("new",), scale=3.0)
    moments = optax.tree_utils.tree_get(state, "mu")
    assert float(global_norm(moments)) == pytest.approx(1.0, rel=1e-5)
    _, _, state = one_update(OptimizerConfig(clip_norm=None, b1=0.0), ("new",), scale=3.0)
    assert {float(m.max()) for m in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))} == {
        3.0
    }


def test_frozen_side_has_no_state() -> None:
    _, updates, state = one_update(OptimizerConfig(), ("new",))
    assert not jax.tree.leaves(state.inner_states["freeze"])
    arrays = by_path(state.inner_states["train"])
    weights = [path for path in arrays if ".mu." in path or ".nu." in path]
    assert weights and all(".new." in path for path in weights)
    assert all(arrays[path].dtype == jnp.float32 for path in weights)
    frozen = [leaf for path, leaf in by_path(updates).items() if not path.startswith("new.")]
    assert frozen and not any(np.asarray(leaf).any() for leaf in frozen)


def test_betas_and_eps_reach_adam() -> None:
    config = OptimizerConfig(
        b1=0.5,
        b2=0.75,
        eps=7.0,
        clip_norm=None,
        weight_decay=0.0,
        schedule="constant",
        learning_rate=1.0,
        warmup_steps=0,
    )
    _, updates, state = one_update(config, ("new",))
    moments = optax.tree_utils.tree_get(state, "mu"), optax.tree_utils.tree_get(state, "nu")
    assert {float(m.max()) for m in jax.tree.leaves(moments[0])} == {0.5}
    assert {float(m.max()) for m in jax.tree.leaves(moments[1])} == {0.25}
    # Both bias-corrected moments are 1: the update is 1 / (1 + eps).
    np.testing.assert_allclose(updates["new"][1]["q"], -1 / 8, rtol=1e-6)


def test_the_parts_are_those_of_optax_to_the_bit() -> None:
    """AdamW of optax beside ours over five updates; ours skips one before each."""
    config = OptimizerConfig(clip_norm=0.5, weight_decay=0.1, warmup_steps=2)
    params = {"new": [{"q": jnp.linspace(-2.0, 2.0, 24).reshape(4, 6), "q_bias": jnp.ones(6)}]}
    ours = build_optimizer(config, 10, jax.tree.map(lambda _: "train", params))
    peer = optax.multi_transform(
        {
            "train": optax.chain(
                optax.clip_by_global_norm(0.5),
                optax.adamw(
                    build_schedule(config, 10),
                    b1=config.b1,
                    b2=config.b2,
                    eps=config.eps,
                    weight_decay=0.1,
                    mask=decay_mask,
                ),
            ),
        },
        jax.tree.map(lambda _: "train", params),
    )
    our_update = jax.jit(lambda g, s, p, take: ours.update(g, s, p, take=take))
    their_update = jax.jit(peer.update)
    our_state, their_state = ours.init(params), peer.init(params)
    their_structure = jax.tree.structure(their_state.inner_states["train"])
    assert jax.tree.structure(our_state.inner_states["train"]) == their_structure
    for key in jax.random.split(jax.random.key(0), 5):
        gradients = jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), params)
        _, our_state = our_update(
            jax.tree.map(lambda leaf: leaf * jnp.nan, gradients), our_state, params, False
        )
        updates, our_state = our_update(gradients, our_state, params, True)
        expected, their_state = their_update(gradients, their_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        jax.tree.map(
            np.testing.assert_array_equal,
            our_state.inner_states["train"],
            their_state.inner_states["train"],
        )
        params = optax.apply_updates(params, updates)
