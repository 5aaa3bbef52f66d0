"""The benchmark on a GPU runs at a small size on a CPU, judges its goals, and imports little."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from benchmark_modules import ROOT, load

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

# A machine with a GPU may have jax and PyTorch, and nothing that reads data.
ABSENT = ("tensorflow_datasets", "array_record", "grain", "sentencepiece", "tensorboardX", "libtpu")
IMPORTS = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import benchmarks.gpu_parts.kernels, benchmarks.gpu_parts.ours
from llamapro_jax.flops import step_flops
"""


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def test_needs_no_package_that_reads_data() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr


def test_flags_can_be_set_for_the_parts() -> None:
    """What starts the parts has not imported jax, which would have read the flags."""
    code = "import runpy, sys; runpy.run_path('benchmarks/gpu.py'); assert 'jax' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_small_model() -> None:
    pytest.importorskip("torch")
    done = run("--tiny", "--quick", "--rounds", "1")
    assert done.returncode == 0, done.stderr + done.stdout
    printed = done.stdout
    assert printed.count(" | agrees |") == 7 and "DIFFERS" not in printed
    # 4 + 2 blocks of width 64: two blocks train, in both.
    assert re.findall(r"([\d,]+) parameters train", printed) == ["94,464"] * 2
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 6 and all(5.0 < loss < 6.5 for loss in losses)
    assert "goal useful rate: at least 475 TFLOP/s; measured 0.0" in printed
    assert len(re.findall(r"^goal .*; not judged here$", printed, re.MULTILINE)) == 3


def test_without_a_gpu() -> None:
    done = run("--parts", "kernels")
    assert done.returncode == 2
    assert "there is no GPU here; --tiny runs on any device" in done.stderr


def found(rate: float, device: str = "NVIDIA H200", agrees: bool = True) -> tuple[Any, Any]:
    parts = {
        "kernels": {"checks": [{"agrees": True}, {"agrees": agrees}], "device": device},
        "ours": {"matmul_flops": 790e12},
    }
    return parts, {"useful": rate * 1e12, "ratio": 1.31}


@pytest.mark.parametrize(
    ("arguments", "word", "status"),
    [
        ((480.0,), "met", 0),
        ((470.0,), "missed", 1),
        ((470.0, "NVIDIA A100-SXM4-80GB"), "not judged here", 0),
        ((480.0, "NVIDIA A100-SXM4-80GB", False), "not judged here", 1),
    ],
)
def test_goals(arguments: Any, word: str, status: int, capsys: Any) -> None:
    assert load("gpu").print_goals(*found(*arguments), tiny=False) == status
    printed = capsys.readouterr().out
    rate = arguments[0]
    peak = 989 if len(arguments) == 1 else 312
    assert f"measured {rate} ({rate / peak:.1%} of the peak, {peak}; {rate / 790:.1%}" in printed
    line = next(line for line in printed.splitlines() if line.startswith("goal useful rate"))
    assert line.endswith(f"; {word}")


def test_rounds_are_compared_in_pairs() -> None:
    module = load("gpu")
    candidates = [
        {"setting": {"remat": "full"}, "seconds": [3.0]},
        {"setting": {"remat": "minimal"}, "seconds": [2.0]},
        {"setting": {"remat": "minimal", "packed": True}, "seconds": [1.0]},
        {"setting": {"remat": "none"}, "problem": "out of memory"},
    ]
    parts = {part: {"candidates": candidates} for part in ("ours", "torch")}
    seconds = iter([[2.0, 9.0, 2.2], [3.0], [1.0], [2.0]])
    asked = []

    class Runner:
        left = 100.0

        def run(self, part: str, share: float, setting: Any) -> Any:
            asked.append((part, setting))
            return {"candidates": [{"seconds": next(seconds)}]}

    assert module.take_turns(Runner(), parts, 2) == {"ours": [2.2, 1.0], "torch": [3.0, 2.0]}
    assert asked == [("ours", {"remat": "minimal"}), ("torch", {"remat": "minimal"})] * 2
    # Without time for a round, what was measured when the settings were tried counts.
    assert module.take_turns(Runner(), parts, 0) == {"ours": [2.0], "torch": [2.0]}
