"""The arguments of a training step as shapes, dtypes and shardings: for a program without data."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from llamapro_jax.config import RunConfig
from llamapro_jax.data.rows import DTYPES
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import Params
from llamapro_jax.model.params import abstract_params
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.sharding import batch_sharding
from llamapro_jax.training.state import TrainState, dtype_of, init_state, labels, partition
from llamapro_jax.training.step import Batch


class Arguments(NamedTuple):
    """What `build_train_step(...)` takes, and the optimizer that it is built with."""

    state: TrainState
    frozen: Params
    batch: Batch
    optimizer: optax.GradientTransformation


def abstract_arguments(
    config: ModelConfig, plan: ExpansionPlan, run: RunConfig, mesh: Mesh
) -> Arguments:
    """Under `jax.set_mesh(mesh)`: everything laid out over the mesh as in a real run."""
    params = abstract_params(
        config, plan, dtype_of(run.trainable, run.compute_dtype, run.frozen_dtype), mesh
    )
    trainable, frozen = partition(params, run.trainable)
    optimizer = build_optimizer(
        run.optimizer, run.training.steps, labels(params, run.trainable)
    )
    state = jax.eval_shape(lambda *both: init_state(*both, optimizer), trainable, frozen)
    shape = (run.data.batch_size, run.data.sequence_length)
    rows = batch_sharding(mesh)
    batch = {n: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for n, dtype in DTYPES.items()}
    return Arguments(state, frozen, batch, optimizer)
