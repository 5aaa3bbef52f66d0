"""Attention over rows that devices share: every kernel against the reference on one device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Devices, fixture
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import equations
from test_attention_lowering import hopper

from llamapro_jax.config import MeshConfig
from llamapro_jax.errors import UserError
from llamapro_jax.hlo import read_program
from llamapro_jax.model import attention as attention_module
from llamapro_jax.model import context
from llamapro_jax.model.attention import attention, choose, save_residuals
from llamapro_jax.model.context import order, spread
from llamapro_jax.model.kernels import (
    Part,
    Problem,
    blockwise,
    key_blocks,
    pallas_gpu,
    query_blocks,
    splash,
    visible_keys,
    walk,
)
from llamapro_jax.program import buffers
from llamapro_jax.sharding import AXES, activation, build_mesh

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
DIMS = ("BTHC", "BTKC", "BTKC", "BTHC")
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
    "packed, tensor": Case(tensor=2),
    "one document, 4 devices, window, odd chunks": Case(
        context=4, length=136, packed=False, window=20
    ),
}
MORE_CASES = {
    "bfloat16, data and tensor": Case(data=2, tensor=2, dtype="bfloat16"),
    "multi-head, 4 devices": Case(tensor=2, context=4, heads=(2, 2)),
    "multi-query, a window within a chunk": Case(heads=(4, 1), window=5),
    "a window over several chunks": Case(context=4, window=100),
    "chunks of one token": Case(context=4, length=8),
    "many blocks": Case(length=1200, heads=(1, 1), window=300),
}


def outcome(name: str, case: Case) -> list[np.ndarray]:
    """The output, and the gradients of q, k and v, with rows shared by devices."""
    laid_out = order(case.length, case.context)
    mesh = case.mesh()
    with jax.set_mesh(mesh):

        def placed(x: np.ndarray, dims: str, dtype: Any) -> jax.Array:
            sharding = NamedSharding(mesh, activation(dims))
            return jax.device_put(x[:, laid_out].astype(jnp.dtype(dtype)), sharding)

        *qkv, dout = (placed(x, d, case.dtype) for x, d in zip(case.operands(), DIMS, strict=True))
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


@pytest.mark.slow
@each_kernel
@pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES)
def test_shared_rows_give_what_one_device_gives_at_odd_sizes(
    devices: Devices, kernel: str, case: Case
) -> None:
    check(devices, kernel, case)


def through_attention(case: Case) -> np.ndarray:
    """The output of `attention` for rows that `spread` laid out, still in that order."""
    with jax.set_mesh(mesh := case.mesh()):
        whole = NamedSharding(mesh, P(None, None))
        ids = spread(jax.device_put(case.segment_ids(), whole))
        assert ids.sharding.spec == activation("BT")
        laid_out = order(case.length, case.context)
        np.testing.assert_array_equal(ids, case.segment_ids()[:, laid_out])
        qkv = [
            jax.device_put(x[:, laid_out], NamedSharding(mesh, activation(dims)))
            for x, dims in zip(case.operands(), ("BTHC", "BTKC", "BTKC"), strict=False)
        ]
        run = functools.partial(attention, implementation="blockwise")
        return np.asarray(jax.jit(run)(*qkv, segment_ids_BT=ids))


def test_attention_of_rows_that_were_spread(devices: Devices) -> None:
    case = Case(tensor=2, context=4, length=128)
    found = devices(through_attention, case)
    want = expected(case)[0][:, order(case.length, case.context)]
    np.testing.assert_allclose(found, want, atol=2e-6)


@pytest.mark.parametrize("rows", [np.arange(24).reshape(2, 12)])
def test_rows_stay_whole_without_a_mesh(rows: np.ndarray) -> None:
    np.testing.assert_array_equal(spread(jnp.asarray(rows)), rows)


def forward_passes(name: str, case: Case) -> list[int]:
    """How often the forward kernel runs in a gradient: with its residuals kept, and without."""

    def count(policy: Any) -> int:
        with jax.set_mesh(case.mesh()):
            shapes = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(case.mesh(), spec))
                for x, spec in zip(case.operands(), map(activation, DIMS), strict=True)
            ]

            @functools.partial(jax.checkpoint, policy=policy)
            def block(*qkv: jax.Array) -> jax.Array:
                return shared(name, case, None)(*(2 * x for x in qkv))

            gradient = jax.grad(lambda *qkv: (block(*qkv) ** 2).sum(), (0, 1, 2))
            jaxpr = jax.make_jaxpr(gradient)(*shapes[:3]).jaxpr
        # Forward passes alone take the maximum of the scores.
        return sum(
            equation.primitive.name == "reduce_max" and equation.invars[0].aval.dtype == jnp.float32
            for equation in equations(jaxpr)
        )

    return [count(p) for p in (save_residuals(), jax.checkpoint_policies.nothing_saveable)]


@pytest.mark.parametrize("kernel", ["blockwise", "pallas_gpu", "splash"])
def test_policy_keeps_the_forward_pass_from_running_again(devices: Devices, kernel: str) -> None:
    once, twice = devices(forward_passes, kernel, Case(length=32, packed=False))
    assert 0 < once and 2 * once == twice


LONG = Case(length=4096, heads=(1, 1), packed=False)


def largest_buffer(name: str) -> int:
    """Elements of the largest array in the compiled forward and backward pass of a device."""
    with jax.set_mesh(LONG.mesh()):
        shapes = [
            jax.ShapeDtypeStruct(
                (1, *x.shape[1:]), x.dtype, sharding=NamedSharding(LONG.mesh(), spec)
            )
            for x, spec in zip(LONG.operands(), map(activation, DIMS), strict=True)
        ]
        gradient = jax.grad(lambda *qkv: shared(name, LONG, None)(*qkv).sum(), (0, 1, 2))
        compiled = jax.jit(gradient).lower(*shapes[:3]).compile()
    found = buffers(read_program(compiled.as_text()))
    return max(math.prod(buffer.array.dims) for buffer in found)


def test_blockwise_never_holds_the_scores_of_a_row(devices: Devices) -> None:
    chunk = LONG.length // (2 * LONG.context)
    assert devices(largest_buffer, "reference") >= 2 * chunk * LONG.length
    assert devices(largest_buffer, "blockwise") < chunk**2


@pytest.mark.parametrize(("kernel", "platform"), [("pallas_gpu", "cuda"), ("splash", "tpu")])
def test_kernels_lower_for_four_devices(kernel: Any, platform: str) -> None:
    with hopper() if platform == "cuda" else contextlib.nullcontext():
        device = jax.sharding.get_abstract_mesh().abstract_device
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 4), AXES, explicit, abstract_device=device)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids_BT: jax.Array) -> jax.Array:
        out = attention(q, k, v, segment_ids_BT=ids_BT, implementation=kernel, platform=platform)
        return out.astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, activation(dims)))
            for shape, dtype, dims in (
                ((1, 4096, 32, 128), jnp.bfloat16, "BTHC"),
                ((1, 4096, 8, 128), jnp.bfloat16, "BTKC"),
                ((1, 4096, 8, 128), jnp.bfloat16, "BTKC"),
                ((1, 4096), jnp.int32, "BT"),
            )
        ]
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    target = {"cuda": "@__gpu$xla.gpu.triton", "tpu": "@tpu_custom_call"}[platform]
    assert text.count(f"stablehlo.custom_call {target}") == 3
    # Keys, values and ids are gathered; the gradients of two of them go back.
    assert text.count("stablehlo.all_gather") == 3
    assert text.count("stablehlo.reduce_scatter") == 2


@given(parts=st.integers(1, 9), chunk=st.integers(1, 20))
def test_order_gives_devices_equal_work(parts: int, chunk: int) -> None:
    length = 2 * parts * chunk
    shares = order(length, parts).reshape(parts, -1)
    np.testing.assert_array_equal(np.sort(shares, axis=None), np.arange(length))
    pairs = (shares + 1).sum(axis=1)
    assert (pairs == pairs[0]).all()
    for index, share in enumerate(shares):
        starts = Part(index, parts).starts(length)
        spans = [np.arange(start, start + len(share) // len(starts)) for start in starts]
        np.testing.assert_array_equal(np.concatenate(spans), share)


@given(
    cuts=st.lists(st.integers(0, 47), max_size=4),
    window=st.none() | st.integers(1, 30),
    row=st.integers(0, 40),
    start=st.integers(0, 47),
    block_q=st.sampled_from([2, 4, 8]),
    block_k=st.sampled_from([2, 4, 8]),
)
def test_blocks_that_are_walked(
    cuts: list[int], window: int | None, row: int, start: int, block_q: int, block_k: int
) -> None:
    length = 48
    ids = (np.arange(length)[:, None] >= np.array(cuts, int)).sum(axis=1)
    first, last = (np.asarray(x)[0] for x in visible_keys(jnp.asarray(ids[None]), (1, 48), window))
    index = np.arange(length)
    seen = (first[:, None] <= index) & (index <= index[:, None])

    def check(bounds: tuple[Any, ...], blocks: list[np.ndarray]) -> None:
        walked: dict[int, bool] = {}
        walk(*bounds, lambda j, carry, masked: walked.setdefault(int(j), masked), None)
        for j, block in enumerate(blocks):
            assert j in walked or not block.any(), f"block {j} is seen and left out"
            assert walked.get(j, True) or block.all(), f"block {j} needs a mask"

    with jax.disable_jit():
        queries = slice(row, row + block_q)
        check(
            key_blocks(first[queries], row, block_q, block_k),
            [seen[queries, j : j + block_k] for j in range(0, length, block_k)],
        )
        keys = slice(row // block_k * block_k, row // block_k * block_k + block_k)
        count = (length - start) // block_q
        check(
            query_blocks(last[keys], keys.start, start, count, block_q, block_k),
            [seen[start + i * block_q :][:block_q, keys] for i in range(count)],
        )


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_splash_knows_a_block_by_its_corners(window: int | None) -> None:
    mask = splash.Visible(starts=(0, 24), span=8, keys=32, window=window)
    queries, keys = mask.q_sequence[:, None], np.arange(32)
    seen = (queries >= keys) & (queries - keys < (window or 32))
    for i, j in itertools.product(range(0, 16, 4), range(0, 32, 8)):
        found = np.broadcast_to(mask[slice(i, i + 4), slice(j, j + 8)], (4, 8))
        np.testing.assert_array_equal(found, seen[i : i + 4, j : j + 8])


def test_cudnn_takes_whole_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    problem = Problem("gpu", "bfloat16", 4096, 32, 8, 128, False, None, context=4)
    assert choose("auto", problem) == "pallas_gpu"
    with pytest.raises(UserError, match=r"shared by 4 devices \(mesh.context\).*pallas_gpu"):
        choose("cudnn", problem)
