"""The benchmark of the training step runs, agrees with PyTorch and judges its goal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "step.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_step"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_small_size_does_the_work_of_pytorch(capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", ["step.py", "--small", "--threads", "1"])
    # At this size the goal itself says nothing: a step takes milliseconds.
    assert script().main() in (0, 1)
    printed = capsys.readouterr().out
    assert "useful FLOPs of new / all: 0.671" in printed
    assert ": the same work" in printed
    assert "goal time of new / all: at most 0.705" in printed
    assert "goal time of new / torch: at most 1.5; measured" in printed


def test_goal(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", "--small"])
    module = script()
    args = module.parse_arguments()
    plan = module.ExpansionPlan(args.blocks).expand(module.spread(args.blocks, args.new_blocks))
    config = module.architecture(args, plan)
    for share, status, word in ((0.70, 0, "met"), (0.71, 1, "missed")):
        # The ratio is the median of those of the rounds, so that one slow round does not decide.
        seconds = {"new": [share, 9 * share, share], "all": [1.0, 1.0, 1.0]}
        assert module.print_goals(seconds, config, plan, args) == status
        assert capsys.readouterr().out.rstrip().endswith(f"measured {share:.3f}; {word}")
    for share, status, word in ((1.5, 0, "met"), (1.6, 1, "missed")):
        seconds = {"new": [share] * 3, "all": [3.0] * 3, "torch": [1.0] * 3}
        assert module.print_goals(seconds, config, plan, args) == status
        assert capsys.readouterr().out.rstrip().endswith(f"measured {share:.3f}; {word}")


def test_other_losses_are_not_compared(capsys: Any) -> None:
    assert script().same_losses({"new": [1.0, 2.0], "torch": [1.0, 2.0001]})
    assert not script().same_losses({"new": [1.0, 2.0], "torch": [1.0, 2.1]})
    assert "NOT the same work" in capsys.readouterr().out
