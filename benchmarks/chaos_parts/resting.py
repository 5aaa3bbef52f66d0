"""Faults between two goes of a run: damaged files, and a command that is not the run's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.chaos_parts import plan
from benchmarks.chaos_parts.damage import damage, files
from benchmarks.chaos_parts.lap import Lap
from benchmarks.chaos_parts.plan import Fault
from llamapro_jax import exit_codes
from llamapro_jax.checkpoint_files import read_meta, steps_set_aside
from llamapro_jax.errors import UserError
from llamapro_jax.training.events import SET_ASIDE, read_events

# What a run cannot change between two goes.
_CHANGED: list[dict[str, Any]] = [
    {"optimizer__learning_rate": 0.02},
    {"seed": 7},
    {"data__batch_size": 16},
    {"training__steps": 47},
    {"trainable": ["all"]},
]


def damaged_file(lap: Lap, fault: Fault) -> None:
    """A file of the newest step is damaged. What the next go does with it is judged there."""
    newest, before = lap.outside.committed()[-1], lap.outside.committed()[-2]
    step = lap.outside.checkpoints / str(newest)
    draw = fault.random()
    file = draw.choice(files(step)[fault.where])
    outcome = lap.outcome(fault, lap.layouts[-1])
    outcome.what = f"{file.relative_to(step)} of step {newest}: {damage(file, fault.kind, draw)}"
    lap.expected = [newest, before]
    lap.open.append(outcome)


def judge_damage(lap: Lap, layout: int, began: float, noticed: float | None) -> None:
    """When the next go has begun: what it did about the damage. noticed: when it said so."""
    for outcome in lap.open:
        fault = outcome.fault
        if fault.kind not in plan.DAMAGES:
            continue
        outcome.layout = layout
        if not outcome.lost:
            outcome.seen = "without effect"
            if not _may_have_no_effect(fault) and not outcome.wrong:
                outcome.wrong.append(f"accepted: {outcome.what}")
            continue
        outcome.seen = "refused, then recovered"
        outcome.detected = None if noticed is None else noticed - began
        said = noticed is not None and bool(read_events(lap.outside.directory, SET_ASIDE))
        # Without its commit file a step is one that was never saved.
        if not said and not (fault.where, fault.kind) == (plan.COMMIT, plan.DELETED):
            outcome.wrong.append(f"was not set aside with a word: {outcome.what}")


def _may_have_no_effect(fault: Fault) -> bool:
    """Some of what is stored decides no value. The finished run's bits show whether it did."""
    if (fault.kind, fault.where) == (plan.FLIP, plan.SHAPES):
        return True  # how strongly an array is compressed, say
    return fault.where in (plan.ORBAX, plan.COMMIT)


def all_damaged(lap: Lap, fault: Fault) -> None:
    """Every step is damaged: the run ends with 44, again and again, until somebody has looked."""
    checkpoints = lap.outside.checkpoints
    copy = lap.outside.directory.with_name(f"{lap.name}-copy")
    shutil.copytree(checkpoints, copy)
    draw = fault.random()
    outcome = lap.outcome(fault, 1)
    for number in lap.outside.committed():
        found = files(checkpoints / str(number))
        file = draw.choice(found[draw.choice([plan.META, plan.TRAINED, plan.MOMENTS])])
        damage(file, draw.choice(plan.DAMAGES), draw)
    layout = draw.choice(lap.around.layouts)
    for again in (False, True):
        with lap.start(layout) as group:
            statuses = group.wait(grace=30)
            if not again:
                outcome.detected, outcome.layout = max(_ends(group)) - group.began, layout
                outcome.statuses = statuses
            if statuses != [exit_codes.CHECKPOINT_LOST] * layout:
                outcome.wrong.append(f"ended with {statuses}: {group.last()}")
    if lap.outside.committed() or not steps_set_aside(checkpoints):
        outcome.wrong.append("a damaged step still counts")
    shutil.rmtree(checkpoints)
    copy.rename(checkpoints)
    outcome.seen = "refused, then recovered"
    lap.open.append(outcome)


def _ends(group: Any) -> list[float]:
    return [process.ended_at for process in group.processes]


def other_config(lap: Lap, fault: Fault) -> None:
    """The command with another setting: refused, with the setting's name, nothing written."""
    changes = fault.random().choice(_CHANGED)
    before = _state(lap.outside.directory)
    outcome = lap.outcome(fault, 1)
    with lap.start(1, **changes) as group:
        outcome.statuses = group.wait()
        outcome.detected = max(_ends(group)) - group.began
        name = next(iter(changes)).replace("__", ".")
        outcome.what = name
        refused = outcome.statuses == [exit_codes.REFUSED]
        if not (refused and group.said("other settings") and group.said(f"{name}")):
            outcome.wrong.append(f"ended with {outcome.statuses}: {group.last()}")
    if _state(lap.outside.directory) != before:
        outcome.wrong.append("the run's files changed")
    outcome.seen = "refused"
    lap.open.append(outcome)


def _state(run: Path) -> dict[str, bytes]:
    names = ("run.json", "config.yaml", "metrics.jsonl")
    found = {name: (run / name).read_bytes() for name in names}
    for step in sorted((run / "checkpoints").iterdir()):
        try:
            found[step.name] = read_meta(step)["digest"].encode()
        except UserError:
            found[step.name] = b"damaged"
    return found


AT_REST = {
    **dict.fromkeys(plan.DAMAGES, damaged_file),
    plan.ALL_DAMAGED: all_damaged,
    plan.OTHER_CONFIG: other_config,
}
