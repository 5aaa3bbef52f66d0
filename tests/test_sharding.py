"""The layout over the mesh, the mesh's sizes, and what does not divide."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from steps import PLANS, model_config

from llamapro_jax.config import MeshConfig
from llamapro_jax.errors import UserError
from llamapro_jax.model.weights import BLOCK, BLOCK_BY_NAME, OUTER, OUTER_BY_NAME
from llamapro_jax.sharding import (
    AXES,
    LAYOUT,
    HostParts,
    Layout,
    build_mesh,
    check_batch,
    check_model,
    count_slices,
    mesh_shape,
    scale_spec,
    use,
    weight_sharding,
)


def sizes(*values: int) -> dict[str, int]:
    return dict(zip(AXES, values, strict=True))


def test_matrices_are_stored_over_fsdp_and_used_gathered() -> None:
    for weight in (*BLOCK, *OUTER):
        stored, used = LAYOUT.stored(weight), LAYOUT.used(weight)
        axes = [axis for axis in jax.tree.leaves(tuple(stored)) if axis]
        assert ("fsdp" in axes) == (len(weight.dims) > 1 and "D" in weight.dims), weight.name
        assert "fsdp" not in jax.tree.leaves(tuple(used)), weight.name
    assert LAYOUT.stored(BLOCK_BY_NAME["q"], leading=2) == P(None, None, "fsdp", "tensor", None)
    assert LAYOUT.used(BLOCK_BY_NAME["down"]) == P("tensor", None)
    assert LAYOUT.stored(OUTER_BY_NAME["head"]) == P("tensor", "fsdp")


def test_activations() -> None:
    rows = ("data", "fsdp")
    assert LAYOUT.activation("BTD") == P(rows, "context", None)
    assert LAYOUT.activation("BTHC") == P(rows, "context", "tensor", None)


def test_a_collision_is_refused() -> None:
    layout = replace(Layout(), F=("fsdp",))
    with pytest.raises(ValueError, match="dimensions D and F of an array 'DF' both lie over"):
        layout.stored(BLOCK_BY_NAME["gate"])


def test_scales_keep_the_output_channels_of_their_matrix() -> None:
    q, down = BLOCK_BY_NAME["q"], BLOCK_BY_NAME["down"]
    assert scale_spec(q, LAYOUT.stored(q, 2)) == P(None, None, None, "tensor", None)
    assert scale_spec(down, LAYOUT.stored(down, 2)) == P(None, None, None, "fsdp")


def test_open_sizes_take_what_is_left() -> None:
    assert mesh_shape(MeshConfig(), 8) == sizes(1, 8, 1, 1)
    assert mesh_shape(MeshConfig(tensor=2), 8) == sizes(1, 4, 2, 1)
    assert mesh_shape(MeshConfig(), 8, slices=2) == sizes(2, 4, 1, 1)
    assert mesh_shape(MeshConfig(data=2, fsdp=1, tensor=2, context=2), 8) == sizes(2, 1, 2, 2)


@pytest.mark.parametrize(
    ("config", "devices", "slices", "message"),
    [
        (MeshConfig(tensor=3), 8, 1, "3 does not divide 8"),
        (MeshConfig(fsdp=4), 8, 1, "fsdp 4 does not fit 8 devices: fsdp 4 is 4"),
        (MeshConfig(data=1), 8, 2, "mesh.data: 1 is no multiple of the 2 slices"),
    ],
)
def test_a_mesh_that_does_not_fit(
    config: MeshConfig, devices: int, slices: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        mesh_shape(config, devices, slices)


def test_slices_are_counted() -> None:
    class Device:
        def __init__(self, slice_index: int) -> None:
            self.slice_index = slice_index

    assert count_slices([Device(0), Device(1), Device(1)]) == 2
    assert count_slices(jax.devices()) == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (sizes(1, 1, 4, 1), "mesh.tensor: 4 does not divide the model's num_key_value_heads, 2"),
        (sizes(1, 3, 1, 1), "mesh.fsdp: 3 does not divide the model's hidden_size, 16"),
        (sizes(1, 1, 2, 1), "mesh.tensor: 2 does not divide the model's vocab_size, 61"),
    ],
)
def test_a_model_that_does_not_divide(shape: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(model_config(PLANS["2 of 4"]), shape)


def test_a_batch_that_does_not_divide() -> None:
    check_batch(8, 16, sizes(2, 4, 1, 4), "data.batch_size")
    with pytest.raises(UserError, match="data.batch_size: 6 rows do not divide over 4 devices"):
        check_batch(6, 16, sizes(2, 2, 1, 1), "data.batch_size")
    with pytest.raises(UserError, match="data.sequence_length: 20 does not divide into 8 chunks"):
        check_batch(8, 20, sizes(1, 1, 1, 4), "data.batch_size")


def test_host_parts_fill_the_global_array() -> None:
    expected = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    for sharding in (None, weight_sharding(mesh, BLOCK_BY_NAME["gate"], 1)):
        host = HostParts(expected.shape, np.float32, sharding)
        for bounds, part in host.parts.items():
            part[...] = expected[tuple(slice(*bound) for bound in bounds)]
        np.testing.assert_array_equal(host.place(), expected)


def test_without_a_mesh_nothing_is_laid_out() -> None:
    array = jax.numpy.ones((4, 4))
    assert use(array, BLOCK_BY_NAME["gate"]) is array
