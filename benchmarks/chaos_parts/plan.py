"""Which faults a campaign injects: the same ones for the same number and seed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos_parts.phases import PHASES, STEP

TERM, KILL, PAUSE = "SIGTERM", "SIGKILL", "SIGSTOP, SIGCONT"
DEAD_HOST = "SIGSTOP for good"
STALL = "stalled loader"
NAN, NANS = "NaN", "NaN, too many"
BAD_RECORD = "bad record"
SAVE_FAILS, SAVES_FAIL = "a save fails", "two saves fail"
DISK_FULL = "disk full"
FLIP, CUT, DELETED, ZEROED = "bit flip", "truncated file", "deleted file", "zeroed file"
ALL_DAMAGED = "all steps damaged"
SECOND_WRITER, TAKEOVER = "second writer", "second writer takes over"
OTHER_CONFIG = "changed config"

DAMAGES = (FLIP, CUT, DELETED, ZEROED)
# Of the files of a checkpoint; see `damage.files`.
TRAINED, MOMENTS, SHAPES, META, COMMIT, ORBAX = (
    "an array of weights",
    "an array of the optimizer",
    "shape and dtype of an array",
    "the step's record",
    "the commit file",
    "Orbax's own",
)
FILES = (TRAINED, MOMENTS, SHAPES, META, COMMIT, ORBAX)
# Where the second held-out text's and the first's faults are: the loop that meets them.
TRAINING, AT_REST = "training", "at rest"


@dataclass(frozen=True)
class Fault:
    """number: from 0, its name in the results. where: the phase, or what is damaged.

    process: which one it hits. skip: so many occurrences of the phase
    pass first. draw: of its own choices (a file, a bit).
    """

    number: int
    kind: str
    where: str
    process: int = 0
    skip: int = 0
    draw: int = 0

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def fits(self, layout: int) -> bool:
        """Whether a run in so many processes can take it."""
        return self.process < layout and (layout > 1 or self.kind != DEAD_HOST)

    def random(self) -> random.Random:
        return random.Random(self.draw)


# Kind -> (share of all faults, the cells that they are spread over evenly: where and process).
Cells = list[tuple[str, int]]
_SIGNALS: Cells = [(phase, process) for process in (0, 1) for phase in PHASES]
_KINDS: dict[str, tuple[float, Cells]] = {
    KILL: (0.13, _SIGNALS),
    TERM: (0.1, _SIGNALS),
    PAUSE: (0.2, _SIGNALS),
    DEAD_HOST: (0.02, [(STEP, 0), (STEP, 1)]),
    STALL: (0.02, [(STEP, 0), (STEP, 1)]),
    FLIP: (0.08, [(file, 0) for file in FILES]),
    CUT: (0.08, [(file, 0) for file in FILES]),
    DELETED: (0.08, [(file, 0) for file in FILES]),
    ZEROED: (0.08, [(file, 0) for file in FILES]),
    ALL_DAMAGED: (0.015, [(AT_REST, 0)]),
    BAD_RECORD: (0.02, [(TRAINING, 0)]),
    SAVE_FAILS: (0.04, [("file too large", 0), ("file too large", 1)]),
    SAVES_FAIL: (0.015, [("file too large", 0)]),
    DISK_FULL: (0.02, [("mid-save", 0), ("before a save", 0)]),
    SECOND_WRITER: (0.02, [(TRAINING, 0)]),
    TAKEOVER: (0.015, [(TRAINING, 0)]),
    OTHER_CONFIG: (0.02, [(AT_REST, 0)]),
    NAN: (0.01, [(TRAINING, 0)]),
    NANS: (0.005, [(TRAINING, 0)]),
}
KINDS = tuple(_KINDS)


def faults(number: int, seed: int) -> list[Fault]:
    """At least one of each kind, the others by their shares; in no order."""
    draw = random.Random(seed)
    counts = {kind: max(1, round(share * number)) for kind, (share, _) in _KINDS.items()}
    # What rounding left over or took too much goes to, or comes from, what has the most cells.
    while (missing := number - sum(counts.values())) != 0:
        kind = max((KILL, TERM, PAUSE, *DAMAGES), key=lambda one: counts[one] * -missing)
        if missing < 0:
            kind = max(counts, key=lambda one: counts[one])
            if counts[kind] == 1:
                break
        counts[kind] += 1 if missing > 0 else -1
    found = []
    for kind, count in counts.items():
        cells = _KINDS[kind][1]
        order = [cell for _ in range(-(-count // len(cells))) for cell in _shuffled(cells, draw)]
        for where, process in order[:count]:
            found.append((kind, where, process, draw.randrange(2), draw.randrange(2**31)))
    draw.shuffle(found)
    return [Fault(index, *fields) for index, fields in enumerate(found)]


def _shuffled(cells: Cells, draw: random.Random) -> Cells:
    return draw.sample(cells, len(cells))


class Queue:
    """Faults that wait, of kinds that are injected at the same place of a run's life."""

    def __init__(self, faults: list[Fault], kinds: tuple[str, ...]) -> None:
        self._waiting = deque(fault for fault in faults if fault.kind in kinds)

    def take(self, layout: int | None = None) -> Fault | None:
        """The first one that so many processes can take; None: as many as it likes."""
        for fault in self._waiting:
            if layout is None or fault.fits(layout):
                self._waiting.remove(fault)
                return fault
        return None

    def back(self, fault: Fault) -> None:
        """It found no occasion: it is the next one."""
        self._waiting.appendleft(fault)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._waiting)
