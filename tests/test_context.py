"""Attention over rows that devices share: every kernel against the reference on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Devices, fixture
from jax.sharding import NamedSharding

from llamapro_jax.config import MeshConfig
from llamapro_jax.model import attention as attention_module
from llamapro_jax.model import context
from llamapro_jax.model.attention import attention
from llamapro_jax.model.context import order
from llamapro_jax.model.kernels import blockwise, pallas_gpu, splash
from llamapro_jax.sharding import activation, build_mesh

devices = fixture(8)

# Small enough that a chunk has several blocks, of unlike sizes, and borders within blocks.
TILES = pallas_gpu.Tiles(
    forward=pallas_gpu.Tile(16, 32, 4, 2),
    dkv=pallas_gpu.Tile(32, 16, 4, 2),
    dq=pallas_gpu.Tile(16, 16, 4, 2),
)
KERNELS: dict[str, Callable[..., jax.Array]] = {
    "reference": attention_module._kernel("reference"),
    "blockwise": functools.partial(blockwise.attention, block=16),
    "pallas_gpu": functools.partial(pallas_gpu.attention, tiles=TILES, interpret=True),
    "splash": functools.partial(splash.attention, interpret=True),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@dataclass(frozen=True)
class Case:
    """Shapes and rows of one comparison, and the mesh."""

    data: int = 1
    tensor: int = 1
    context: int = 2
    length: int = 160
    heads: tuple[int, int] = (4, 2)  # of queries, of keys and values
    packed: bool = True
    window: int | None = None
    dtype: str = "float32"

    def mesh(self) -> jax.sharding.Mesh:
        config = MeshConfig(data=self.data, fsdp=1, tensor=self.tensor, context=self.context)
        return build_mesh(config, jax.devices()[: self.data * self.tensor * self.context])

    def segment_ids(self) -> np.ndarray | None:
        """Documents across the borders of chunks, one of a single token, padding; one document."""
        if not self.packed:
            return None
        shares = np.arange(self.length) / self.length
        packed = 1 + sum(shares >= cut for cut in (0.1, 0.45, 0.46))
        return np.stack([np.where(shares < 0.9, packed, 0), np.ones_like(packed)]).astype(np.int32)

    def operands(self) -> tuple[np.ndarray, ...]:
        """q, k, v and a gradient of the output, in `dtype` but for their type."""
        (H, K), T = self.heads, self.length
        random = np.random.default_rng(0)
        drawn = (random.standard_normal((2, T, heads, 16), np.float32) for heads in (H, K, K, H))
        return tuple(np.asarray(x.astype(self.dtype), np.float32) for x in drawn)


CASES = {
    "2 devices": Case(),
    "4 devices, window, odd chunks": Case(context=4, length=136, window=20),
    "data, tensor and context, bfloat16": Case(data=2, tensor=2, dtype="bfloat16"),
    "tensor and 4 devices, one document": Case(tensor=2, context=4, packed=False),
}


def outcome(name: str, case: Case) -> list[np.ndarray]:
    """The output, and the gradients of q, k and v, with rows shared by devices."""
    laid_out = order(case.length, case.context)
    mesh = case.mesh()
    with jax.set_mesh(mesh):

        def placed(x: np.ndarray, dims: str, dtype: Any) -> jax.Array:
            sharding = NamedSharding(mesh, activation(dims))
            return jax.device_put(x[:, laid_out].astype(jnp.dtype(dtype)), sharding)

        dims = ("BTHC", "BTKC", "BTKC", "BTHC")
        *qkv, dout = (placed(x, d, case.dtype) for x, d in zip(case.operands(), dims, strict=True))
        ids = case.segment_ids()
        run = shared(name, case, None if ids is None else placed(ids, "BT", jnp.int32))

        @jax.jit
        def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
            out, backward = jax.vjp(run, q, k, v)
            return out, *backward(dout)

        found = both(*qkv, dout)
    natural = np.argsort(laid_out)
    return [np.asarray(x.astype(jnp.float32))[:, natural] for x in found]


def shared(name: str, case: Case, ids_BT: jax.Array | None) -> Callable[..., jax.Array]:
    """`attention` under the current mesh, with a kernel of these tests."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, ids_BT: jax.Array | None) -> jax.Array:
        return context.attention(
            KERNELS[name], q, k, v, segment_ids_BT=ids_BT, sliding_window=case.window
        )

    queries, keys = activation("BTHC"), activation("BTKC")
    ids = None if ids_BT is None else activation("BT")
    mapped = jax.shard_map(
        local, in_specs=(queries, keys, keys, ids), out_specs=queries, check_vma=False
    )
    return lambda q, k, v: mapped(q, k, v, ids_BT)


@functools.cache
def expected(case: Case) -> list[np.ndarray]:
    """What the reference gives on one device, in float32, for the same (rounded) operands."""
    *qkv, dout = (jnp.asarray(x) for x in case.operands())
    ids = case.segment_ids()

    def run(*qkv: jax.Array) -> jax.Array:
        return attention(
            *qkv,
            segment_ids_BT=None if ids is None else jnp.asarray(ids),
            sliding_window=case.window,
            implementation="reference",
        )

    out, backward = jax.vjp(run, *qkv)
    return [np.asarray(x) for x in (out, *backward(dout))]


def check(devices: Devices, kernel: str, case: Case) -> None:
    tolerance = {"float32": 2e-6, "bfloat16": 1.5e-2}[case.dtype]
    names = ("out", "dq", "dk", "dv")
    for name, got, want in zip(names, devices(outcome, kernel, case), expected(case), strict=True):
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error < tolerance, f"{name}: {error}"


@each_kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shared_rows_give_what_one_device_gives(devices: Devices, kernel: str, case: Case) -> None:
    check(devices, kernel, case)
