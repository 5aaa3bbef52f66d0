"""The benchmark of reading runs at a small size, and can fail."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from benchmark_modules import load

SMALL = ["--lengths", "16", "64", "--tokens", "4000", "--batch-tokens", "512", "--rounds", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["data.py", *SMALL, *options])
    return load("data").main()


@pytest.mark.parametrize(("goal", "word", "status"), [("1", "met", 0), ("1e12", "missed", 1)])
def test_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    goal: str,
    word: str,
    status: int,
) -> None:
    assert run(monkeypatch, "--goal", goal, "--work-directory", str(tmp_path)) == status
    printed = capsys.readouterr().out
    goals = re.findall(
        r"^goal (\d+) tokens a row: at least .* measured [\d,]+; (\w+)$", printed, re.M
    )
    assert goals == [("16", word), ("64", word)]
    rows = re.findall(r"^\| (\d+) \| (\d) \| [\d.,]+ \|", printed, re.M)
    assert rows == [("16", "1"), ("16", "2"), ("64", "1"), ("64", "2")]
    assert not list(tmp_path.iterdir())


def test_too_few_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--tokens", "100") == 2
    assert "--tokens 100 must be some rows for each of 4 shards" in capsys.readouterr().err
