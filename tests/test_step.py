"""The training step: microbatches, dtypes, metrics, what is donated; and state.py's checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import (
    PLANS,
    B,
    T,
    abstract_params,
    begin,
    expanded_params,
    model_config,
    random_batch,
    random_params,
    run_config,
    train_step,
    without_new,
)

from llamapro_jax.config import OptimizerConfig
from llamapro_jax.data.rows import empty_rows, targets_and_weights
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.model.llama import hidden_states
from llamapro_jax.model.weights import BLOCK_BY_NAME, OUTER_BY_NAME, total_parameters
from llamapro_jax.optimizer import build_schedule
from llamapro_jax.training.state import (
    check_spec,
    check_trainable,
    dtype_of,
    format_table,
    leaf_path,
    leaves_of,
    merge,
    partition,
    trainable_table,
)
from llamapro_jax.training.step import (
    build_eval_step,
    build_train_step,
    global_norm,
    loss_and_gradients,
)

PLAN = PLANS["2 of 4"]
CONFIG = model_config(PLAN)
PARAMS = expanded_params(CONFIG, PLAN)


def by_path(tree: Any) -> dict[str, Any]:
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def naive_loss(params: Any, batch: Any) -> tuple[float, int]:
    """Summed loss and number of targets, with all logits at once."""
    targets, weights = targets_and_weights(batch)
    x = hidden_states(
        params,
        jnp.asarray(batch["tokens"]),
        jnp.asarray(batch["positions"]),
        jnp.asarray(batch["segment_ids"]),
        config=CONFIG,
        segments=PLAN.segments,
        dtype=jnp.float32,
    )
    scores = jnp.einsum("BTD,VD->BTV", x, params["head"])
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
    return float((losses * weights).sum()), int(weights.sum())


def test_metrics_of_one_step() -> None:
    run = run_config()
    state, frozen, _ = begin(run, PARAMS)
    batch = random_batch()
    nll, tokens = naive_loss(PARAMS, batch)
    step = train_step(CONFIG, PLAN, run)
    state, metrics = step(state, frozen, batch)
    assert int(metrics["tokens"]) == tokens
    assert float(metrics["loss"]) == pytest.approx(nll / tokens, rel=1e-6)
    assert int(state.step) == 1
    schedule = build_schedule(run.optimizer, run.training.steps)
    assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(0)))
    _, metrics = step(state, frozen, batch)
    assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(1)))
    assert float(schedule(1)) < 0.995 * float(schedule(0))


def test_grad_norm_is_of_what_trains() -> None:
    batch = random_batch()

    def loss(params: Any) -> jax.Array:
        out = build_eval_step(CONFIG, PLAN, "float32")(params, batch)
        return out["nll"] / out["tokens"]

    gradients = jax.jit(jax.grad(loss))(PARAMS)
    for spec in (("new",), ("all",)):
        run = run_config(spec, OptimizerConfig(clip_norm=1e-3))
        state, frozen, _ = begin(run, PARAMS)
        expected = float(global_norm(partition(gradients, spec)[0]))
        _, metrics = train_step(CONFIG, PLAN, run)(state, frozen, batch)
        assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_microbatches_equal_one_batch() -> None:
    """The rows have uneven numbers of targets, so a mean of means would differ."""
    batch = random_batch()
    counts = targets_and_weights(batch)[1].sum(axis=1)
    assert counts.max() > 2 * counts.min()
    results = []
    for part in ("auto", 1):
        run = run_config(microbatch=part)
        state, frozen, _ = begin(run, PARAMS)
        step = train_step(CONFIG, PLAN, run)
        for seed in range(3):
            state, metrics = step(state, frozen, random_batch(seed))
        results.append((by_path(state.trainable), metrics))
    (one, one_metrics), (many, many_metrics) = results
    assert int(one_metrics["tokens"]) == int(many_metrics["tokens"])
    for name in ("loss", "grad_norm"):
        assert float(one_metrics[name]) == pytest.approx(float(many_metrics[name]), rel=1e-4)
    for path, leaf in one.items():
        # Adam divides by the gradient's own size: rounding shows where that is near zero.
        np.testing.assert_allclose(leaf, many[path], atol=2e-3, err_msg=path)


def test_microbatch_gradients_are_the_sum_in_float32() -> None:
    batch = random_batch()
    trainable, frozen = partition(PARAMS, ("new",))

    def loss(trainable: Any, part: Any) -> jax.Array:
        return build_eval_step(CONFIG, PLAN, "bfloat16")(merge(trainable, frozen), part)["nll"]

    summed = jax.jit(lambda part, n: loss_and_gradients(loss, trainable, part, n), static_argnums=1)
    one, one_gradients = summed(batch, 1)
    parts, gradients = summed(batch, 2)
    halves = [{k: v[i::2] for k, v in batch.items()} for i in (0, 1)]
    expected = [summed(half, 1) for half in halves]
    assert float(parts) == pytest.approx(float(expected[0][0] + expected[1][0]), rel=1e-6)
    for path, leaf in by_path(gradients).items():
        assert leaf.dtype == jnp.float32
        total = by_path(expected[0][1])[path] + by_path(expected[1][1])[path]
        np.testing.assert_allclose(leaf, total, rtol=2e-2, atol=1e-3, err_msg=path)
    assert float(one) == pytest.approx(float(parts), rel=1e-2)
    assert float(global_norm(one_gradients)) == pytest.approx(
        float(global_norm(gradients)), rel=2e-2
    )


def test_a_batch_without_targets_changes_nothing_to_nan() -> None:
    run = run_config()
    state, frozen, _ = begin(run, PARAMS)
    state, metrics = train_step(CONFIG, PLAN, run)(state, frozen, empty_rows(B, T))
    assert float(metrics["loss"]) == 0.0 and int(metrics["tokens"]) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.trainable))


def test_rows_of_one_document_need_no_segment_ids() -> None:
    run = run_config()
    batch = random_batch()
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    losses = []
    for given in (batch, {n: a for n, a in batch.items() if n != "segment_ids"}):
        state, frozen, _ = begin(run, PARAMS)
        _, metrics = train_step(CONFIG, PLAN, run)(state, frozen, given)
        losses.append([float(metrics[name]) for name in ("loss", "tokens", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_unrolled_groups_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_config(remat="minimal")
    losses, loops = [], []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr("llamapro_jax.model.llama.current_platform", lambda p=platform: p)
        state, frozen, optimizer = begin(run, PARAMS)
        step = build_train_step(CONFIG, PLAN, run, optimizer).lower(state, frozen, random_batch())
        loops.append(step.as_text().count("stablehlo.while"))
        _, metrics = step.compile()(state, frozen, random_batch())
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    assert loops[1] < loops[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_remat_changes_memory_and_no_number() -> None:
    results, temporary = [], []
    for remat in ("none", "full"):
        run = run_config(remat=remat, rows=8, length=64, loss_chunk=64)
        state, frozen, optimizer = begin(run, PARAMS)
        batch = random_batch(rows=8, length=64)
        step = build_train_step(CONFIG, PLAN, run, optimizer).lower(state, frozen, batch).compile()
        temporary.append(step.memory_analysis().temp_size_in_bytes)
        results.append(step(state, frozen, batch)[1])
    assert temporary[1] < 0.6 * temporary[0]
    for name in ("loss", "grad_norm"):
        assert float(results[0][name]) == pytest.approx(float(results[1][name]), rel=1e-5)


def test_state_is_donated_and_frozen_is_not() -> None:
    run = run_config()
    state, frozen, _ = begin(run, PARAMS)
    train_step(CONFIG, PLAN, run)(state, frozen, random_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_dtypes() -> None:
    """Masters and moments float32, frozen weights in the compute dtype, also after a step."""
    run = run_config(compute_dtype="bfloat16")
    params = abstract_params(CONFIG, PLAN, dtype_of(("new",), "bfloat16"))
    params = jax.tree.map(lambda like, leaf: leaf.astype(like.dtype), params, PARAMS)
    state, frozen, optimizer = begin(run, params)
    state, metrics = build_train_step(CONFIG, PLAN, run, optimizer)(state, frozen, random_batch())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    assert {metrics[name].dtype.name for name in metrics} == {"float32", "int32"}
    dtype = dtype_of(("new", "norms"), "bfloat16")
    assert dtype("base", BLOCK_BY_NAME["mlp_norm"]) == dtype("new", BLOCK_BY_NAME["q"])
    assert dtype("outer", OUTER_BY_NAME["embed"]) == jnp.bfloat16


def test_loss_falls_in_bfloat16_with_microbatches_and_remat() -> None:
    run = run_config(compute_dtype="bfloat16", microbatch=2, remat="full")
    state, frozen, optimizer = begin(run, PARAMS)
    step = build_train_step(CONFIG, PLAN, run, optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.2


def test_eval_step_without_new_is_the_base() -> None:
    """Random output projections, so that the new blocks do something."""
    params = random_params(CONFIG, PLAN)
    batch = random_batch()
    grown = build_eval_step(CONFIG, PLAN, "float32")(params, batch)
    off = build_eval_step(CONFIG, PLAN, "float32", with_new=False)(params, batch)
    nll, tokens = naive_loss(params, batch)
    assert int(grown["tokens"]) == int(off["tokens"]) == tokens
    assert float(grown["nll"]) == pytest.approx(nll, rel=1e-6)
    assert float(off["nll"]) != float(grown["nll"])

    config, plan = without_new(CONFIG, PLAN)
    stacked = {
        name: jnp.concatenate(
            [leaves[name].reshape(-1, *leaves[name].shape[2:]) for leaves in params["base"]
             if leaves]
        )[None]
        for name in params["base"][0]
    }
    base = {**params, "base": [stacked], "new": [{}]}
    expected = build_eval_step(config, plan, "float32")(base, batch)
    assert float(off["nll"]) == float(expected["nll"])


@pytest.mark.parametrize("spec", [("new",), ("all",), ("new", "embed", "head", "norms")])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_partition_and_merge(plan: ExpansionPlan, spec: tuple[str, ...]) -> None:
    config = model_config(plan)
    params = expanded_params(config, plan)
    trainable, frozen = partition(params, spec)
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    )
    assert not by_path(trainable).keys() & by_path(frozen).keys()
    check_trainable(trainable, config, plan, spec)


def test_leaves_of_is_the_structure_of_the_parameters() -> None:
    for plan in PLANS.values():
        config = model_config(plan, attention_bias=True, tie_embeddings=True)
        listed = {path: shape for path, _, _, shape in leaves_of(config, plan)}
        found = {path: leaf.shape for path, leaf in by_path(expanded_params(config, plan)).items()}
        assert listed == found


def test_parts_that_train() -> None:
    params = by_path(PARAMS)
    expected = {
        "embed": {"embed"},
        "head": {"head"},
        "norms": {"final_norm"}
        | {p for p in params if p.startswith("base.") and p.endswith("_norm")},
    }
    new = {path for path in params if path.startswith("new.")}
    for part, paths in expected.items():
        assert by_path(partition(PARAMS, ("new", part))[0]).keys() == new | paths


def test_what_a_model_does_not_have_cannot_train() -> None:
    base = ExpansionPlan(4)
    with pytest.raises(UserError, match="'new'.*none.*llamapro expand"):
        check_spec(("new",), model_config(base), base)
    tied = replace(CONFIG, tie_embeddings=True)
    with pytest.raises(UserError, match="'head' is tied.*use 'embed'"):
        check_spec(("new", "head"), tied, PLAN)
    check_spec(("new", "embed"), tied, PLAN)
    check_spec(("all",), model_config(base), base)


def test_refuses_another_trainable_set_than_the_plan_says() -> None:
    trainable, frozen = partition(PARAMS, ("new",))
    check_trainable(trainable, CONFIG, PLAN, ("new",))

    more = {**trainable, "final_norm": frozen["final_norm"]}
    with pytest.raises(UserError, match="final_norm would train"):
        check_trainable(more, CONFIG, PLAN, ("new",))
    with pytest.raises(UserError, match=r"base\.0\..* would train"):
        check_trainable(partition(PARAMS, ("all",))[0], CONFIG, PLAN, ("new",))

    less = {**trainable, "new": [dict(leaves) for leaves in trainable["new"]]}
    del less["new"][1]["gate"]
    with pytest.raises(UserError, match=r"new\.1\.gate is frozen"):
        check_trainable(less, CONFIG, PLAN, ("new",))

    # The mistake of a plan inferred from a stride: as many tensors, of other blocks.
    other = PLANS["two a group"]
    with pytest.raises(UserError, match="the plan says"):
        check_trainable(trainable, model_config(other), other, ("new",))


def test_table_names_every_parameter_once() -> None:
    for spec in (("new",), ("all",), ("new", "norms"), ("new", "embed", "head")):
        rows = trainable_table(CONFIG, PLAN, spec, "bfloat16")
        assert sum(row.parameters for row in rows) == total_parameters(CONFIG)
        trainable = sum(leaf.size for leaf in jax.tree.leaves(partition(PARAMS, spec)[0]))
        assert sum(row.parameters for row in rows if row.trains) == trainable
        assert all(row.dtype == ("float32" if row.trains else "bfloat16") for row in rows)


def test_table_as_text() -> None:
    plan = PLANS["8 of 32"]
    text = format_table(trainable_table(model_config(plan), plan, ("new",), "bfloat16"))
    lines = text.splitlines()
    assert lines[0].split() == ["part", "parameters", "dtype", "trains", "blocks"]
    assert lines[2].startswith("base blocks") and "0-3, 5-8, 10-13" in lines[2]
    assert lines[3].startswith("new blocks") and lines[3].endswith("4, 9, 14, 19, 24, 29, 34, 39")
    assert "yes" in lines[3] and "float32" in lines[3] and "no" in lines[2]
    assert lines[-1].startswith("trains 15,616 (")
