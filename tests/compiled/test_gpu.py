"""The training step as the GPU compiler makes it, for cards that are not here."""

from __future__ import annotations

import pytest
from programs import Compiled, compiled

from llamapro_jax.machines import parse_machine


@pytest.fixture(scope="module")
def h100() -> Compiled:
    """LLaMA2-7B + 8, four sequences of 4096 on each of eight cards."""
    return compiled("h100-8", rows=32, microbatch=4, remat="minimal")


def test_h100_fits(h100: Compiled) -> None:
    assert h100.peak_gib <= parse_machine("h100-8").chip.hbm_bytes / 2**30


def test_h100_computes_no_product_again(h100: Compiled) -> None:
    """XLA's own rematerialisation would add a tenth and more."""
    assert h100.matmul_flops == pytest.approx(h100.flops.linear, rel=0.02)


def test_h100_runs_each_attention_kernel_once_a_block(h100: Compiled) -> None:
    kernels = h100.summary.kernels
    backward = {name: n for name, n in kernels.items() if "ackward" in name}
    forward = {name: n for name, n in kernels.items() if name not in backward}
    assert sum(forward.values()) == 40
    assert set(backward.values()) == {36}


def test_h100_gathers_no_optimizer_state(h100: Compiled) -> None:
    large = [c for c in h100.summary.collectives if c.kind == "all-gather" and c.payload > 2**20]
    assert large and {c.dtype for c in large} == {"bf16"}


def test_a_single_h200_fits() -> None:
    step = compiled("h200-1", rows=2, microbatch=2, remat="minimal")
    assert step.peak_gib <= parse_machine("h200-1").chip.hbm_bytes / 2**30
    assert step.matmul_flops == pytest.approx(step.flops.linear, rel=0.02)
