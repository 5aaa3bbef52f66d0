"""One run, from its first start until it is finished, and what disturbs it on the way."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_parts.group import Ended, Group, starts_again
from benchmarks.chaos_parts.judge import Undisturbed
from benchmarks.chaos_parts.material import Material, overrides
from benchmarks.chaos_parts.phases import GOES_ON, READY, Outside
from benchmarks.chaos_parts.plan import DAMAGES, Fault
from benchmarks.chaos_parts.results import Outcome, Results
from benchmarks.chaos_parts.space import Space
from llamapro_jax.exit_codes import STALLED

_STEP = re.compile(re.escape(GOES_ON) + r" (\d+)")


# So often the watchdog may end processes that were only slow.
_STALLS = 4


class Failed(Exception):
    """The run does what it must not, and cannot be brought to its end."""


@dataclass
class Surroundings:
    """What all laps share. layouts: numbers of processes, each as often as it is to be chosen."""

    work: Path
    material: Material
    results: Results
    layouts: Sequence[int]
    draw: random.Random

    def logs(self) -> Path:
        directory = self.work / "logs"
        directory.mkdir(exist_ok=True)
        return directory


@dataclass
class Lap:
    """A run and its goes.

    expected: the steps that the next go may go on from, the newest one first; None: any, as of a
    run that has no step yet. open: faults whose outcome shows in the next go. next: processes that
    run already, and are the next go. by_itself: how often processes ended that nothing was done
    to. stalls_at: the step that a driver's loader stalls at. asked_to_stop: whether this go was,
    which is no fault.
    """

    around: Surroundings
    name: str
    undisturbed: Undisturbed
    driver: Sequence[str] = ()
    space: Space | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    layouts: list[int] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    open: list[Outcome] = field(default_factory=list)
    expected: list[int] | None = None
    next: Group | None = None
    goes: int = 0
    by_itself: int = 0
    stalls_at: int = 0
    asked_to_stop: bool = False
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        under = self.space.mount if self.space else self.around.work / "runs"
        seen = self.space.root if self.space else under
        self.directory = under / self.name
        self.outside = Outside(seen / self.name)

    # ----------------------------------------------------------------- goes

    def start(
        self,
        layout: int,
        options: Sequence[str] = (),
        driver: Sequence[str] = (),
        **changes: Any,
    ) -> Group:
        """The command of this run once more. changes: settings for this go alone."""
        self.goes += 1
        work = self.around.work
        empty = work / "empty.yaml"
        empty.write_text("{}\n")
        settings = self.around.material.settings(self.directory, **self.changes, **changes)
        return Group(
            ["train", str(empty), *overrides(settings), *options],
            layout,
            self.around.logs() / f"{self.name}-{self.goes}.txt",
            driver=[*self.driver, *driver],
            prefix=self.space.prefix if self.space else (),
        )

    def settle(self, group: Group) -> None:
        """When the processes go on: whether they do so from where they should."""
        self.layouts.append(group.layout)
        if self.expected is None:
            return
        group.until(lambda: group.said(GOES_ON, process=0) is not None)
        line = group.said(GOES_ON, process=0)
        found = _STEP.search(line.text) if line else None
        assert found is not None
        step = int(found[1])
        for outcome in self.open:
            if outcome.fault.kind in DAMAGES:
                outcome.lost = sum(step < saved for saved in self.expected)
            if step not in self.expected:
                outcome.wrong.append(f"goes on from step {step}, not one of {self.expected}")
        if step not in self.expected and not self.open:
            self.problems.append(f"goes on from step {step}, not one of {self.expected}")
        self.expected = None

    def rest(self) -> None:
        """When all processes have ended: what is saved has the bits of the undisturbed run."""
        steps = self.outside.committed()
        self.expected = steps[-1:] or None
        for step in steps if self.next is None else ():
            wrong = self.undisturbed.differs_at(self.outside.directory, step)
            if wrong is not None:
                self.problems.append(wrong)

    def ended(self, group: Group) -> None:
        """Notes the time to recover of what this go recovered from."""
        ready = group.said(READY, process=0)
        for outcome in self.open:
            if ready is not None and outcome.recovered is None:
                outcome.recovered = ready.time - group.began
            self.around.results.fault(outcome)
        self.open = []

    def went_by_itself(self, group: Group, statuses: list[int]) -> None:
        """Processes ended that nothing was done to."""
        self.by_itself += 1
        if set(statuses) == {STALLED} and self.by_itself < _STALLS:
            return  # a short `training.watchdog`, and a machine that does other work
        self.problems.append(f"ended by itself with {statuses}: {group.last()}")
        if self.by_itself > 2 or not starts_again(group.status()):
            raise Failed(self.problems[-1])

    # ----------------------------------------------------------------- faults

    def outcome(self, fault: Fault, layout: int) -> Outcome:
        """Of a fault that was injected into this run."""
        self.faults.append(fault.number)
        return Outcome(fault, layout=layout)

    def finish(self) -> None:
        """Compares the finished run with the undisturbed one."""
        for outcome in self.open:
            self.around.results.fault(outcome)
        self.open = []
        run = self.outside.directory
        if self.space is not None:  # TensorStore would look for it outside of the namespace
            run = self.around.work / "runs" / self.name
            shutil.copytree(self.outside.directory, run)
        wrong = self.problems + self.undisturbed.differs(run)
        self.around.results.run(self.name, self.faults, self.layouts, wrong)

    def close(self) -> None:
        if self.next is not None:
            with suppress(Ended):
                self.next.__exit__(None, None, None)
            self.next = None
