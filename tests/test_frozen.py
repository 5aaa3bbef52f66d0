"""Proofs that only the new blocks train: their gradients, every bit, and the compiled program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from steps import (
    PLANS,
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

from llamapro_jax.checksum import checksums
from llamapro_jax.config import OptimizerConfig, RunConfig
from llamapro_jax.expansion import ExpansionPlan, after
from llamapro_jax.flops import StepFlops, step_flops
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import BLOCK_BY_NAME, block_weights
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.program import compiled_matmul_flops
from llamapro_jax.training.state import (
    dtype_of,
    init_state,
    labels,
    leaf_path,
    merge,
    partition,
)
from llamapro_jax.training.step import (
    build_eval_step,
    build_train_step,
    count_targets,
    global_norm,
    summed_loss,
)

# "2 of 4" is compiled as "8 of 32" is, in shorter loops.
KINDS = {name: plan for name, plan in PLANS.items() if name != "2 of 4"}
plans = pytest.mark.parametrize("plan", KINDS.values(), ids=KINDS)
RUN = run_config(optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.3))


def by_path(tree: Any) -> dict[str, Any]:
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def bits(tree: Any) -> dict[str, bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in by_path(tree).items()}


# --- what changes ---------------------------------------------------------------------------------


@plans
def test_at_step_0_only_the_zeroed_projections_have_gradient(plan: ExpansionPlan) -> None:
    """In each new block on its own, also where a family has biases."""
    config = model_config(plan, attention_bias=True, mlp_bias=True)
    trainable, frozen = partition(expanded_params(config, plan), ("new",))
    batch = random_batch()

    def loss(trainable: Any) -> jax.Array:
        return build_eval_step(config, plan, "float32")(merge(trainable, frozen), batch)["nll"]

    seen = 0
    for path, gradient in by_path(jax.jit(jax.grad(loss))(trainable)).items():
        name = path.split(".")[-1]
        sizes = np.abs(gradient).reshape(gradient.shape[0] * gradient.shape[1], -1).max(axis=1)
        if BLOCK_BY_NAME[name].zeroed:
            assert (sizes > 0).all(), path
            seen += len(sizes)
        else:
            assert (sizes == 0).all(), path
    assert seen == 4 * plan.num_new  # o, down and their biases


@plans
def test_after_20_steps_no_frozen_bit_changed_and_every_new_tensor_did(
    plan: ExpansionPlan,
) -> None:
    """With weight decay and clipping on, and learning rates that would move anything."""
    config = model_config(plan)
    state, frozen, _ = begin(RUN, expanded_params(config, plan))
    frozen_before, new_before = bits(frozen), by_path(jax.tree.map(np.array, state.trainable))
    sums_before = checksums(frozen)
    step = train_step(config, plan, RUN)
    for seed in range(20):
        state, _ = step(state, frozen, random_batch(seed))
    assert int(state.step) == 20
    assert bits(frozen) == frozen_before
    assert checksums(frozen) == sums_before
    new_after = by_path(state.trainable)
    assert new_after.keys() == new_before.keys()
    changed = 0
    for path, leaf in new_after.items():
        same = np.asarray(leaf) == new_before[path]
        for i, j in np.ndindex(leaf.shape[:2]):
            assert not same[i, j].all(), f"{path}[{i}, {j}] did not change"
            changed += 1
    assert changed == plan.num_new * len(block_weights(config))


@plans
def test_the_expanded_model_starts_with_the_loss_of_the_base(plan: ExpansionPlan) -> None:
    """With the new blocks on and off, and the base on its own: the same to the bit.

    The training step is another program, with the gradients in it: equal to rounding.
    """
    config = model_config(plan)
    params = expanded_params(config, plan)
    batch = random_batch()
    with_new = build_eval_step(config, plan, "float32")(params, batch)
    off = build_eval_step(config, plan, "float32", with_new=False)(params, batch)
    assert float(with_new["nll"]) == float(off["nll"])
    if plan.generation == 1:
        rows = {
            name: np.concatenate(
                [np.reshape(s[name], (-1, *s[name].shape[2:])) for s in params["base"] if s]
            )[None]
            for name in params["base"][0]
        }
        base_config, base_plan = without_new(config, plan)
        base = {**params, "base": [rows], "new": [{}]}
        alone = build_eval_step(base_config, base_plan, "float32")(base, batch)
        assert float(with_new["nll"]) == float(alone["nll"])
    state, frozen, _ = begin(RUN, params)
    _, metrics = train_step(config, plan, RUN)(state, frozen, batch)
    assert float(metrics["loss"]) == pytest.approx(float(off["nll"] / off["tokens"]), rel=1e-6)


# --- what is compiled -----------------------------------------------------------------------------

WIDE = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "vocab_size": 128}
LENGTH, ROWS = 32, 1
COMPILED: dict[str, Any] = {}


def compile_step(config: ModelConfig, plan: ExpansionPlan, run: RunConfig, build: Any) -> Any:
    """The compiled step, from shapes alone; of the same arguments, the same again."""
    key = repr((config, plan, run, build))
    if key not in COMPILED:
        COMPILED[key] = _compile_step(config, plan, run, build)
    return COMPILED[key]


def _compile_step(config: ModelConfig, plan: ExpansionPlan, run: RunConfig, build: Any) -> Any:
    spec = run.trainable
    params = abstract_params(config, plan, dtype_of(spec, run.compute_dtype))
    trainable, frozen = partition(params, spec)
    optimizer = build_optimizer(run.optimizer, run.training.steps, labels(params, spec))
    state = jax.eval_shape(lambda *both: init_state(*both, optimizer), trainable, frozen)
    batch = random_batch(rows=run.data.batch_size, length=run.data.sequence_length)
    return build(config, plan, run, optimizer).lower(state, frozen, batch).compile()


def wide_run(spec: tuple[str, ...] = ("new",), **values: Any) -> RunConfig:
    optimizer = OptimizerConfig(clip_norm=1.0, weight_decay=0.1)
    return run_config(spec, optimizer, rows=ROWS, length=LENGTH, loss_chunk=LENGTH, **values)


def computed(flops: StepFlops) -> float:
    """Of a step. The reference attention computes the masked half of the scores, too."""
    return ROWS * LENGTH * (flops.linear + 2 * flops.attention)


def naive_step(config: ModelConfig, plan: ExpansionPlan, run: RunConfig, optimizer: Any) -> Any:
    """Others' form: every gradient, a norm of all of them, then an optimizer that drops most."""

    def step(state: Any, frozen: Any, batch: Any) -> Any:
        params = merge(state.trainable, frozen)

        def loss(params: Any) -> jax.Array:
            nll = summed_loss(
                params, batch, config=config, plan=plan, dtype=jnp.float32, loss_chunk=LENGTH
            )
            return nll / count_targets(batch)

        value, gradients = jax.value_and_grad(loss)(params)
        norm = global_norm(gradients)
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, params, take=jnp.isfinite(norm)
        )
        updated = optax.apply_updates(params, updates)
        trainable, _ = partition(updated, run.trainable)
        return state.replace(trainable=trainable, opt_state=opt_state), (value, norm)

    return jax.jit(step, donate_argnums=0)


@plans
def test_matmul_flops_are_those_of_the_formula(plan: ExpansionPlan) -> None:
    """To the last FLOP: no frozen weight gradient, nothing backward below the first new block."""
    config = model_config(plan, **WIDE)
    compiled = compile_step(config, plan, wide_run(), build_train_step)
    assert compiled_matmul_flops(compiled) == computed(step_flops(config, plan, ("new",), LENGTH))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spec", [("all",), ("new", "norms"), ("new", "embed"), ("new", "head")])
def test_matmul_flops_of_other_trainable_sets(spec: tuple[str, ...], tied: bool) -> None:
    if tied and "head" in spec:
        pytest.skip("a tied head is no part of its own")
    plan = PLANS["2 of 4"]
    config = model_config(plan, tie_embeddings=tied, **WIDE)
    compiled = compile_step(config, plan, wide_run(spec), build_train_step)
    assert compiled_matmul_flops(compiled) == computed(step_flops(config, plan, spec, LENGTH))


def test_matmul_flops_in_bfloat16_and_by_microbatches() -> None:
    plan = PLANS["unequal groups"]
    config = model_config(plan, **WIDE)
    expected = computed(step_flops(config, plan, ("new",), LENGTH))
    run = wide_run(compute_dtype="bfloat16")
    assert compiled_matmul_flops(compile_step(config, plan, run, build_train_step)) == expected
    optimizer = OptimizerConfig()
    run = run_config(("new",), optimizer, rows=4, length=LENGTH, loss_chunk=32, microbatch=1)
    compiled = compile_step(config, plan, run, build_train_step)
    assert compiled_matmul_flops(compiled) == 4 * expected


def test_the_naive_form_would_be_caught() -> None:
    """The counter sees frozen weight gradients, and the memory that they take, where there are."""
    plan = PLANS["8 of 32"]
    config = model_config(plan, **WIDE)
    ours = compile_step(config, plan, wide_run(), build_train_step)
    naive = compile_step(config, plan, wide_run(), naive_step)
    formula = computed(step_flops(config, plan, ("new",), LENGTH))
    assert compiled_matmul_flops(ours) == formula
    assert compiled_matmul_flops(naive) > 1.3 * formula
    block = 4 * sum(weight.size(config) for weight in block_weights(config))
    of_ours = ours.memory_analysis().temp_size_in_bytes
    of_naive = naive.memory_analysis().temp_size_in_bytes
    # All 32 frozen blocks' gradients make the difference, and the activations of the prefix.
    assert of_naive - of_ours > 32 * block
    # Ours holds two of the gradient of 8 blocks, the second after clipping, and activations.
    activations = activation_bytes(config, plan.num_blocks - 4)
    assert of_ours < 2.2 * plan.num_new * block + activations


def activation_bytes(config: ModelConfig, blocks: int) -> int:
    """More than plain autodiff keeps of so many blocks, in float32: 24 arrays [T, D], 6 [T, F],
    and 4 [H, T, T]."""
    widths = 24 * config.hidden_size + 6 * config.intermediate_size
    return 4 * blocks * ROWS * LENGTH * (widths + 4 * config.num_heads * LENGTH)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_does_not_grow_with_the_frozen_weights(remat: str) -> None:
    """One base block a group is the case in which a weight sliced by hand would be kept twice."""
    blocks = 8
    temporary = []
    for width in (160, 480):
        every_other = ExpansionPlan(blocks).expand(after(blocks, range(blocks)))
        config = model_config(every_other, **{**WIDE, "intermediate_size": width})
        compiled = compile_step(config, every_other, wide_run(remat=remat), build_train_step)
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    grown = 4 * blocks * 3 * WIDE["hidden_size"] * (480 - 160)  # bytes of one stack of eight
    activations = 4 * 2 * blocks * ROWS * LENGTH * 6 * (480 - 160)
    # The gradient of the new stack, twice; a copy of either stack's weights would make it three.
    assert temporary[1] - temporary[0] < 2.3 * grown + (activations if remat == "none" else 0)


def test_the_prefix_keeps_nothing_for_the_backward_pass() -> None:
    """Twelve more blocks below the first new one take no memory but for their own weights."""
    temporary = []
    for prefix in (4, 16):
        plan = ExpansionPlan(prefix + 2).expand(after(prefix + 2, (prefix - 1, prefix + 1)))
        config = model_config(plan, **WIDE)
        compiled = compile_step(config, plan, wide_run(), build_train_step)
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    one_activation = 4 * ROWS * LENGTH * WIDE["hidden_size"]
    assert abs(temporary[1] - temporary[0]) < one_activation


def test_the_optimizer_costs_nothing_for_the_frozen_side() -> None:
    """Its state has no frozen array, and a bigger frozen side adds no FLOP and no output."""
    plan = PLANS["8 of 32"]
    config = model_config(plan, **WIDE)
    params = random_params(config, plan)
    state, _, _ = begin(wide_run(), params)
    of_new = sum(leaf.size for leaf in jax.tree.leaves(partition(params, ("new",))[0]))
    assert not jax.tree.leaves(state.opt_state.inner_states["freeze"])
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    assert sum(sizes) == 2 * of_new + 2  # two moments, and the step counts of Adam and schedule

    compiled = compile_step(config, plan, wide_run(), build_train_step)
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < 3 * 4 * of_new + 4096
    assert memory.alias_size_in_bytes > 3 * 4 * of_new * 0.999  # all of the state is reused


# --- checksums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_any_flipped_bit_changes_the_checksum(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((3, 5, 7)).astype(dtype)
    clean = checksums({"a": {"b": jnp.asarray(array)}})
    assert clean.keys() == {"a.b"} and 0 <= clean["a.b"] < 2**32
    words = array.view(np.dtype(f"u{array.itemsize}"))
    for _ in range(200):
        flipped = words.copy()
        place = tuple(rng.integers(0, size) for size in words.shape)
        flipped[place] ^= words.dtype.type(1 << int(rng.integers(0, 8 * array.itemsize)))
        assert checksums({"a": {"b": jnp.asarray(flipped.view(dtype))}}) != clean


def test_checksum_sees_exchanged_elements_and_the_sign_of_zero() -> None:
    one = jnp.asarray([[0.0, 1.0], [2.0, 3.0]])
    sums = {
        checksums([other])["0"]
        for other in (one, one[::-1], one[:, ::-1], one.T, one.at[0, 0].set(-0.0))
    }
    assert len(sums) == 5


def test_checksum_follows_its_definition() -> None:
    """Runs record it, so that it may not change: here it is again in NumPy, over a flat array."""
    array = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    index = np.arange(array.size, dtype=np.uint64)
    mixed = index.copy()
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed ^= mixed >> np.uint64(shift)
        mixed = mixed * np.uint64(factor) % 2**32
    mixed = (mixed ^ (mixed >> np.uint64(16))) | np.uint64(1)
    words = array.view(np.uint32).reshape(-1).astype(np.uint64)
    expected = int((words * mixed % 2**32).sum() % 2**32)
    assert checksums([jnp.asarray(array)])["0"] == expected
