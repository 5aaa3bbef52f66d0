"""The benchmarks run at a small size, print their goals, and fail when a goal is missed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_modules import ROOT, load

SMALL = ["--blocks", "2", "--new-blocks", "1", "--shrink", "32"]


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_convert_7b(tmp_path: Path) -> None:
    done = run("convert_7b.py", *SMALL, "--limit-gib", "0.01", "--work-directory", str(tmp_path))
    assert done.returncode == 1, done.stderr
    goals = re.findall(
        r"^goal (\w+): anonymous memory at most ([\d.]+) GiB; measured 0\.\d\d GiB; (\w+)$",
        done.stdout,
        re.MULTILINE,
    )
    assert goals == [(verb, "0.01", "missed") for verb in ("convert", "expand", "export")]
    assert "identity proven" in done.stdout and "reloaded logits are bitwise" in done.stdout
    assert len(re.findall(r"^\| (?:convert|expand|export) \|", done.stdout, re.MULTILINE)) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "word", "status"), [(2.5, "met", 0), (0.5, "missed", 1)])
def test_goals_of_convert_7b(
    limit: float, word: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("convert_7b")
    row = benchmark.Row("export", 1, 3 * 2**28, 1.0, 1.0)
    assert benchmark.print_goals([row], limit) == status
    line = f"goal export: anonymous memory at most {limit} GiB; measured 0.75 GiB; {word}\n"
    assert capsys.readouterr().out == line


def test_convert_7b_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("convert_7b")
    usage = type("Usage", (), {"free": 20 * 10**9})
    monkeypatch.setattr(benchmark.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(sys, "argv", ["convert_7b.py", "--work-directory", str(tmp_path)])
    assert benchmark.main() == 2
    assert re.search(
        r"has 20\.0 GB free, but 34\.3 GB are needed.*--work-directory", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_convert_7b_cleans_up_after_a_verb_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load("convert_7b")
    monkeypatch.setattr(benchmark.sys, "executable", "/bin/false")
    arguments = [*SMALL, "--work-directory", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["convert_7b.py", *arguments])
    with pytest.raises(SystemExit, match=r"convert .* ended with 1"):
        benchmark.main()
    assert not list(tmp_path.iterdir())


def test_the_7b_is_the_published_one() -> None:
    benchmark = load("convert_7b")
    config = benchmark.parse(benchmark.architecture(32, 1))
    assert benchmark.total_parameters(config) == 6_738_415_616
