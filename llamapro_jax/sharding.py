"""The mesh of devices, and how arrays lie on it.

Four axes, all always present, size 1 where an axis is not used:

- `data`: replicas of the weights, each on its share of the batch; over slices of a TPU it goes over
  the data-centre network;
- `fsdp`: the batch, and the weights' storage: a weight is gathered where it is used;
- `tensor`: heads, feed-forward and vocabulary;
- `context`: the length of a row.

Arrays carry their sharding in their type (jax's explicit sharding). Without a mesh, as in
generation on one device, the functions here leave arrays as they are.

B batch, T sequence length; the letters of a weight's dimensions are those of `model.weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llamapro_jax.config import MeshConfig
from llamapro_jax.errors import UserError
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import Weight, block_weights, outer_weights

AXES = ("data", "fsdp", "tensor", "context")

# Axes of one dimension: none, one, or several.
MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Logical dimension -> mesh axes. One letter a dimension, as in the table of weights.

    gathered: the axes over which a weight is stored but not used.
    """

    B: MeshAxes = ("data", "fsdp")
    T: MeshAxes = ("context",)
    V: MeshAxes = ("tensor",)
    D: MeshAxes = ("fsdp",)
    F: MeshAxes = ("tensor",)
    H: MeshAxes = ("tensor",)
    K: MeshAxes = ("tensor",)
    C: MeshAxes = ()
    gathered: MeshAxes = ("fsdp",)

    def spec(
        self, dims: str, leading: int = 0, without: MeshAxes = (), whole: str = ""
    ) -> PartitionSpec:
        """The partition of an array with these dimensions, after `leading` unsharded ones.

        without: mesh axes that are not used. whole: dimensions that lie over none. Raises
        ValueError when two dimensions would go over the same mesh axis.
        """
        entries: list[MeshAxes | str | None] = [None] * leading
        taken: dict[str, str] = {}
        for dim in dims:
            over = () if dim in whole else getattr(self, dim)
            axes = tuple(axis for axis in over if axis not in without)
            for axis in axes:
                if axis in taken:
                    raise ValueError(
                        f"dimensions {taken[axis]} and {dim} of an array {dims!r} both lie over "
                        f"the mesh axis {axis!r}; give one of them another axis"
                    )
                taken[axis] = dim
            entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
        return PartitionSpec(*entries)

    def stored(self, weight: Weight, leading: int = 0) -> PartitionSpec:
        """How a weight is kept. A vector is too small to be worth a gather at each use."""
        without = self.gathered if len(weight.dims) == 1 else ()
        return self.spec(weight.dims, leading, without)

    def used(self, weight: Weight) -> PartitionSpec:
        """How a weight is multiplied: gathered over the axes that only its storage lies over."""
        return self.spec(weight.dims, without=self.gathered)

    def activation(self, dims: str) -> PartitionSpec:
        """The partition of activations: D is whole, the batch lies over what stores the weights."""
        return self.spec(dims, whole="D")


LAYOUT = Layout()


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that `jax.set_mesh` set; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def current_platform() -> str:
    """What a program that is traced now is compiled for: the mesh's devices, or jax's default."""
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def axis_size(*axes: str) -> int:
    """Number of devices along mesh axes of the current mesh; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def activation(dims: str) -> PartitionSpec | None:
    """`out_sharding=` of a product whose result has these dimensions; None without a mesh."""
    return None if current_mesh() is None else LAYOUT.activation(dims)


def place(array: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """The array laid out by `spec`; as it is without a mesh."""
    return array if spec is None or current_mesh() is None else jax.reshard(array, spec)


def use(array: jax.Array, weight: Weight) -> jax.Array:
    """A weight as it is multiplied: the gather of FSDP, where it is stored sharded."""
    return place(array, LAYOUT.used(weight))


def scale_spec(weight: Weight, spec: PartitionSpec) -> PartitionSpec:
    """Of the scales of an int8 weight that is laid out by `spec`: summed dimensions have size 1.

    `spec` may begin with stacked dimensions.
    """
    leading = len(spec) - len(weight.dims)
    own = (
        None if dim in weight.contracted else axes
        for dim, axes in zip(weight.dims, spec[leading:], strict=True)
    )
    return PartitionSpec(*spec[:leading], *own)


def use_scale(scale: jax.Array, weight: Weight) -> jax.Array:
    """The scales of an int8 weight, beside `use` of its values."""
    return place(scale, scale_spec(weight, LAYOUT.used(weight)))


# ------------------------------------------------------------------- the mesh


def mesh_shape(config: MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
    """The size of each axis, with what the configuration leaves open filled in.

    `data` left open is the number of slices; `fsdp` left open is what the others leave of the
    devices. Raises UserError when they do not multiply to the number of devices.
    """
    data = slices if config.data is None else config.data
    others = data * config.tensor * config.context
    fsdp = devices // others if config.fsdp is None else config.fsdp
    shape = dict(zip(AXES, (data, fsdp, config.tensor, config.context), strict=True))
    if math.prod(shape.values()) != devices:
        product = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != 1)
        left = (
            f"{others} does not divide {devices}"
            if config.fsdp is None
            else f"{product or '1'} is {math.prod(shape.values())}"
        )
        raise UserError(
            f"mesh: data {data} x tensor {config.tensor} x context {config.context}"
            + ("" if config.fsdp is None else f" x fsdp {config.fsdp}")
            + f" does not fit {devices} devices: {left}. Leave mesh.fsdp null, and make the others "
            f"multiply to a divisor of {devices}."
        )
    if data % slices:
        raise UserError(
            f"mesh.data: {data} is no multiple of the {slices} slices, and only `data` goes over "
            f"the network between them; make it {slices}, or null."
        )
    return shape


def count_slices(devices: Sequence[Any]) -> int:
    """Number of TPU slices that the devices are in; 1 for all others."""
    return len({getattr(device, "slice_index", 0) or 0 for device in devices})


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or over `devices`), in the order that suits their network.

    Its axes are "data", "fsdp", "tensor" and "context". Raises UserError when their sizes do not
    multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = count_slices(devices)
    shape = mesh_shape(config, len(devices), slices)
    types = (AxisType.Explicit,) * len(AXES)
    sizes = tuple(shape.values())
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    within = (shape["data"] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=types)


def check_model(config: ModelConfig, shape: Mapping[str, int]) -> None:
    """Raises UserError when a dimension of a weight does not divide over its mesh axes."""
    names = {
        "V": "vocab_size",
        "D": "hidden_size",
        "F": "intermediate_size",
        "H": "num_attention_heads",
        "K": "num_key_value_heads",
    }
    for weight in (*block_weights(config), *outer_weights(config)):
        for dim, axes in zip(weight.dims, LAYOUT.stored(weight), strict=True):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts, size = math.prod(shape[axis] for axis in axes), config.size(dim)
            if size % parts:
                divisors = [n for n in range(1, parts) if size % n == 0]
                raise UserError(
                    f"mesh.{axes[0]}: {parts} does not divide the model's {names[dim]}, {size}; "
                    f"the largest smaller one that does is {divisors[-1]}."
                )


def check_batch(rows: int, length: int, shape: Mapping[str, int], field: str) -> None:
    """Raises UserError when rows or their length do not divide over the mesh.

    field: where `rows` comes from, for the message.
    """
    parts = shape["data"] * shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"{field}: {rows} rows do not divide over {parts} devices (mesh.data {shape['data']} x "
            f"mesh.fsdp {shape['fsdp']}); take a multiple of {parts}."
        )
    # Each device has two chunks of a row, see `model.context`.
    chunks = 2 * shape["context"]
    if shape["context"] > 1 and length % chunks:
        raise UserError(
            f"data.sequence_length: {length} does not divide into {chunks} chunks, two for each of "
            f"mesh.context {shape['context']}; take a multiple of {chunks}."
        )


# ------------------------------------------------------------------- arrays


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batch arrays [B, T] as a step takes them: rows over data and fsdp, each row whole."""
    return NamedSharding(mesh, PartitionSpec(LAYOUT.spec("B")[0], None))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def weight_sharding(mesh: Mesh, weight: Weight, leading: int = 0) -> NamedSharding:
    """Of a leaf of the parameters: `leading` stacked dimensions, then those of the weight."""
    return NamedSharding(mesh, LAYOUT.stored(weight, leading))


class HostParts:
    """The parts of an array that the devices of this host need, as host memory to be filled.

    parts: bounds, `(start, stop)` for each dimension, -> the buffer of that part. A part that
    several devices hold exists once. sharding: None puts the whole on the default device.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, sharding: NamedSharding | None) -> None:
        self._shape, self._sharding = tuple(shape), sharding
        whole = tuple((0, size) for size in shape)
        self._devices: dict[Any, tuple[tuple[int, int], ...]] = {None: whole}
        if sharding is not None:
            self._devices = {
                device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
                for device, index in sharding.addressable_devices_indices_map(self._shape).items()
            }
        self.parts = {
            bounds: np.empty([stop - start for start, stop in bounds], dtype)
            for bounds in dict.fromkeys(self._devices.values())
        }

    @property
    def has_all(self) -> bool:
        """Whether the devices of this host need every element, as those of a single host do."""
        return sum(part.size for part in self.parts.values()) == math.prod(self._shape)

    def place(self) -> jax.Array:
        """The global array, each part on the devices that need it."""
        arrays = [jax.device_put(self.parts[at], device) for device, at in self._devices.items()]
        if self._sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)
