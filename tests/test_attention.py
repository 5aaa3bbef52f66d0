"""Every attention kernel against the reference, and the choice between them."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamapro_jax.errors import UserError
from llamapro_jax.model import attention as attention_module
from llamapro_jax.model.attention import (
    IMPLEMENTATIONS,
    attention,
    attention_mask,
    choose,
    reference_attention,
    save_residuals,
)
from llamapro_jax.model.kernels import Problem, blockwise, pallas_gpu, splash, visible_keys

# Small enough that short rows have several blocks of queries and of keys, of unlike sizes.
TILES = pallas_gpu.Tiles(
    forward=pallas_gpu.Tile(32, 16, 4, 2),
    dkv=pallas_gpu.Tile(16, 32, 4, 2),
    dq=pallas_gpu.Tile(16, 16, 4, 2),
)
KERNELS: dict[str, Callable[..., jax.Array]] = {
    "blockwise": functools.partial(blockwise.attention, block=32),
    "pallas_gpu": functools.partial(pallas_gpu.attention, tiles=TILES, interpret=True),
    "splash": functools.partial(splash.attention, interpret=True),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@dataclass(frozen=True)
class Case:
    """Shapes and rows of one comparison."""

    heads: tuple[int, int] = (4, 2)  # of queries, of keys and values
    length: int = 96
    packed: bool = True
    window: int | None = None
    dtype: str = "float32"
    head_dim: int = 16

    @property
    def options(self) -> dict[str, Any]:
        return {
            "segment_ids_BT": segment_ids(self.length) if self.packed else None,
            "sliding_window": self.window,
        }


# Together they cover everything; the slow tests cover combinations.
CASES = {
    "packed, odd length": Case(length=150),
    "packed, window, multi-query": Case(window=20, heads=(4, 1)),
    "one document, bfloat16, multi-head": Case(packed=False, dtype="bfloat16", heads=(2, 2)),
}
MORE_CASES = {
    "shorter than a block": Case(length=7),
    "window longer than the row": Case(window=500, packed=False),
    "odd head": Case(heads=(2, 2), head_dim=24),
}


def segment_ids(length: int) -> jax.Array:
    """Two rows: documents, one of a single token, and padding; one document and padding."""
    cuts = [0.1, 0.45, 0.47, 0.9]
    starts = np.arange(length)[None] >= np.ceil(length * np.array(cuts))[:, None]
    first = 1 + starts.sum(axis=0)
    first[first == len(cuts) + 1] = 0
    second = np.where(np.arange(length) < math.ceil(0.8 * length), 1, 0)
    return jnp.asarray(np.stack([first, second]), jnp.int32)


@functools.cache
def operands(case: Case) -> tuple[jax.Array, ...]:
    """q, k, v and a gradient of the output."""
    (H, K), T, C = case.heads, case.length, case.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, T, H, C), (2, T, K, C), (2, T, K, C), (2, T, H, C)]
    drawn = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return tuple(x.astype(case.dtype) for x in drawn)


def outcome(
    kernel: Callable[..., jax.Array], case: Case, inputs: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """The output, and the gradients of q, k and v."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, backward = jax.vjp(lambda *qkv: kernel(*qkv, **case.options), q, k, v)
        return out, *backward(dout)

    return run(*inputs)


@functools.cache
def expected(case: Case) -> tuple[jax.Array, ...]:
    """What the reference gives in float32 for the same (rounded) operands."""
    exact = replace(case, dtype="float32")
    rounded = tuple(x.astype(jnp.float32) for x in operands(case))
    out, backward = jax.vjp(
        lambda *qkv: attention(*qkv, implementation="reference", **exact.options), *rounded[:3]
    )
    return out, *backward(rounded[3])


def check(kernel: str, case: Case) -> None:
    tolerance = {"float32": 2e-6, "bfloat16": 1.5e-2}[case.dtype]
    names = ("out", "dq", "dk", "dv")
    found = outcome(KERNELS[kernel], case, operands(case))
    for name, got, want in zip(names, found, expected(case), strict=True):
        assert got.dtype == case.dtype
        error = jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max()
        assert error < tolerance, f"{name}: {error}"


@each_kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_gives_what_the_reference_gives(kernel: str, case: Case) -> None:
    check(kernel, case)


@pytest.mark.slow
@each_kernel
@pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES)
def test_kernel_gives_what_the_reference_gives_at_odd_sizes(kernel: str, case: Case) -> None:
    check(kernel, case)


HEADS = [(4, 4), (4, 2), (4, 1)]
# Of two lengths the one that a whole number of blocks fills or the other one in turn: any two
# values of anything meet, and any three but for the length.
COMBINATIONS = [
    *(
        (heads, 128 if packed == (window is None) else 150, packed, window, "float32")
        for heads, packed, window in itertools.product(HEADS, [True, False], [None, 20])
    ),
    *itertools.product(HEADS, [150], [True], [20], ["bfloat16"]),
]


@pytest.mark.slow
@each_kernel
@pytest.mark.parametrize("case", [Case(*each) for each in COMBINATIONS], ids=str)
def test_kernel_gives_what_the_reference_gives_in_combinations(kernel: str, case: Case) -> None:
    check(kernel, case)


@pytest.mark.parametrize("window", [None, 20])
def test_reference_is_the_masked_attention_of_positions(window: int | None) -> None:
    case = Case(window=window)
    ids_BT = case.options["segment_ids_BT"]
    first_BT, _ = visible_keys(ids_BT, ids_BT.shape, None)
    positions_BT = jnp.arange(case.length) - first_BT
    mask_BTT = attention_mask(positions_BT, positions_BT, ids_BT, ids_BT, window)
    want = reference_attention(*operands(case)[:3], mask_BTT)
    got = attention(*operands(case)[:3], implementation="reference", **case.options)
    np.testing.assert_array_equal(got, want)


@each_kernel
@pytest.mark.parametrize("window", [None, 5])
def test_gradient_reaches_exactly_what_a_query_sees(kernel: str, window: int | None) -> None:
    case = Case(window=window)
    *qkv, _ = operands(case)
    ids_BT = case.options["segment_ids_BT"]
    index_BT = jnp.broadcast_to(jnp.arange(case.length), ids_BT.shape)
    seen_BTT = np.asarray(attention_mask(index_BT, index_BT, ids_BT, ids_BT, window))

    @jax.jit
    def gradients(t: jax.Array) -> tuple[jax.Array, ...]:
        def at(*qkv: jax.Array) -> jax.Array:
            out = KERNELS[kernel](*qkv, **case.options)
            return (out[:, t] * jnp.arange(1, case.head_dim + 1)).sum()

        return jax.grad(at, (0, 1, 2))(*qkv)

    # Within a document, at its first and last token, and in the padding.
    for t in (0, 9, 10, 42, 43, 80, 90, 95):
        dq, dk, dv = (np.abs(g).max(axis=(2, 3)) > 0 for g in gradients(jnp.asarray(t)))
        np.testing.assert_array_equal(dv, seen_BTT[:, t])
        alone = seen_BTT[:, t].sum(axis=1) == 1  # one key has all the weight, whatever its score
        np.testing.assert_array_equal(dk[~alone], seen_BTT[~alone, t])
        assert not (dk & ~seen_BTT[:, t]).any()
        assert not np.delete(dq, t, axis=1).any()


@each_kernel
def test_padding_is_finite_whatever_comes_in(kernel: str) -> None:
    case = Case(length=50)
    q, k, v, dout = operands(case)
    padding = case.options["segment_ids_BT"] == 0
    assert padding.any()
    wild = [jnp.where(padding[..., None, None], 1e4 * x, x) for x in (q, k, v)]
    real = jnp.where(padding[..., None, None], 0, dout)
    out, *gradients = outcome(KERNELS[kernel], case, (*wild, real))
    for got in (out, *gradients):
        assert jnp.isfinite(got).all()
    for got in gradients:
        assert not jnp.where(padding[..., None, None], got, 0).any()


@each_kernel
def test_policy_keeps_the_forward_pass_from_running_again(kernel: str) -> None:
    case = Case(length=32)
    *qkv, _ = operands(case)

    def forward_passes(policy: Any) -> int:
        @functools.partial(jax.checkpoint, policy=policy)
        def block(*qkv: jax.Array) -> jax.Array:
            return KERNELS[kernel](*(2 * x for x in qkv), **case.options)

        gradient = jax.make_jaxpr(jax.grad(lambda *qkv: (block(*qkv) ** 2).sum(), (0, 1, 2)))(*qkv)
        # Forward passes alone take the maximum of the scores.
        return sum(
            equation.primitive.name == "reduce_max" and equation.invars[0].aval.dtype == jnp.float32
            for equation in equations(gradient.jaxpr)
        )

    once = forward_passes(save_residuals())
    assert once > 0
    assert forward_passes(jax.checkpoint_policies.nothing_saveable) == 2 * once


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs inside included.

    A kernel whose results nothing reads is left out: jax 0.10 leaves its removal to XLA.
    """
    atoms = [*jaxpr.outvars, *(v for equation in jaxpr.eqns for v in equation.invars)]
    read = {atom for atom in atoms if not isinstance(atom, jax.extend.core.Literal)}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call" and read.isdisjoint(equation.outvars):
            continue
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_policy_keeps_names_and_the_residuals_of_cudnn() -> None:
    policy = save_residuals("q")
    primitive = type("Primitive", (), {"name": attention_module.CUDNN_PRIMITIVE})
    assert policy(primitive)
    assert not policy(type("Primitive", (), {"name": "dot_general"}))

    def saved(name: str) -> int:
        @functools.partial(jax.checkpoint, policy=policy)
        def f(x: jax.Array) -> jax.Array:
            return jnp.sin(jax.ad_checkpoint.checkpoint_name(jnp.sin(x), name))

        gradient = jax.make_jaxpr(jax.grad(f))(1.0)
        return sum(equation.primitive.name == "sin" for equation in equations(gradient.jaxpr))

    assert saved("q") < saved("k")


LARGE = 1024


def largest_buffer(implementation: str) -> int:
    """Elements of the largest array in the compiled forward and backward pass."""
    shapes = [jax.ShapeDtypeStruct((1, LARGE, heads, 16), jnp.float32) for heads in (2, 1, 1)]
    ids = jax.ShapeDtypeStruct((1, LARGE), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids_BT: jax.Array) -> jax.Array:
        out = attention(q, k, v, segment_ids_BT=ids_BT, implementation=implementation)
        return out.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, ids).compile()
    found = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in found)


def test_blockwise_never_holds_all_scores() -> None:
    assert largest_buffer("reference") >= 2 * LARGE**2
    assert largest_buffer("blockwise") < LARGE**2


@given(
    ids=st.lists(st.integers(0, 3), min_size=12, max_size=12).map(sorted),
    window=st.none() | st.integers(1, 6),
)
def test_visible_keys_are_the_mask(ids: list[int], window: int | None) -> None:
    ids_BT = jnp.asarray([ids, ids[::-1]])
    first_BT, last_BT = (np.asarray(x) for x in visible_keys(ids_BT, ids_BT.shape, window))
    index_BT = np.broadcast_to(np.arange(len(ids)), ids_BT.shape)
    mask = np.asarray(attention_mask(index_BT, index_BT, ids_BT, ids_BT, window))
    query, key = index_BT[:, :, None], index_BT[:, None, :]
    np.testing.assert_array_equal((first_BT[:, :, None] <= key) & (key <= query), mask)
    np.testing.assert_array_equal((key <= query) & (query <= last_BT[:, None, :]), mask)


def test_visible_keys_without_ids() -> None:
    first_BT, last_BT = visible_keys(None, (1, 4), None)
    np.testing.assert_array_equal(first_BT, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(last_BT, [[3, 3, 3, 3]])
    first_BT, last_BT = visible_keys(None, (1, 4), 2)
    np.testing.assert_array_equal(first_BT, [[0, 0, 1, 2]])
    np.testing.assert_array_equal(last_BT, [[1, 2, 3, 3]])


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (128, 128), (129, 256), (513, 128), (4096, 1024), (4000, 1024)]
)
def test_splash_takes_the_longest_block_that_pads_little(length: int, block: int) -> None:
    assert splash.block_for(length) == block


@pytest.mark.parametrize(
    ("length", "group", "block"),
    [(1, 1, 16), (128, 1, 128), (129, 1, 80), (2048, 1, 256), (2049, 1, 240), (2048, 4, 128)],
)
def test_blockwise_cuts_rows_evenly(length: int, group: int, block: int) -> None:
    assert blockwise.block_for(length, group) == block


PROBLEM = Problem(
    platform="gpu",
    dtype="bfloat16",
    length=4096,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    packed=True,
    sliding_window=None,
)


@pytest.fixture
def with_cuda_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


@pytest.mark.usefixtures("with_cuda_plugin")
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"platform": "cpu"}, "blockwise"),
        ({"platform": "tpu"}, "splash"),
        ({"platform": "tpu", "dtype": "float16"}, "blockwise"),
        ({}, "pallas_gpu"),
        ({"packed": False}, "cudnn"),
        ({"packed": False, "dtype": "float32"}, "pallas_gpu"),
        ({"packed": False, "head_dim": 36}, "pallas_gpu"),
        ({"head_dim": 256}, "blockwise"),
        ({"platform": "METAL"}, "blockwise"),
    ],
)
def test_auto_takes(changes: dict[str, Any], name: str) -> None:
    assert choose("auto", replace(PROBLEM, **changes)) == name


def test_auto_leaves_cudnn_out_without_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose("auto", replace(PROBLEM, packed=False)) == "pallas_gpu"
    with pytest.raises(UserError, match=r"'cudnn' cannot run here.*plugin.*\[cuda12\]"):
        choose("cudnn", replace(PROBLEM, packed=False))


def test_auto_logs_once_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    attention_module._log_once.cache_clear()
    problem = replace(PROBLEM, platform="cpu", sliding_window=20)
    with caplog.at_level(logging.INFO, logger=attention_module.log.name):
        for _ in range(2):
            assert choose("auto", problem) == "blockwise"
    assert [record.getMessage() for record in caplog.records] == [
        "attention: auto takes blockwise on cpu (bfloat16, length 4096, 32/8 heads of 128, "
        "packed, window 20)"
    ]


@pytest.mark.usefixtures("with_cuda_plugin")
@pytest.mark.parametrize(
    ("implementation", "changes", "message"),
    [
        ("splash", {"platform": "cpu"}, r"'splash' cannot run here.*TPU.*'cpu'.*auto or blockwise"),
        ("splash", {"platform": "tpu", "dtype": "float16"}, "dtype float16.*compute_dtype"),
        ("pallas_gpu", {"platform": "tpu"}, r"GPU.*'tpu'.*auto or blockwise"),
        ("pallas_gpu", {"head_dim": 256}, r"256 dimensions.*at most 128.*blockwise"),
        ("pallas_gpu", {"dtype": "float64"}, "float64 is not bfloat16.*compute_dtype"),
        ("cudnn", {"platform": "cpu"}, r"NVIDIA GPU.*'cpu'.*auto or blockwise"),
        ("cudnn", {}, r"packed with several documents.*no segment ids.*pallas_gpu"),
        ("cudnn", {"packed": False, "dtype": "float32"}, "dtype is float32.*compute_dtype"),
        ("cudnn", {"packed": False, "head_dim": 36}, "36 dimensions.*multiples of 8 up to 128"),
    ],
)
def test_what_cannot_run_says_what_would(
    implementation: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(implementation, replace(PROBLEM, **changes))


def test_bad_arguments() -> None:
    *qkv, _ = operands(Case())
    with pytest.raises(UserError, match="'blockwis' is not one of auto.*Did you mean 'blockwise'"):
        attention(*qkv, implementation="blockwis")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sliding_window: 0 .*at least 1"):
        attention(*qkv, sliding_window=0)
    q, k, v = qkv
    with pytest.raises(UserError, match="3 query heads are no multiple of 2 key/value heads"):
        attention(q[:, :, :3], k, v)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU takes")
@pytest.mark.parametrize("implementation", ["auto", "blockwise"])
def test_attention_calls_the_kernel_of_the_platform(implementation: Any) -> None:
    case = Case(length=512)
    *qkv, _ = operands(case)
    got = attention(*qkv, implementation=implementation, **case.options)
    np.testing.assert_array_equal(got, blockwise.attention(*qkv, **case.options))


def test_every_implementation_is_known() -> None:
    for name in IMPLEMENTATIONS[1:]:
        reason = attention_module.obstacle(name, replace(PROBLEM, platform="cpu"))
        assert (reason is None) == (name in ("reference", "blockwise"))


@pytest.mark.parametrize("length", [16, 100, 128])
def test_blockwise_runs_a_single_block_in_bfloat16(length: int) -> None:
    """XLA's CPU backend refuses a product of bfloat16 summed in float32 that is in no loop."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, length, 4, 8), jnp.bfloat16) for i in range(3)
    )

    def loss(q: jax.Array, name: str) -> jax.Array:
        return attention(q, k, v, implementation=name).astype(jnp.float32).var()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    ours, reference = gradient(q, "blockwise"), gradient(q, "reference")
    assert ours.dtype == jnp.bfloat16
    tolerance = 0.05 * float(jnp.abs(ours).max())
    ours, reference = ours.astype(np.float32), reference.astype(np.float32)
    np.testing.assert_allclose(ours, reference, atol=tolerance)
