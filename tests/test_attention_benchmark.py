"""The benchmark of attention runs at a small size, and can fail."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from benchmark_modules import load

SMALL = ["--length", "512", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--rounds", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["attention.py", *SMALL, *options])
    return load("attention").main()


@pytest.mark.slow
@pytest.mark.parametrize(("goal", "word", "status"), [("0", "met", 0), ("1e9", "missed", 1)])
def test_attention(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    goal: str,
    word: str,
    status: int,
) -> None:
    options = ["--goal", goal, "--documents", "2" if status else "1"]
    assert run(monkeypatch, *options) == status
    printed = capsys.readouterr().out
    assert re.search(rf"^goal \w+: forward and backward .* measured [\d.]+; {word}$", printed, re.M)
    rows: dict[str, Any] = dict(re.findall(r"^\| ([\w. ()]+) \| .* \| (\S+) \|$", printed, re.M))
    assert {"reference", "blockwise"} <= set(rows)
    # jax's own attention knows no segments: it is left out where rows are packed.
    assert ("jax.nn (xla)" in rows) == (status == 0)
    assert all(float(rows[name]) < 1e-5 for name in rows if name != "attention")


def test_shapes_that_do_not_divide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--documents", "3") == 2
    assert "--length 512 must be a multiple of --documents 3" in capsys.readouterr().err
