"""The step on 8 devices: the numbers of one device, and everything laid out as the table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_tiny
from devices import Devices, fixture
from steps import PLANS, begin, expanded_params, model_config, random_batch, run_config

from llamapro_jax import sharding
from llamapro_jax.config import MeshConfig
from llamapro_jax.model.params import load_params
from llamapro_jax.model.quantized import quantize
from llamapro_jax.sources import open_source
from llamapro_jax.training.state import dtype_of, is_norm, leaf_path, leaves_of, map_leaves
from llamapro_jax.training.step import build_train_step

pytestmark = pytest.mark.slow

PLAN = PLANS["2 of 4"]
ROWS, LENGTH, STEPS = 8, 32, 3
devices = fixture(8)


def losses(sizes: tuple[int, ...] | None, tied: bool, int8: bool, **settings: Any) -> list[float]:
    """Of a few steps from the same parameters; sizes: of the mesh, None: without one."""
    config = model_config(PLAN, vocab_size=64, tie_embeddings=tied)
    run = run_config(rows=ROWS, length=LENGTH, **settings)
    dtype = dtype_of(run.trainable, "float32", "int8" if int8 else "compute")
    mesh = None if sizes is None else sharding.build_mesh(MeshConfig(*sizes))

    def leaf(stack: str, weight: Any, array: jax.Array) -> Any:
        if mesh is not None:
            lead = array.ndim - len(weight.dims)
            array = jax.device_put(array, sharding.weight_sharding(mesh, weight, lead))
        quantized = dtype(stack, weight) == jnp.int8
        return jax.jit(quantize, static_argnums=1)(array, weight) if quantized else array

    def steps() -> list[float]:
        params = map_leaves(expanded_params(config, PLAN), leaf)
        state, frozen, optimizer = begin(run, params)
        before = layout(state)
        step, found = build_train_step(config, PLAN, run, optimizer), []
        for seed in range(STEPS):
            batch: Any = random_batch(seed, ROWS, LENGTH)
            if mesh is not None:
                rows = sharding.batch_sharding(mesh)
                batch = {name: jax.device_put(array, rows) for name, array in batch.items()}
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics["loss"]))
        assert layout(state) == before, "a step lays its state out anew"
        return found

    if mesh is None:
        return steps()
    with jax.set_mesh(mesh):
        return steps()


def layout(state: Any) -> dict[str, str]:
    """How each leaf of the state lies; raises when a matrix of the optimizer lies otherwise."""
    specs = {
        leaf_path(path): str(getattr(leaf.sharding, "spec", None))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for path, spec in specs.items():
        if path.startswith("opt_state") and ".new." in path:
            of_weight = "trainable.new." + path.split(".new.")[1]
            assert spec == specs[of_weight], f"{path} lies over {spec}"
    return specs


@pytest.mark.parametrize(
    ("sizes", "tied", "int8", "settings"),
    [
        ((2, 2, 2, 1), False, False, {"spec": ("all",), "remat": "full", "microbatch": 1}),
        ((1, 4, 2, 1), True, False, {"spec": ("embed", "new", "norms"), "remat": "minimal"}),
        ((1, 2, 2, 2), False, True, {"attention": "blockwise", "remat": "attention"}),
    ],
    ids=["all, microbatches", "tied, embedding and norms", "int8, context"],
)
def test_a_mesh_gives_the_losses_of_one_device(
    devices: Devices, sizes: Any, tied: bool, int8: bool, settings: dict[str, Any]
) -> None:
    one = devices(losses, None, tied, int8, **settings)
    many = devices(losses, sizes, tied, int8, **settings)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert len(set(one)) == STEPS


def loaded(path: Path) -> None:
    """Asserts that each device of a mesh gets its part of a model and nothing more."""
    source = open_source(str(path))
    whole = load_params(source, lambda *_: jnp.float32)
    mesh = sharding.build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    parts = load_params(source, lambda *_: jnp.float32, mesh)
    rows = {path: weight for path, _, weight, _ in leaves_of(source.config, source.plan)}
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parts), strict=True
    )
    for (path, expected), found in pairs:
        name = leaf_path(path)
        np.testing.assert_array_equal(found, expected, err_msg=name)
        on_device = found.addressable_shards[0].data.size
        is_matrix = len(rows[name].dims) > 1
        assert on_device * (4 if is_matrix else 1) == expected.size, name
        assert is_matrix or is_norm(rows[name])


def test_weights_are_born_sharded(devices: Devices, tmp_path: Path) -> None:
    devices(loaded, write_tiny(tmp_path / "model", vocab_size=128))
