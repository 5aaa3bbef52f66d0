"""Which remat and microbatch `auto` takes, by what compilers say of the candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from steps import PLANS, model_config, run_config

from llamapro_jax.architecture import described
from llamapro_jax.config import ArchitectureConfig, RunConfig
from llamapro_jax.errors import UserError
from llamapro_jax.machines import GIB
from llamapro_jax.training.fit import DoesNotFit, candidates, leanest, needed_by, resolve

FSDP4 = {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
PLAN = PLANS["2 of 4"]
CONFIG, PAPER = described(ArchitectureConfig("llama2_7b", 8))


def recipe(batch: int = 1024, **training: Any) -> RunConfig:
    run = run_config(compute_dtype="bfloat16", rows=batch, length=4096, loss_chunk=1024)
    return replace(run, training=replace(run.training, **training))


class Compiler:
    """Says what each candidate needs; a TPU's refuses one that needs more than the memory."""

    def __init__(self, needs: Callable[[str, int], float], refuses: float | None = None) -> None:
        self.needs, self.refuses = needs, refuses
        self.asked: list[tuple[str, int]] = []

    def __call__(self, run: RunConfig) -> Any:
        remat, part = run.training.remat, run.training.microbatch
        assert isinstance(part, int)
        self.asked.append((remat, part))
        needed = self.needs(remat, part)
        if self.refuses is not None and needed > self.refuses:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
                f"space hbm. Used {needed / GIB:.2f}G of 15.75G hbm. Exceeded hbm capacity by 2G."
            )
        sizes = dict.fromkeys(("argument", "output", "alias", "temp"), 0)
        memory = SimpleNamespace(
            peak_memory_in_bytes=int(needed), **{f"{n}_size_in_bytes": s for n, s in sizes.items()}
        )
        return SimpleNamespace(memory_analysis=lambda: memory)


def modelled(run: RunConfig) -> Callable[[str, int], float]:
    by_key = {(c.remat, c.microbatch): c.bytes for c in candidates(run, CONFIG, PAPER, FSDP4)}
    return lambda remat, part: by_key[remat, part]


def test_the_first_one_fits_where_there_is_room() -> None:
    run = recipe()
    compiler = Compiler(modelled(run))
    fitted = resolve(run, CONFIG, PAPER, FSDP4, 95 * GIB, compiler)
    assert compiler.asked == [("minimal", 4)]
    assert (fitted.run.training.remat, fitted.run.training.microbatch) == ("minimal", 4)
    assert fitted.compiled is not None
    # All else is as it was.
    training = replace(fitted.run.training, remat="auto", microbatch="auto")
    assert replace(fitted.run, training=training) == run


@pytest.mark.parametrize("refuses", [None, 15.75 * GIB])
def test_goes_on_to_the_next_one_that_may_fit(refuses: float | None) -> None:
    run = recipe()
    # The compiler needs a little more than the model says.
    of_model = modelled(run)
    compiler = Compiler(lambda *key: 1.06 * of_model(*key), refuses)
    lines: list[str] = []
    fitted = resolve(run, CONFIG, PAPER, FSDP4, int(15.75 * GIB), compiler, lines.append)
    assert (fitted.run.training.remat, fitted.run.training.microbatch) == ("full", 1)
    # What the first answer shows not to fit is not compiled.
    assert compiler.asked == [("attention", 1), ("full", 1)]
    assert any("does not fit: 16." in line for line in lines)


def test_nothing_fits() -> None:
    run = recipe()
    compiler = Compiler(modelled(run))
    with pytest.raises(DoesNotFit, match=r"needs 1\d\.\d+ GiB .* has 8\.00.*remat full") as caught:
        resolve(run, CONFIG, PAPER, FSDP4, 8 * GIB, compiler)
    assert compiler.asked == [("full", 1)]
    assert caught.value.needed > caught.value.memory == 8 * GIB
    assert leanest(run, CONFIG, PAPER, FSDP4) == caught.value.run


def test_what_the_run_says_stays() -> None:
    run = recipe(remat="full", microbatch=2)
    compiler = Compiler(modelled(run))
    assert resolve(run, CONFIG, PAPER, FSDP4, 95 * GIB, compiler).run == run
    assert compiler.asked == [("full", 2)]
    run = recipe(remat="attention")
    fitted = resolve(run, CONFIG, PAPER, FSDP4, 95 * GIB, Compiler(modelled(run)))
    assert (fitted.run.training.remat, fitted.run.training.microbatch) == ("attention", 4)


def test_on_a_cpu_nothing_is_compiled() -> None:
    compiler = Compiler(lambda *_: 0)
    fitted = resolve(recipe(), CONFIG, PAPER, FSDP4, None, compiler)
    assert (fitted.run.training.remat, fitted.run.training.microbatch) == ("none", 256)
    assert fitted.compiled is None and compiler.asked == []
    run = recipe(remat="full", microbatch=8)
    assert resolve(run, CONFIG, PAPER, FSDP4, None, compiler).run == run


def test_other_errors_of_the_compiler_are_not_swallowed() -> None:
    def compiler(run: RunConfig) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: Ran out of memory in memory space vmem.")

    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        resolve(recipe(), CONFIG, PAPER, FSDP4, 95 * GIB, compiler)


@pytest.mark.parametrize(
    ("batch", "part", "says"),
    [
        (6, "auto", r"data\.batch_size: 6 rows do not divide over 4 devices"),
        (1024, 3, r"training\.microbatch: 3 does not divide the 256 rows"),
    ],
)
def test_rows_that_do_not_divide(batch: int, part: Any, says: str) -> None:
    compiler = Compiler(lambda *_: 0)
    with pytest.raises(UserError, match=says):
        resolve(recipe(batch, microbatch=part), CONFIG, PAPER, FSDP4, 95 * GIB, compiler)
    assert compiler.asked == []


def test_messages_of_compilers() -> None:
    assert needed_by("Used 18.23G of 15.75G hbm") is None
    text = "Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm. Exceeded"
    assert needed_by(text) == 18.25 * GIB
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (768.00M) exceeds available HBM (95.74G)."
    )
    assert needed_by(text) == 768 * 2**20
    assert needed_by("Ran out of memory in memory space vmem. Used 17M of 16M vmem") is None


def test_the_model_of_memory() -> None:
    """Against what the compiler for v5p needed, 4 chips, one row each: 24.6 GiB."""
    by_key = {
        (c.remat, c.microbatch): c.bytes / GIB for c in candidates(recipe(4), CONFIG, PAPER, FSDP4)
    }
    assert by_key["minimal", 1] == pytest.approx(24.6, rel=0.05)
    assert by_key["full", 1] < by_key["attention", 1] < by_key["minimal", 1]
    small = model_config(PLAN)
    run = run_config(rows=8)
    assert all(c.bytes > 0 for c in candidates(run, small, PLAN, FSDP4))


def test_the_model_of_time() -> None:
    every = candidates(recipe(), CONFIG, PAPER, FSDP4)
    by_key = {(c.remat, c.microbatch): c.seconds for c in every}
    for part in (1, 2, 4):
        assert by_key["minimal", part] < by_key["attention", part] < by_key["full", part]
    for remat in ("minimal", "attention", "full"):
        assert by_key[remat, 4] < by_key[remat, 2] < by_key[remat, 1]
    # Larger parts gain nothing, and are not tried.
    assert max(c.microbatch for c in every) == 4
