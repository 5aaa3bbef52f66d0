"""What a compiled program computes and moves, against what it was written to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llamapro_jax.hlo import read_program
from llamapro_jax.program import (
    Collective,
    buffers,
    compiled_matmul_flops,
    kernel_calls,
    matmul_flops,
    summarize,
)

ROOT = Path(__file__).resolve().parent.parent


def entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"ENTRY %main (p: f32[2,2]) -> f32[2,2] {{\n{body}\n}}\n"


def test_products_in_loops_and_fusions() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]), None

        x, _ = jax.lax.scan(body, x, w)
        return jnp.einsum("bt,bs->ts", x, x)

    x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    compiled = jax.jit(f).lower(x, w).compile()
    assert compiled_matmul_flops(compiled) == 15 * 2 * 4 * 8 * 8 + 2 * 8 * 8 * 4


def test_does_not_guess_a_loop() -> None:
    loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x))
    with pytest.raises(ValueError, match="trip count"):
        compiled_matmul_flops(loop.lower(jnp.ones((2, 2))).compile())


def test_a_product_of_cublas() -> None:
    dims = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}'
    text = entry(
        "%a = bf16[64,8]{1,0} parameter(0)",
        "%b = bf16[64,16]{1,0} parameter(1)",
        "%gemm = (bf16[8,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), "
        f'custom_call_target="__cublas$lt$matmul", backend_config={dims}',
        "ROOT %c = bf16[8,16]{1,0} get-tuple-element(%gemm), index=0",
    )
    assert matmul_flops(read_program(text)) == 2 * 8 * 16 * 64
    with pytest.raises(ValueError, match=r"cannot count.*gemm \(__cublas\$lt\$matmul\)"):
        matmul_flops(read_program(text.replace("lhs_contracting", "other")))


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # x @ w, x @ w.T and x.T @ y, as the TPU compiler writes them.
        ("512,64", "64,32", "512,32", "dim_labels=bf_io->bf", 2 * 512 * 64 * 32),
        ("512,64", "32,64", "512,32", "dim_labels=bf_oi->bf", 2 * 512 * 64 * 32),
        ("512,64", "512,32", "64,32", "dim_labels=fb_io->bf", 2 * 512 * 64 * 32),
        # A batch of 4 products: a window over the batch of which one place alone is no hole.
        (
            "4,16,64",
            "4,64,32",
            "4,16,32",
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            4 * 2 * 16 * 64 * 32,
        ),
        # A contraction over two dimensions, one of which is the window.
        (
            "16,8,64",
            "8,64,32",
            "1,16,32",
            "window={size=8}, dim_labels=b0f_0io->0bf",
            2 * 16 * 8 * 64 * 32,
        ),
    ],
)
def test_products_as_convolutions(
    left: str, right: str, result: str, attributes: str, flops: int
) -> None:
    text = entry(
        f"%a = bf16[{left}]{{1,0:T(8,128)(2,1)}} parameter(0)",
        f"%b = bf16[{right}]{{1,0:T(8,128)(2,1)}} parameter(1)",
        f"ROOT %c = bf16[{result}]{{1,0:T(8,128)(2,1)}} convolution(%a, %b), {attributes}",
    )
    assert matmul_flops(read_program(text)) == flops


def test_kernels_by_name() -> None:
    call = '%{0} = f32[2,2] custom-call(%p), custom_call_target="{1}", metadata={{op_name="{2}"}}'
    text = entry(
        "%p = f32[2,2] parameter(0)",
        call.format("a", "tpu_custom_call", "jit(f)/while/body/splash_fwd/pallas_call"),
        call.format("b", "__gpu$xla.gpu.triton", "jit(f)/attention_forward/pallas_call"),
        call.format("c", "__cudnn$fmhaSoftmax", "jit(f)/dot_product_attention_fwd"),
        'ROOT %d = f32[2,2] custom-call(), custom_call_target="AllocateBuffer"',
    )
    program = read_program(text)
    assert kernel_calls(program) == {
        "splash_fwd": 1,
        "attention_forward": 1,
        "__cudnn$fmhaSoftmax": 1,
    }
    assert matmul_flops(program) == 0


@pytest.mark.parametrize(
    ("line", "kind", "payload", "devices", "moved"),
    [
        ("f32[8,2] all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}",
         "all-gather", 64, 2, 32),
        ("(f32[2,2], f32[8,2]) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}",
         "all-gather", 64, 4, 48),
        ("((f32[2,2], f32[2,2]), (f32[8,2], f32[4,2])) all-gather-start(%p, %p), "
         "replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 96, 4, 72),
        ("f32[2,2] all-reduce(%p), "
         "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", "all-reduce", 16, 8, 28),
        ("((f32[2,2]), f32[1,2]) reduce-scatter-start(%p), "
         "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", "reduce-scatter", 16, 2, 8),
        ("f32[2,2] all-reduce(%p), replica_groups=mesh['a'=8] {'a':(2)4}", "all-reduce", 16, 4, 24),
        ("(f32[2,2], u32[], token[]) send(%p), frontend_attributes={"
         '_xla_host_transfer_handler_name="xla_megascale_runtime"}', "send-to-slices", 16, 1, 16),
        ("f32[2,2] collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
         "collective-permute", 16, 1, 16),
    ],
)  # fmt: skip
def test_collectives_as_written(
    line: str, kind: str, payload: int, devices: int, moved: float
) -> None:
    (found,) = summarize(entry("%p = f32[2,2] parameter(0)", f"ROOT %c = {line}")).collectives
    assert found == Collective(kind, payload, devices, 1, "", "f32")
    assert found.moved == moved


def test_a_reduction_that_keeps_a_slice() -> None:
    text = (
        "%all-reduce-scatter (q: f32[4,2]) -> f32[1,2] {\n"
        "  %q = f32[4,2] parameter(0)\n"
        "  %r = f32[4,2] all-reduce(%q), replica_groups={{0,1,2,3}}\n"
        "  ROOT %s = f32[1,2] dynamic-slice(%r), dynamic_slice_sizes={1,2}\n"
        "}\n\n"
    ) + entry(
        "%p = f32[4,2] parameter(0)",
        "ROOT %f = f32[1,2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter, "
        'metadata={op_name="jit(f)/dot_general"}',
    )
    summary = summarize(text)
    assert summary.collectives == (
        Collective("reduce-scatter", 32, 4, 1, "jit(f)/dot_general", "f32"),
    )
    assert summary.collective_bytes == 24


def test_an_asynchronous_collective_of_a_tpu_counts_once() -> None:
    inside = (
        "%NAME (q: f32[2,2]) -> f32[4,2] {\n"
        "  %q.N = f32[2,2] parameter(0)\n"
        "  %g.N = f32[4,2] all-gather(%q.N), channel_id=7, replica_groups={{0,1}}\n"
        '  ROOT %c.N = f32[4,2] custom-call(%g.N), custom_call_target="AsyncCollective"\n'
        "}\n\n"
    )
    names = ("begin", "async_collective_fusion.3", "finish")
    text = "".join(
        inside.replace("NAME", name).replace(".N", f".{i}") for i, name in enumerate(names)
    ) + entry(
        "%p = f32[2,2] parameter(0)",
        "%async-collective-start.1 = f32[4,2] fusion(%p), kind=kCustom, calls=%begin",
        "%fusion.3 = f32[4,2] fusion(%p), kind=kOutput, calls=%async_collective_fusion.3",
        "ROOT %async-collective-done.1 = f32[4,2] fusion(%p), kind=kCustom, calls=%finish",
    )
    assert [c.kind for c in summarize(text).collectives] == ["all-gather"]


# Gathers a weight in a loop, forward and backward, on 8 devices: (data 1, fsdp 4, tensor 2).
ON_EIGHT = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from llamapro_jax.program import summarize

mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)

def loss(w, x):
    def body(x, w):
        return jnp.tanh(x @ jax.reshard(w, P(None, None))), None
    return jnp.sum(jax.lax.scan(body, x, w)[0])

w = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
summary = summarize(compiled.as_text())
print(json.dumps([
    summary.matmul_flops,
    [[c.kind, c.payload, c.devices, c.times] for c in summary.collectives if c.payload > 4],
]))
"""


def test_collectives_as_compiled_for_eight_devices() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    result = subprocess.run(
        [sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    flops, collectives = json.loads(result.stdout)
    assert flops == 6 * 3 * 2 * 8 * 64 * 64
    weight = 4 * 64 * 64
    assert sorted(collectives) == [["all-gather", weight, 4, 6], ["all-reduce", weight, 4, 6]]


def test_largest_arrays() -> None:
    def f(x: jax.Array) -> jax.Array:
        scores = jnp.einsum("td,sd->ts", x, x)
        return jax.nn.softmax(scores) @ x

    compiled = jax.jit(f).lower(jnp.ones((256, 8))).compile()
    found = buffers(read_program(compiled.as_text()), at_least=4 * 256 * 256)
    assert found and all(buffer.array.dims == (256, 256) for buffer in found)
