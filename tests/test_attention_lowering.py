"""Attention kernels lower for the machines that they are for, which need not be there."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llamapro_jax.model.attention import attention

# (query heads, key/value heads, head dim, length, sliding window)
SHAPES = {
    "llama2_7b": (32, 32, 128, 4096, None),
    "llama3_8b": (32, 8, 128, 4096, None),
    "mistral_7b": (32, 8, 128, 8192, 4096),
    "small": (8, 2, 80, 500, None),
}

each_shape = pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, "bfloat16") for shape in SHAPES] + [("small", "float32")]
)


def lowered(implementation: str, platform: str, shape: str, dtype: str, packed: bool = True) -> str:
    """The lowered forward and backward pass."""
    H, K, C, T, window = SHAPES[shape]
    qkv = [jax.ShapeDtypeStruct((1, T, heads, C), dtype) for heads in (H, K, K)]
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32) if packed else None

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids_BT: jax.Array | None) -> jax.Array:
        out = attention(
            q,
            k,
            v,
            segment_ids_BT=ids_BT,
            sliding_window=window,
            implementation=implementation,  # type: ignore[arg-type]
            platform=platform,
        )
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    return gradient.trace(*qkv, ids).lower(lowering_platforms=(platform,)).as_text()


@contextlib.contextmanager
def hopper() -> Any:
    """A GPU for the compiler to know: jax 0.12 lowers Triton kernels for a named one alone."""
    device = jax.sharding.AbstractDevice
    known = {"device_kind": "NVIDIA H100", "num_cores": 132, "platform": "gpu"}
    taken = {name: known[name] for name in inspect.signature(device).parameters}
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device(**taken))
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@each_shape
def test_pallas_gpu_lowers_for_cuda(shape: str, dtype: str) -> None:
    with hopper():
        text = lowered("pallas_gpu", "cuda", shape, dtype)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3
    for kernel in ("forward", "backward_dkv", "backward_dq"):
        assert f'name = "attention_{kernel}"' in text


@each_shape
def test_splash_lowers_for_tpu(shape: str, dtype: str) -> None:
    text = lowered("splash", "tpu", shape, dtype)
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3


@pytest.mark.parametrize("shape", ["llama2_7b", "llama3_8b", "mistral_7b"])
def test_cudnn_lowers_for_cuda(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library itself is asked for its version alone; it is not needed to lower.
    library = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(library, lambda: 91000)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with hopper():
        text = lowered("cudnn", "cuda", shape, "bfloat16", packed=False)
    assert text.count("stablehlo.custom_call @__cudnn$fmhaSoftmax(") == 1
    assert text.count("stablehlo.custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
