"""The training step as the TPU compiler makes it: what it keeps, computes and moves.

Full depth where the figure is of a whole model; else true widths with few blocks, whose loops are
the same programs with fewer trips.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import Compiled, compiled, gib_refused

from llamapro_jax.architecture import of_run
from llamapro_jax.capacity import assess
from llamapro_jax.config import MeshConfig, load_config
from llamapro_jax.machines import parse_machine
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import block_weights, outer_weights
from llamapro_jax.program import SEND_TO_SLICES, buffers

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
FEW = (4, 2)
BIG = 2**20


def sizes(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))


def shapes_of_weights(config: ModelConfig) -> set[tuple[int, ...]]:
    weights = (*block_weights(config), *outer_weights(config))
    return {sizes(weight.shape(config)) for weight in weights}


def gathered(step: Compiled) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, sizes) of each array of more than a megabyte that is gathered."""
    return [
        (instruction.results[-1].dtype, sizes(instruction.results[-1].dims))
        for instruction, computation in step.program.instructions()
        if instruction.operation.removesuffix("-start") == "all-gather"
        and step.program.times[computation.name]
        and instruction.results[-1].bytes > BIG
    ]


def calls(step: Compiled, part: str) -> int:
    return sum(n for name, n in step.summary.kernels.items() if part in name)


# ------------------------------------------------- v5p 2x2x1, nothing computed again


@pytest.fixture(scope="module")
def v5p() -> Compiled:
    """LLaMA2-7B + 8, a sequence of 4096 on each chip."""
    return compiled("v5p-8", rows=4, remat="minimal")


def test_v5p_peak(v5p: Compiled) -> None:
    assert v5p.peak_gib <= 28


def test_v5p_computes_no_product_again(v5p: Compiled) -> None:
    assert round(v5p.flops.linear / 1e9, 2) == 34.52
    # Equal says also that no frozen weight has a gradient.
    assert v5p.matmul_flops == pytest.approx(v5p.flops.linear, rel=1e-6)


def test_v5p_runs_each_attention_kernel_once_a_block(v5p: Compiled) -> None:
    assert calls(v5p, "_fwd") == 40
    # The four blocks below the first new one have no backward pass.
    assert calls(v5p, "_dq") == calls(v5p, "_dkv") == 36


def test_v5p_gathers_weights_and_nothing_else(v5p: Compiled) -> None:
    """No optimizer state, no master in float32, no activations: nothing is laid out by force.

    XLA's warning of an involuntary rematerialisation is not to be had from these compilers.
    """
    found = gathered(v5p)
    assert {dtype for dtype, _ in found} == {"bf16"}
    assert {shape for _, shape in found} <= shapes_of_weights(v5p.config)


def test_v5p_gathers_each_weight_once_a_pass(v5p: Compiled) -> None:
    config = v5p.config
    outside = sizes((config.vocab_size, config.hidden_size))
    # The head once, not once a chunk of the loss; and the embedding.
    assert [shape for _, shape in gathered(v5p)].count(outside) == 2
    payload = sum(
        c.payload * c.times
        for c in v5p.summary.collectives
        if c.kind == "all-gather" and c.payload > BIG
    )
    block = sum(w.size(config) for w in block_weights(config) if len(w.dims) > 1)
    expected = 2 * ((40 + 36) * block + 2 * config.vocab_size * config.hidden_size)
    assert payload == pytest.approx(expected, rel=0.02)


def test_v5p_reduces_gradients_of_new_blocks_alone(v5p: Compiled) -> None:
    config = v5p.config
    reduced = sum(
        c.payload * c.times / {"bf16": 2, "f32": 4}[c.dtype]
        for c in v5p.summary.collectives
        if c.kind in ("reduce-scatter", "all-reduce") and c.payload > BIG
    )
    block = sum(w.size(config) for w in block_weights(config) if len(w.dims) > 1)
    assert reduced == pytest.approx(8 * block, rel=0.01)


# ------------------------------------------------- v5e 2x2, 15.75 GiB


def test_v5e_fits() -> None:
    """LLaMA2-7B + 8, sequence 4096, batch 4."""
    step = compiled("v5e-4", rows=4, remat="full")
    assert step.peak_gib <= 15.0
    # Each block that the backward pass reaches runs forward again, all but `down` of it.
    config = step.config
    block = sum(2 * w.size(config) for w in block_weights(config) if w.multiplies)
    again = 36 * (block - 2 * config.hidden_size * config.intermediate_size)
    assert step.matmul_flops <= step.flops.linear + again
    assert calls(step, "_fwd") <= 40 + 36


def test_v5e_does_not_fit_full_tuning() -> None:
    assert gib_refused("v5e-4", rows=4, remat="full", trainable=("all",)) > 20


def test_v5e_takes_the_shipped_recipe_as_it_is() -> None:
    run = load_config(CONFIGS / "llama2_7b_pro.yaml")
    assert run.training.remat == run.training.microbatch == "auto"
    found = assess(run, *of_run(run), parse_machine("v5e-4"), print)
    assert found.fits, found.as_json()
    assert found.peak_bytes <= found.hbm_bytes
    assert found.run.training.microbatch == 1


def test_an_int8_base_is_gathered_as_int8() -> None:
    step = compiled("v5e-4", rows=4, remat="full", blocks=FEW, frozen_dtype="int8")
    moved = {"s8": 0.0, "bf16": 0.0}
    for c in step.summary.collectives:
        if c.kind == "all-gather" and c.payload > BIG:
            moved[c.dtype] += c.payload * c.times
    config = step.config
    block = sum(w.size(config) for w in block_weights(config) if len(w.dims) > 1)
    # Of 4 base blocks 2 are below the first new one.
    assert moved["s8"] == pytest.approx((4 + 2) * block, rel=0.02)
    new = 2 * ((2 + 2) * block + 2 * config.vocab_size * config.hidden_size)
    # Of a block that is a loop by itself the compiler gathers once for both passes.
    assert new / 2 < moved["bf16"] <= 1.01 * new


# ------------------------------------------------- long rows, large models, several slices


def test_long_rows_over_context() -> None:
    """T = 32,768 over four chips: no array has two dimensions of the length of a row."""
    length = 32768
    step = compiled(
        "v5p-8", rows=1, length=length, remat="minimal", blocks=FEW, mesh=MeshConfig(context=4)
    )
    assert step.peak_gib < parse_machine("v5p-8").chip.hbm_bytes / 2**30
    # A row is whole, halved (keys that were gathered) or in four.
    parts = {length, length // 2, length // 4}
    scores = [
        buffer
        for buffer in buffers(step.program, at_least=BIG)
        if sum(size in parts for size in buffer.array.dims) > 1
    ]
    assert scores == []


def test_70b_over_fsdp_and_tensor() -> None:
    """On the machine that its configuration names, with its mesh; one row a group."""
    run = load_config(CONFIGS / "llama2_70b_pro.yaml")
    step = compiled("v5p-256", "llama2_70b", rows=32, remat="minimal", mesh=run.mesh)
    assert step.peak_gib < parse_machine("v5p-256").chip.hbm_bytes / 2**30
    assert step.matmul_flops == pytest.approx(step.flops.linear, rel=0.02)
    assert {dtype for dtype, _ in gathered(step)} == {"bf16"}


def test_two_slices_sum_gradients_over_the_network() -> None:
    step = compiled("2xv5e-4", rows=8, remat="full", blocks=FEW)
    config = step.config
    block = sum(w.size(config) for w in block_weights(config) if len(w.dims) > 1)
    over_slices = sum(
        c.payload * c.times / {"bf16": 2, "f32": 4}[c.dtype]
        for c in step.summary.collectives
        if c.kind == SEND_TO_SLICES and c.payload > BIG // 4
    )
    # Each device sends its quarter of the two new blocks.
    assert over_slices == pytest.approx(2 * block / 4, rel=0.05)
