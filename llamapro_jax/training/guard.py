"""Which updates a run takes: none of a loss or a gradient that is no number, none of a spike.

Decided inside the compiled step, from two scalars that are the same on all devices, and carried in
the state, so that a run that goes on decides as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llamapro_jax.sharding import replicated

# Updates whose losses say what is usual; before so many were taken, nothing counts as a spike.
MEMORY = 100

# What is wrong with a step, as its metric `bad` has it.
GOOD, NOT_FINITE, SPIKE = 0, 1, 2


class Guard(flax.struct.PyTreeNode):
    """Scalars. skipped, in_a_row: int32, the updates skipped so far, and those just before.

    mean, variance: float32, of the losses (nats a token) of the last MEMORY updates or so; 0 in a
    run that does not look for spikes.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    mean: jax.Array
    variance: jax.Array

    def values(self) -> dict[str, int | float]:
        """As JSON numbers, from which `restored` gives the same bits."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value.item() for name, value in jax.device_get(found).items()}


def initial() -> Guard:
    count, number = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Guard(count, count, number, number)


def restored(values: Mapping[str, Any] | None, mesh: Mesh) -> Guard:
    """The guard of which `values` were saved; None: of a checkpoint that has none."""
    like = jax.eval_shape(initial)

    def one(name: str) -> jax.Array:
        value = np.asarray(0 if values is None else values[name], getattr(like, name).dtype)
        return jax.make_array_from_callback((), replicated(mesh), lambda _: value)

    return Guard(**{field.name: one(field.name) for field in dataclasses.fields(Guard)})


def judge(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, taken: jax.Array, sigma: float | None
) -> tuple[jax.Array, Guard, dict[str, jax.Array]]:
    """(whether to take the update, the guard after it, its metrics), for one step.

    taken: number of updates taken before, int32. sigma: a loss so many standard deviations above
    the usual is a spike; None: none is. metrics: `bad`, `skipped`, `in_a_row`, and with a sigma
    `spike_limit`, the largest loss that was not a spike (infinite at the beginning).
    """
    bad = jnp.where(jnp.isfinite(loss) & jnp.isfinite(grad_norm), GOOD, NOT_FINITE)
    more: dict[str, jax.Array] = {}
    if sigma is not None:
        limit = jnp.where(
            taken < MEMORY, jnp.inf, guard.mean + sigma * jnp.sqrt(guard.variance)
        ).astype(jnp.float32)
        bad = jnp.where((bad == GOOD) & (loss > limit), SPIKE, bad)
        more["spike_limit"] = limit
    bad = bad.astype(jnp.int32)
    take = bad == GOOD
    mean, variance = guard.mean, guard.variance
    if sigma is not None:
        mean, variance = _moved(guard, loss, taken)
    after = Guard(
        skipped=guard.skipped + ~take,
        in_a_row=jnp.where(take, 0, guard.in_a_row + 1),
        mean=jnp.where(take, mean, guard.mean),
        variance=jnp.where(take, variance, guard.variance),
    )
    return take, after, {
        "bad": bad, "skipped": after.skipped, "in_a_row": after.in_a_row, **more
    }  # fmt: skip


def _moved(guard: Guard, loss: jax.Array, taken: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance with one more loss: of all at first, then with a memory that fades."""
    share = jnp.maximum(1.0 / (taken + 1), 1.0 / MEMORY).astype(jnp.float32)
    away = loss - guard.mean
    return guard.mean + share * away, (1 - share) * (guard.variance + share * away * away)
