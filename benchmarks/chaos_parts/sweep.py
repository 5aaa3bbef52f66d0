"""Every file of a checkpoint, damaged in every way, one by one, and restored as a run does it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.chaos_parts.damage import damaged, files
from benchmarks.chaos_parts.plan import DAMAGES
from llamapro_jax.checkpoint_files import ITEMS, read_meta
from llamapro_jax.checkpoint_restore import Restored, restore_newest


def sweep(run: Path, work: Path, number: int | None, seed: int) -> dict[str, Any]:
    """Of the newest two steps of a run, on copies: damages the newer one, and restores.

    number: so many of the damages, drawn; None: all. Returns how many were refused (the step
    before was taken, or none), how many had no effect (all bits are there), and what was accepted.
    """
    steps = sorted(
        int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()
    )
    before, newest = steps[-2:]
    place = work / "sweep"
    shutil.rmtree(place, ignore_errors=True)
    for step in (before, newest):
        shutil.copytree(run / "checkpoints" / str(step), place / str(step))
    wanted = [_abstract(place / str(newest), item) for item in ITEMS]
    clean = {step: _bits(place, step, wanted) for step in (before, newest)}
    draw = random.Random(seed)
    everything = [
        (kind, file.relative_to(place / str(newest)), what)
        for kind, group in sorted(files(place / str(newest)).items())
        for file in group
        for what in DAMAGES
    ]
    chosen = everything if number is None else draw.sample(everything, number)
    found: dict[str, Any] = {"damages": len(chosen), "refused": 0, "no effect": 0, "wrong": []}
    for kind, file, what in chosen:
        with damaged(place / str(newest) / file, what, draw) as how:
            restored = restore_newest(place, *wanted)
            aside = place / f"{newest}.damaged"
            if aside.exists():
                aside.rename(place / str(newest))
        assert restored is not None
        if list(_values(restored)) != clean[restored.step]:
            found["wrong"].append(f"{kind}: {file} {how}: accepted in step {restored.step}")
        found["refused" if restored.step == before else "no effect"] += 1
    return found


def _abstract(step: Path, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        leaf: jax.ShapeDtypeStruct(tuple(one["shape"]), np.dtype(one["dtype"]), sharding=here)
        for leaf, one in read_meta(step)["leaves"][item].items()
    }


def _bits(place: Path, step: int, wanted: list[Any]) -> list[Any]:
    """Of a step that nothing was done to."""
    alone = place.with_name("alone")
    shutil.copytree(place / str(step), alone / str(step))
    restored = restore_newest(alone, *wanted)
    shutil.rmtree(alone)
    assert restored is not None and restored.step == step
    return list(_values(restored))


def _values(restored: Restored) -> Iterator[Any]:
    yield restored.step
    yield restored.meta
    for leaf in jax.tree.leaves((restored.trainable, restored.optimizer)):
        yield np.asarray(leaf).tobytes()
