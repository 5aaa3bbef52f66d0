"""Tiny models, runs and batches for the tests of the training step; nothing touches a disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llamapro_jax.expansion import ExpansionPlan, Insertion, after, spread
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import BLOCK_BY_NAME
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.training.state import (
    TrainState,
    init_state,
    is_norm,
    labels,
    leaves_of,
    map_leaves,
    partition,
)
from llamapro_jax.training.step import build_train_step

B, T, V = 4, 16, 61

PLANS = {
    "2 of 4": ExpansionPlan(4).expand(spread(4, 2)),
    "8 of 32": ExpansionPlan(32).expand(spread(32, 8)),
    "two a group": ExpansionPlan(6).expand(spread(6, 4, per_group=2)),
    "unequal groups": ExpansionPlan(7).expand(after(7, (0, 3, 4))),
    "second generation": ExpansionPlan(4).expand(spread(4, 2)).expand((Insertion(2, 2),)),
}


def model_config(plan: ExpansionPlan, **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_blocks": plan.num_blocks,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 64,
        "tie_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    }
    return ModelConfig(**{**values, **changes})


def run_config(
    spec: tuple[str, ...] = ("new",),
    optimizer: OptimizerConfig | None = None,
    compute_dtype: Any = "float32",
    rows: int = B,
    length: int = T,
    **training: Any,
) -> RunConfig:
    return RunConfig(
        model="model",
        output="run",
        data=DataConfig(length, rows, (SourceConfig("a", "a.txt"),)),
        training=TrainingConfig(**{"steps": 20, "loss_chunk": 16, **training}),
        trainable=spec,
        compute_dtype=compute_dtype,
        optimizer=optimizer or OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    )


def random_params(config: ModelConfig, plan: ExpansionPlan, seed: int = 0) -> Any:
    """Random parameters, drawn on the host: nothing is compiled for them."""
    rng = np.random.default_rng(seed)

    def draw(like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.2 * rng.standard_normal(like.shape, np.float32))

    params = jax.tree.map(draw, abstract_params(config, plan, lambda *_: jnp.float32))
    return map_leaves(params, lambda _, row, leaf: leaf + 1.0 if is_norm(row) else leaf)


def expanded_params(config: ModelConfig, plan: ExpansionPlan, seed: int = 0) -> Any:
    """The same with new blocks that add nothing: their zeroed rows are zero."""
    params = random_params(config, plan, seed)
    for leaves in params["new"]:
        for name in leaves:
            if BLOCK_BY_NAME[name].zeroed:
                leaves[name] = jnp.zeros_like(leaves[name])
    return params


def random_batch(seed: int = 0, rows: int = B, length: int = T) -> dict[str, np.ndarray]:
    """Packed rows with padding, and a loss mask that leaves each row another number of targets."""
    rng = np.random.default_rng(seed)
    segment_ids = np.ones((rows, length), np.int32)
    segment_ids[:, length // 2 :] = 2
    segment_ids[0, -3:] = 0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    positions[:, length // 2 :] -= length // 2
    mask = rng.random((rows, length)) < np.linspace(0.1, 1.0, rows)[:, None]
    return {
        "tokens": rng.integers(0, V, (rows, length), dtype=np.int32),
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_mask": mask,
    }


def begin(run: RunConfig, params: Any) -> tuple[TrainState, Any, Any]:
    """(state, frozen, optimizer). The arrays are copies, since a step uses up its state."""
    trainable, frozen = partition(jax.tree.map(jnp.copy, params), run.trainable)
    optimizer = build_optimizer(run.optimizer, run.training.steps, labels(params, run.trainable))
    return init_state(trainable, frozen, optimizer), frozen, optimizer


_STEPS: dict[str, Callable[..., Any]] = {}


def train_step(config: ModelConfig, plan: ExpansionPlan, run: RunConfig) -> Callable[..., Any]:
    """The step of these settings, built once: tests that share it share what it compiles."""
    key = repr((config, plan, run))
    if key not in _STEPS:
        params = abstract_params(config, plan, lambda *_: jnp.float32)
        trains = labels(params, run.trainable)
        optimizer = build_optimizer(run.optimizer, run.training.steps, trains)
        _STEPS[key] = build_train_step(config, plan, run, optimizer)
    return _STEPS[key]


def abstract_params(config: ModelConfig, plan: ExpansionPlan, dtype_of: Any) -> Any:
    """The parameters as shapes and dtypes, for a program that is compiled and never run."""
    params: Any = {stack: [{} for _ in plan.segments] for stack in ("base", "new")}
    for path, stack, weight, shape in leaves_of(config, plan):
        leaf = jax.ShapeDtypeStruct(shape, dtype_of(stack, weight))
        if stack == "outer":
            params[path] = leaf
        else:
            params[stack][int(path.split(".")[1])][weight.name] = leaf
    return params


def without_new(config: ModelConfig, plan: ExpansionPlan) -> tuple[ModelConfig, ExpansionPlan]:
    """Configuration and plan of the model before its last generation."""
    before = plan.until(plan.generation - 1)
    return replace(config, num_blocks=before.num_blocks), before
