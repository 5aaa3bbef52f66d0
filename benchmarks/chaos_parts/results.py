"""What became of the faults: kept line by line, and shown as one table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_parts.plan import KINDS, Fault

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


@dataclass
class Outcome:
    """What became of a fault.

    seen: `recovered`, `survived` (the processes went on), `refused`, `without effect` or
    `impossible` (not on this machine). statuses: of all processes, where they ended. detected,
    recovered: seconds; until the processes had ended, or had refused; and from the next start until
    the step was compiled, or, of processes that went on, until the next step. ended: whether
    processes ended that might have gone on. lost: checkpoints, newer than the one that the run goes
    on from. again: steps that are taken once more. wrong: what should
    not be.
    """

    fault: Fault
    seen: str = ""
    layout: int = 1
    statuses: list[int] = field(default_factory=list)
    detected: float | None = None
    recovered: float | None = None
    ended: bool = False
    lost: int = 0
    again: int | None = None
    what: str = ""
    wrong: list[str] = field(default_factory=list)


class Results:
    """A file of JSON lines: faults as they are done, and runs as they are compared."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.outcomes: dict[int, Outcome] = {}
        self.runs: list[dict[str, Any]] = []
        self.sweep: dict[str, Any] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        if "sweep" in record:
            self.sweep = record["sweep"]
        elif "run" in record:
            self.runs.append(record)
        elif "outcome" in record:
            outcome = Outcome(**record["outcome"])
            outcome.fault = Fault(**record["outcome"]["fault"])
            self.outcomes[outcome.fault.number] = outcome

    def _write(self, record: dict[str, Any]) -> None:
        self._take(record)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def fault(self, outcome: Outcome) -> None:
        self._write({"outcome": {**vars(outcome), "fault": outcome.fault.json()}})

    def run(self, name: str, faults: Iterable[int], layouts: list[int], wrong: list[str]) -> None:
        self._write({"run": name, "faults": list(faults), "layouts": layouts, "wrong": wrong})

    def swept(self, **values: Any) -> None:
        self._write({"sweep": values})

    def only_compared(self) -> None:
        """Of a campaign that is under way: leaves out what still has to be compared."""
        done = self.compared()
        self.outcomes = {
            number: outcome
            for number, outcome in self.outcomes.items()
            if number in done or outcome.wrong or outcome.seen == "impossible"
        }

    # ----------------------------------------------------------------- what it comes to

    def compared(self) -> set[int]:
        """Faults of runs that were compared with the undisturbed one: what need not be repeated."""
        return {number for run in self.runs for number in run["faults"]}

    def equal(self) -> set[int]:
        """Faults of runs that have its bits."""
        return {number for run in self.runs if not run["wrong"] for number in run["faults"]}

    def wrong(self) -> list[str]:
        """Everything that should not be."""
        found = [
            f"fault {number} ({outcome.fault.kind}, {outcome.fault.where}): {problem}"
            for number, outcome in sorted(self.outcomes.items())
            for problem in outcome.wrong
        ]
        found += [f"run {run['run']}: {problem}" for run in self.runs for problem in run["wrong"]]
        return found + list(self.sweep.get("wrong", ()))

    def switches(self) -> int:
        """How often a run went on in another number of processes than before."""
        return sum(
            before != after
            for run in self.runs
            for before, after in zip(run["layouts"], run["layouts"][1:], strict=False)
        )

    def table(self) -> str:
        lines = [
            "| fault | where | times | what was seen | bits equal | checkpoints lost, at most | "
            "s until noticed, median (max) | s until it trains again, median (max) |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows: dict[tuple[str, str], list[Outcome]] = {}
        for outcome in self.outcomes.values():
            rows.setdefault((outcome.fault.kind, outcome.fault.where), []).append(outcome)
        order = {kind: place for place, kind in enumerate(KINDS)}
        for (kind, where), group in sorted(rows.items(), key=lambda row: (order[row[0][0]], row)):
            lines.append(self._row(kind, where, group))
        return "\n".join(lines)

    def _row(self, kind: str, where: str, group: list[Outcome]) -> str:
        seen = sorted({outcome.seen for outcome in group})
        counted = [f"{sum(o.seen == what for o in group)} {what}" for what in seen]
        done = [o for o in group if o.seen != "impossible"]
        equal = sum(o.fault.number in self.equal() for o in done)
        lost = max([0, *(o.lost for o in done)])
        cells = [
            kind,
            where,
            str(len(group)),
            ", ".join(counted),
            f"{equal} of {len(done)}",
            str(lost),
            _seconds(o.detected for o in done),
            _seconds(o.recovered for o in done),
        ]
        return f"| {' | '.join(cells)} |"

    def goals(self, wanted: int) -> int:
        """Prints each with what was measured. Returns the exit status."""
        done = [o for o in self.outcomes.values() if o.seen != "impossible"]
        lost = max((o.lost for o in done), default=0)
        wrong = self.wrong()
        equal = sum(o.fault.number in self.equal() for o in done)
        refused, no_effect = self.sweep.get("refused", 0), self.sweep.get("no effect", 0)
        goals = [
            ("faults injected", f"at least {wanted}", f"{len(done)}", len(done) >= wanted),
            (
                "faults after which losses and final bits are those of the undisturbed run",
                f"all {len(done)}",
                f"{equal}",
                equal == len(done),
            ),
            (
                "checkpoints lost by a fault",
                "at most the newest, 1",
                f"{lost}",
                lost <= 1,
            ),
            (
                "damaged files of a step, restored one by one: none accepted",
                "0",
                f"{len(self.sweep.get('wrong', ()))} ({refused} refused, {no_effect} no effect)",
                not self.sweep.get("wrong") and refused > 0,
            ),
            ("everything else that should not be", "0", f"{len(wrong)}", not wrong),
        ]
        for name, goal, measured, met in goals:
            print(f"goal {name}: {goal}; measured {measured}; {'met' if met else 'missed'}")
        for problem in wrong:
            print(f"  {problem}")
        return 0 if all(met for *_, met in goals) else 1


def _seconds(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.1f} ({max(found):.1f})" if found else ""


def write_table(file: Path, text: str) -> None:
    """Puts it between the two marks in a page."""
    page = file.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file}: has no lines {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
