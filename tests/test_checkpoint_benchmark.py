"""The benchmark of checkpoints: its bytes, its goals, and a small run of it."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from benchmark_modules import load

from llamapro_jax.architecture import described


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load("checkpoint")


def test_bytes_of_the_7b_are_those_of_its_parameters(benchmark: Any) -> None:
    recipe = benchmark.load_config(benchmark.RECIPE)
    config, plan = described(recipe.architecture)
    # Float32 weights and two moments, and the optimizer's counts.
    for spec, trained in ((("new",), 1_619_066_880), (("all",), 8_357_482_496)):
        run = benchmark.replace(recipe, trainable=spec)
        counts = benchmark.saved_bytes(config, plan, run) - 12 * trained
        assert 0 < counts < 100


def test_goals(benchmark: Any, capsys: Any) -> None:
    recipe = benchmark.load_config(benchmark.RECIPE)
    save = benchmark.Save(frozen=1.0, state=2.0, behind=9.0, slower=1.0)
    sizes = {"frozen": 10**9, "state": 10**9, "disk": 10**9}
    # 4 seconds every 500 steps.
    for step, status, word in ((0.17, 0, "met"), (0.15, 1, "missed")):
        assert benchmark.print_stall(recipe, step, [save], sizes) == status
        printed = capsys.readouterr().out
        share = re.escape(f"{4 / 500 / step:.2%}")
        assert re.search(f"goal stall: at most 5.0% .*; measured {share}; {word}\n", printed)
        assert "estimate, LLaMA2-7B + 8: 13.5 GB frozen and 19.4 GB saved" in printed
        assert "would hold a step up for 52 s" in printed
    assert benchmark.print_goal("a", 0.2, 0.1937, "of b") == 0
    assert benchmark.print_goal("a", 0.2, 0.2001, "of b") == 1
    assert "measured 20.01%; missed" in capsys.readouterr().out


@pytest.mark.slow
def test_small_size(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "--small", "--directory", str(tmp_path)])
    # At this size the times say nothing: a step takes milliseconds.
    assert benchmark.main() in (0, 1)
    printed = capsys.readouterr().out
    assert "goal bytes, 7B: at most 20.0% of a full checkpoint's; measured 19.37%; met" in printed
    assert "goal on disk: at most 101.0% of what the shapes say; measured " in printed
    assert "NOT" not in printed and "checksums of the frozen weights" in printed
    assert not list(tmp_path.iterdir())
