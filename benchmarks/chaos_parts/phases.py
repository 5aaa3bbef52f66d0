"""Where a run is, as it shows from outside: its log, its checkpoints, what jax says.

A phase is hit for sure: all processes are stopped when it shows, it is looked again, and only when
it still holds is the fault injected. Else they go on until it shows once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos_parts.group import Ended, Group
from benchmarks.chaos_parts.material import EVAL_EVERY, HELD_OUT, SAVE_EVERY
from llamapro_jax.checkpoint_files import COMMIT_FILE

COMPILE, STEP, EVALUATE, SAVE, DELETE = "compile", "step", "evaluation", "save", "delete"
PHASES = (COMPILE, STEP, EVALUATE, SAVE, DELETE)
READY = "compiled the step in"
GOES_ON = "going on from step"


class Outside:
    """What shows of a run. directory: as this process sees it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoints = directory / "checkpoints"

    def last_record(self) -> dict[str, Any] | None:
        """The newest whole line of the log."""
        try:
            with (self.directory / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().split(b"\n")[:-1]
            return json.loads(lines[-1]) if lines else None
        except (OSError, ValueError):
            return None

    def last_step(self) -> int:
        """The newest step in the log."""
        record = self.last_record()
        return record["step"] if record else 0

    def half_saved(self) -> str | None:
        return next((n for n in self._names() if n.isdecimal() and not self._committed(n)), None)

    def half_deleted(self) -> str | None:
        return next((name for name in self._names() if name.startswith(".deleted-")), None)

    def committed(self) -> list[int]:
        names = [name for name in self._names() if name.isdecimal() and self._committed(name)]
        return sorted(map(int, names))

    def _committed(self, name: str) -> bool:
        return (self.checkpoints / name / COMMIT_FILE).exists()

    def _names(self) -> Iterator[str]:
        try:
            yield from (entry.name for entry in self.checkpoints.iterdir())
        except OSError:
            return


def phase_of(group: Group, outside: Outside, phase: str, process: int) -> str | None:
    """A name for this occurrence of the phase, or None when the run is not in it."""
    if phase == COMPILE:
        return _compiling(group, process)
    if group.said(READY, process=0) is None:
        return None
    if phase == SAVE:
        return outside.half_saved()
    if phase == DELETE:
        return outside.half_deleted()
    record = outside.last_record()
    if record is None:
        return None
    step = record["step"]
    if phase == EVALUATE:
        # The first text's losses are in the log, those of the second are not.
        under_way = record["kind"] == "eval" and record["name"] == HELD_OUT[0]
        return str(step) if under_way else None
    assert phase == STEP
    between = step % SAVE_EVERY and step % EVAL_EVERY
    return str(step) if record["kind"] == "train" and between else None


def _compiling(group: Group, process: int) -> str | None:
    """Between the lines that jax writes when it begins to compile the step, and when it has."""
    if group.said(GOES_ON, "step 0/", process=0) is None:
        return None
    begun = sum("Compiling jit(step)" in line.text for line in group.lines_of(process))
    done = sum("XLA compilation of jit(step)" in line.text for line in group.lines_of(process))
    return str(begun) if begun > done else None


def reach(group: Group, outside: Outside, phase: str, process: int, skip: int = 0) -> None:
    """Returns with all processes stopped in the phase, in its occurrence after `skip` others.

    Raises Ended when the run ends before.
    """
    seen: set[str] = set()

    def shows() -> bool:
        name = phase_of(group, outside, phase, process)
        if name is not None:
            seen.add(name)
        return name is not None and len(seen) > skip

    while True:
        group.until(shows)
        group.freeze()
        if not group.pump():
            raise Ended
        if shows():
            return
        group.thaw()
