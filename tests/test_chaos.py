"""The campaign of faults at a small size; and its parts, which can tell what is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.chaos_parts import plan  # noqa: E402
from benchmarks.chaos_parts.damage import damaged, files  # noqa: E402
from benchmarks.chaos_parts.group import Ended, Group, starts_again  # noqa: E402
from benchmarks.chaos_parts.phases import (  # noqa: E402
    DELETE,
    EVALUATE,
    PHASES,
    READY,
    SAVE,
    STEP,
    Outside,
    phase_of,
)
from benchmarks.chaos_parts.plan import Fault, Queue  # noqa: E402
from benchmarks.chaos_parts.results import BEGIN, END, Outcome, Results, write_table  # noqa: E402
from benchmarks.chaos_parts.space import NoNamespace, Space  # noqa: E402

# ------------------------------------------------------------------- the plan


@pytest.mark.parametrize("number", [20, 200, 333])
def test_a_plan_has_every_kind_and_is_the_same_for_the_same_seed(number: int) -> None:
    found = plan.faults(number, seed=3)
    assert len(found) == number and [fault.number for fault in found] == list(range(number))
    assert {fault.kind for fault in found} == set(plan.KINDS)
    assert found == plan.faults(number, seed=3) != plan.faults(number, seed=4)


def test_200_faults_hit_every_cell_of_the_matrix() -> None:
    found = plan.faults(200, seed=0)
    signals = {(f.kind, f.where, f.process) for f in found if f.where in PHASES}
    for kind in (plan.KILL, plan.TERM, plan.PAUSE):
        assert {(kind, phase, process) for phase in PHASES for process in (0, 1)} <= signals
    damages = {(f.kind, f.where) for f in found if f.kind in plan.DAMAGES}
    assert damages == {(kind, file) for kind in plan.DAMAGES for file in plan.FILES}


def test_a_fault_that_found_no_occasion_comes_again_next() -> None:
    queue = Queue(plan.faults(40, 0), (plan.KILL, plan.TERM))
    first = queue.take()
    assert first is not None and len(queue) > 2
    queue.back(first)
    assert queue.take() == first


@pytest.mark.parametrize(
    ("status", "again"), [(0, False), (1, False), (2, False), (42, True), (43, True), (44, False),
                          (45, False), (130, False), (137, True), (-9, True), (-6, True)]
)  # fmt: skip
def test_a_launcher_acts_on_the_status(status: int, again: bool) -> None:
    assert starts_again(status) == again


# ------------------------------------------------------------------- damage


def step_on_disk(directory: Path) -> Path:
    step = directory / "8"
    names = ["commit_success.txt", "_CHECKPOINT_METADATA", "meta/metadata", "trainable/_METADATA"]
    names += ["trainable/new.1.q/.zarray", "trainable/new.1.q/0.0.0.0"]
    names += ["trainable/array_metadatas/process_0", "optimizer/mu.new.1.q/0.0.0.0"]
    for name in names:
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(name.encode())
    return step


def test_files_of_a_step_are_told_apart(tmp_path: Path) -> None:
    step = step_on_disk(tmp_path)
    found = {kind: [str(f.relative_to(step)) for f in group] for kind, group in files(step).items()}
    assert set(found) == set(plan.FILES)
    assert found[plan.SHAPES] == ["trainable/new.1.q/.zarray"]
    assert found[plan.TRAINED] == ["trainable/new.1.q/0.0.0.0"]
    assert found[plan.MOMENTS] == ["optimizer/mu.new.1.q/0.0.0.0"]
    assert found[plan.META] == ["meta/metadata"] and found[plan.COMMIT] == ["commit_success.txt"]


@pytest.mark.parametrize("kind", plan.DAMAGES)
def test_damage_changes_a_file_and_is_taken_back(tmp_path: Path, kind: str) -> None:
    file = step_on_disk(tmp_path) / "meta" / "metadata"
    before = file.read_bytes()
    with damaged(file, kind, random.Random(0)):
        found = file.read_bytes() if file.exists() else None
        assert found != before
        assert (found is None) == (kind == plan.DELETED)
        if kind == plan.FLIP:
            assert found is not None and len(found) == len(before)
            assert sum((a ^ b).bit_count() for a, b in zip(found, before, strict=True)) == 1
    assert file.read_bytes() == before


# ------------------------------------------------------------------- phases


class Said:
    """Stands for processes of which nothing counts but what they said."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    def said(self, *parts: str, process: int | None = None) -> str | None:
        return next((part for part in parts if part in self.parts), None)


def test_the_phase_of_a_run_shows_from_outside(tmp_path: Path) -> None:
    outside, group = Outside(tmp_path), Said(READY)

    def shows(phase: str) -> bool:
        return phase_of(group, outside, phase, 0) is not None  # type: ignore[arg-type]

    def log(**record: Any) -> None:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    assert not any(map(shows, (STEP, EVALUATE, SAVE, DELETE)))
    log(kind="train", step=3)
    assert shows(STEP) and not shows(EVALUATE)
    log(kind="eval", step=5, name="old")
    assert shows(EVALUATE) and not shows(STEP)
    log(kind="eval", step=5, name="held")
    assert not shows(EVALUATE)
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    assert shows(SAVE) and outside.committed() == []
    (tmp_path / "checkpoints/4/commit_success.txt").touch()
    assert not shows(SAVE) and outside.committed() == [4]
    (tmp_path / "checkpoints/.deleted-2").mkdir()
    assert shows(DELETE)
    # Before the step is compiled none of it is of this go.
    group.parts = ()
    assert not any(map(shows, (STEP, EVALUATE, SAVE, DELETE)))


# ------------------------------------------------------------------- processes


def test_processes_are_stopped_listened_to_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Python that counts."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ni=0\nwhile :; do i=$((i + 1)); echo at $i; sleep 0.02; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with Group(["train"], 2, tmp_path / "log.txt") as group:
        group.until(lambda: all(group.said("at 3", process=i) for i in (0, 1)), 30)
        group.freeze()
        count = len(group.lines)
        time.sleep(0.2)
        group.pump()
        assert len(group.lines) == count
        group.thaw(but=[1])
        group.until(lambda: len(group.lines) > count, 30)
        assert {line.process for line in group.lines[count:]} == {0}
        group.signal(1, signal.SIGKILL)
        # Those that outlive another are ended too.
        assert group.wait(grace=0.2) == [-signal.SIGKILL] * 2
        with pytest.raises(Ended):
            group.until(lambda: False)
    assert "[1]" in (tmp_path / "log.txt").read_text()


def test_a_disk_can_be_filled(tmp_path: Path) -> None:
    try:
        space = Space(tmp_path / "disk", 2)
    except NoNamespace as error:
        pytest.skip(f"no namespace: {error}")
    with space:
        space.fill(100_000)
        assert space.free <= 110_000
        with pytest.raises(OSError, match="No space left"):
            (space.root / "more").write_bytes(bytes(200_000))
        inside = [*space.prefix, "sh", "-c", f"stat -f -c %T {space.mount}"]
        assert subprocess.run(inside, capture_output=True, text=True).stdout == "tmpfs\n"
        (space.root / "more").unlink()
        space.make_room()
        (space.root / "more").write_bytes(bytes(200_000))
    assert not list((tmp_path / "disk").iterdir())


# ------------------------------------------------------------------- results


def outcome(number: int, **values: Any) -> Outcome:
    fault = Fault(number, plan.KILL, SAVE)
    return Outcome(fault, **{"seen": "recovered", "detected": 1.0 + number, **values})


def results(file: Path) -> Results:
    found = Results(file)
    found.fault(outcome(0))
    found.fault(outcome(1))
    found.swept(damages=4, refused=3, **{"no effect": 1}, wrong=[])
    found.run("run-1", [0, 1], [1, 2, 2, 4], [])
    return found


def test_results_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results(tmp_path / "results.jsonl")
    found = Results(tmp_path / "results.jsonl")
    assert found.compared() == {0, 1} and found.switches() == 2
    row = "| SIGKILL | save | 2 | 2 recovered | 2 of 2 | 0 | 1.5 (2.0) |  |"
    assert row in found.table().splitlines()
    assert found.goals(2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("; met" in line for line in lines)
    assert found.goals(3) == 1


def test_what_is_not_compared_yet_is_left_out_of_a_table(tmp_path: Path) -> None:
    found = results(tmp_path / "results.jsonl")
    found.fault(outcome(2))
    found.fault(outcome(3, wrong=["accepted"]))
    found.only_compared()
    assert set(found.outcomes) == {0, 1, 3}


@pytest.mark.parametrize(
    ("change", "goal"),
    [
        (lambda r: r.fault(outcome(1, lost=2)), "checkpoints lost"),
        (lambda r: r.fault(outcome(1, wrong=["ended with 1"])), "everything else"),
        (lambda r: r.run("run-2", [0], [1], ["the log differs"]), "everything else"),
        (lambda r: r.fault(outcome(2)), "losses and final bits"),
        (lambda r: r.swept(damages=4, refused=4, wrong=["accepted"]), "none accepted"),
    ],
)
def test_what_is_lost_misses_a_goal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, goal: str
) -> None:
    found = results(tmp_path / "results.jsonl")
    change(found)
    assert found.goals(2) == 1
    missed = [line for line in capsys.readouterr().out.splitlines() if "missed" in line]
    assert any(goal in line for line in missed)


def test_the_table_replaces_the_one_in_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        write_table(page, "new")


# ------------------------------------------------------------------- all of it


def chaos(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_another_campaign_is_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"campaign": {"faults": 20, "seed": 1}}\n')
    work = ["--work-directory", str(tmp_path), "--faults", "20"]
    done = chaos(*work, "--seed", "1")
    assert done.returncode == 2 and "--resume goes on with it" in done.stderr
    done = chaos(*work, "--seed", "2", "--resume")
    assert done.returncode == 2 and "is of {'faults': 20, 'seed': 1}" in done.stderr


@pytest.mark.slow
def test_20_faults_and_nothing_is_lost(tmp_path: Path) -> None:
    done = chaos("--faults", "20", "--layouts", "1", "2", "--work-directory", str(tmp_path))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("goal ")]
    assert len(lines) == 5 and all(line.endswith("; met") for line in lines)
    for kind in plan.KINDS:
        assert f"| {kind} |" in done.stdout
