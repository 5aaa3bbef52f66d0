"""What a run begins with, or goes on from: the weights, the optimizer and a checkpoint's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from llamapro_jax.checkpoint_restore import restore_newest
from llamapro_jax.checksum import checksums
from llamapro_jax.errors import UserError
from llamapro_jax.launch.processes import is_first, settled
from llamapro_jax.model.llama import Params
from llamapro_jax.model.params import load_params
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.sharding import replicated
from llamapro_jax.training.events import SET_ASIDE, record_event
from llamapro_jax.training.guard import restored as restored_guard
from llamapro_jax.training.run_directory import CHECKPOINTS
from llamapro_jax.training.setup import Setup
from llamapro_jax.training.state import (
    TrainState,
    check_trainable,
    dtype_of,
    init_state,
    labels,
    partition,
)


def load(setup: Setup) -> tuple[Setup, TrainState, Params, optax.GradientTransformation]:
    """The state before the first step, the frozen weights, and the optimizer.

    The frozen weights are compared with those of the run's first go, whose checksums it records.
    """
    config, source = setup.config, setup.source
    dtypes = dtype_of(config.trainable, config.compute_dtype, config.frozen_dtype)
    params = load_params(source, dtypes, setup.mesh)
    trainable, frozen = partition(params, config.trainable)
    check_trainable(trainable, source.config, source.plan, config.trainable)
    optimizer = build_optimizer(
        config.optimizer, config.training.steps, labels(params, config.trainable)
    )
    found = checksums(frozen)
    if not setup.record.frozen:
        setup = replace(setup, record=replace(setup.record, frozen=found))
        if is_first():
            setup.record.write(setup.files)
    changed = differing(setup.record.frozen, found)
    if changed:
        raise UserError(
            f"{config.model}: {changed[0]} is not what it was when the run in {setup.directory} "
            "began, though the model's fingerprint is the same; its files are damaged. Put back "
            "the original."
        )
    return setup, settled(init_state(trainable, frozen, optimizer)), frozen, optimizer


def differing(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """The leaves whose checksums are not the same in both."""
    names = set(before) | set(after)
    return sorted(name for name in names if before.get(name) != after.get(name))


def restore(setup: Setup, trainable: Any, optimizer: Any) -> tuple[Setup, TrainState, float]:
    """What the run goes on from, and the seconds that it took to get there.

    That is the newest step that is whole, which may be an older one than `setup` names.
    """
    where = setup.directory / CHECKPOINTS

    def aside(step: int, reason: str) -> None:
        if is_first():
            damaged = f"step {step} is damaged and was set aside ({reason})"
            print(f"WARNING: {where}: {damaged}", flush=True)
        record_event(setup.files, SET_ASIDE, step, reason=reason)

    restored = restore_newest(where, trainable, optimizer, aside)
    assert restored is not None
    if restored.meta["model_digest"] != setup.record.model_digest:
        raise UserError(
            f"{where / str(restored.step)}: was trained on another base than run.json says; it is "
            "another run's. Put back what belongs here."
        )
    step = jax.make_array_from_callback(
        (), replicated(setup.mesh), lambda _: np.asarray(restored.step, np.int32)
    )
    guard = restored_guard(restored.meta.get("guard"), setup.mesh)
    state = TrainState(step, restored.trainable, restored.optimizer, guard)
    return replace(setup, resume_step=restored.step), state, float(restored.meta["seconds"])
