"""The campaign: runs, one after the other, that take faults until none is left."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress

from benchmarks.chaos_parts import plan, resting, running
from benchmarks.chaos_parts.group import Ended, Group, Hangs
from benchmarks.chaos_parts.judge import Undisturbed
from benchmarks.chaos_parts.lap import Failed, Lap, Surroundings
from benchmarks.chaos_parts.material import STEPS
from benchmarks.chaos_parts.phases import COMPILE
from benchmarks.chaos_parts.plan import Fault, Queue
from benchmarks.chaos_parts.results import Outcome
from benchmarks.chaos_parts.space import NoNamespace, Space
from llamapro_jax import exit_codes

# Faults of processes that go on, in one go at most.
_DURING = 2
# A step that a run can go on from is damaged when there are so many.
_STEPS_TO_DAMAGE = 3
# A bad record is met within an epoch; later it may not be.
_LAST_BAD_RECORD = 24
# Steps whose loss is NaN: alone, and too many in a row.
_ALONE, _IN_A_ROW = (7, 19), (30, 31, 32)
# Steps of a run that is stopped for what can be done to it at rest.
_BETWEEN_RESTS = 4
_DISK_MEGABYTES = 40
_TRIES = 3


class Campaign:
    """around: what all runs share. say: told of progress."""

    def __init__(self, around: Surroundings, faults: list[Fault], say: Callable[[str], None]):
        self.around, self.say = around, say
        done = around.results.compared()
        left = [fault for fault in faults if fault.number not in done]
        self.at_rest = Queue(left, tuple(resting.AT_REST))
        self.during = Queue(left, tuple(running.DURING))
        special = (plan.STALL, plan.BAD_RECORD, plan.TAKEOVER)
        self.ending = Queue(left, (*running.ENDING, *special))
        self.disk = Queue(left, (plan.DISK_FULL,))
        self.nan = Queue(left, (plan.NAN, plan.NANS))
        self.number = len(around.results.runs)
        self.tries: Counter[int] = Counter()

    def run(self) -> None:
        plain = (self.at_rest, self.during, self.ending, self.disk)
        undisturbed = self.undisturbed("undisturbed") if sum(map(len, plain)) else None
        while undisturbed and len(self.disk):
            self.disk_lap(undisturbed)
        if len(self.nan):
            driver = ["--nan", ",".join(map(str, (*_ALONE, *_IN_A_ROW)))]
            of_nan = self.undisturbed("undisturbed-nan", driver)
            while len(self.nan):
                self.lap(Lap(self.around, self.name(), of_nan, driver), self.nan_go)
        while undisturbed and sum(map(len, plain)):
            self.lap(Lap(self.around, self.name(), undisturbed), self.go)

    def name(self) -> str:
        self.number += 1
        return f"run-{self.number}"

    def undisturbed(self, name: str, driver: list[str] | None = None) -> Undisturbed:
        """The run that the others are compared with, made once: one process, every step saved."""
        directory = self.around.work / "runs" / name
        if not (directory / "summary.json").is_file():
            shutil.rmtree(directory, ignore_errors=True)
            lap = Lap(self.around, name, None, driver or [])  # type: ignore[arg-type]
            changes = {"training__save_every": 1, "training__keep": STEPS + 1}
            with lap.start(1, training__bad_steps=9, **changes) as group:
                statuses = group.wait()
                if statuses != [exit_codes.DONE]:
                    raise Failed(f"the undisturbed run ended with {statuses}:\n{group.last(40)}")
            self.say(f"{name}: {STEPS} steps in {time.monotonic() - group.began:.0f} s")
        return Undisturbed.of(directory)

    # ----------------------------------------------------------------- laps

    def lap(self, lap: Lap, go: Callable[[Lap], bool]) -> None:
        """Goes until the run is finished, which is then compared and removed."""
        shutil.rmtree(self.around.work / "runs" / lap.name, ignore_errors=True)
        try:
            while not go(lap):
                lap.rest()
            lap.finish()
        except (Failed, Hangs) as error:
            lap.problems.append(f"given up: {error or 'nothing moved'}")
            for outcome in lap.open:
                self.around.results.fault(outcome)
            self.around.results.run(lap.name, lap.faults, lap.layouts, lap.problems)
        finally:
            lap.close()
        wrong = self.around.results.runs[-1]["wrong"]
        bits = "; ".join(wrong)[:500] if wrong else "the bits of the undisturbed run"
        self.say(f"{lap.name}: {len(lap.faults)} faults in {lap.goes} starts: {bits}")
        if not wrong:
            shutil.rmtree(self.around.work / "runs" / lap.name, ignore_errors=True)

    def go(self, lap: Lap) -> bool:
        """One go of a run that takes whatever faults wait. Returns whether it is finished."""
        if lap.next is None:
            self.disturb_at_rest(lap)
        layout = lap.next.layout if lap.next else self.layout(lap)
        ending = self.some_ending(lap, layout)
        if ending is not None and ending.kind == plan.BAD_RECORD:
            return self.bad_record(lap, ending, layout)
        during = self.some_during(ending, layout)
        faults = [*during, *([ending] if ending else [])]
        group = lap.next or self.start(lap, faults, layout)
        lap.next = None
        with group:
            waiting = deque([fault for fault in (*during, ending) if fault])
            try:
                self.settle(lap, group)
                while waiting and waiting[0] is not ending:
                    fault = waiting.popleft()
                    act = running.DURING[fault.kind]
                    outcome = self.try_to(lap, group, fault, self.during, act)
                    if outcome and outcome.ended:
                        self.again(waiting, ending)
                        return self.ended_of(lap, group, outcome)
                if waiting and self.end(lap, group, waiting.popleft()):
                    return False
                if ending is None and len(self.at_rest):
                    self.stop(lap, group)
            except Ended:
                self.again(waiting, ending)
            return self.ended(lap, group)

    def stop(self, lap: Lap, group: Group) -> None:
        """No fault, where only those are left that need a run at rest: it is asked to stop."""
        step = lap.outside.last_step() + _BETWEEN_RESTS
        if step < STEPS - _BETWEEN_RESTS:
            group.until(lambda: lap.outside.last_step() >= step)
            group.signal(0, signal.SIGTERM)
            lap.asked_to_stop = True

    def again(self, waiting: deque[Fault], ending: Fault | None) -> None:
        """The processes ended before these had their turn."""
        for fault in reversed(waiting):
            (self.ending if fault is ending else self.during).back(fault)

    def ended_of(self, lap: Lap, group: Group, outcome: Outcome) -> bool:
        """The processes ended of a fault, whose recovery shows in the next go."""
        lap.ended(group)
        lap.open = [outcome]
        return False

    def layout(self, lap: Lap) -> int:
        """Another number of processes than before, that a fault is left for."""
        left = [*self.during, *self.ending]
        others = [n for n in self.around.layouts if n != (lap.layouts or [None])[-1]]
        useful = [n for n in others if any(fault.fits(n) for fault in left)]
        return self.around.draw.choice(useful or others or list(self.around.layouts))

    def some_during(self, ending: Fault | None, layout: int) -> list[Fault]:
        """What comes before the end: while the step is compiled there is a moment for one."""
        if ending is not None and ending.where == COMPILE:
            return []
        found = [fault for _ in range(_DURING) if (fault := self.during.take(layout))]
        compiling = [fault for fault in found if fault.where == COMPILE]
        for fault in compiling[1:]:
            self.during.back(fault)
        return compiling[:1] + [fault for fault in found if fault.where != COMPILE]

    def some_ending(self, lap: Lap, layout: int) -> Fault | None:
        """The next one that this go has an occasion for."""
        steps = lap.outside.committed()
        newest, held, found = steps[-1] if steps else 0, [], None
        while found is None and (fault := self.ending.take(layout)):
            possible = {
                # The text is there after the first go, and its rows are met again in time.
                plan.BAD_RECORD: not lap.next and 0 < newest < _LAST_BAD_RECORD,
                plan.STALL: not lap.next and stall_at(fault, newest) < STEPS - 2,
            }
            if possible.get(fault.kind, True) and not (lap.next and fault.where == COMPILE):
                found = fault
            else:
                held.append(fault)
        for fault in reversed(held):
            self.ending.back(fault)
        return found

    def start(self, lap: Lap, faults: list[Fault], layout: int) -> Group:
        """A cold compilation cache where a fault is about that, and a short-tempered watchdog."""
        changes: dict[str, object] = {"training__watchdog": 120.0}
        driver: list[str] = []
        if any(fault.where == COMPILE for fault in faults):
            cold = self.around.work / "cold"
            shutil.rmtree(cold, ignore_errors=True)
            changes["compilation_cache"] = str(cold)
        if any(fault.kind in (plan.DEAD_HOST, plan.STALL) for fault in faults):
            changes["training__watchdog"] = running.WATCHDOG
        for fault in faults:
            if fault.kind == plan.STALL:
                at = stall_at(fault, max(lap.outside.committed(), default=0))
                driver = ["--stall", str(at), "--of", str(fault.process)]
                lap.stalls_at = at
        return lap.start(layout, driver=driver, **changes)

    def settle(self, lap: Lap, group: Group) -> None:
        lap.settle(group)
        aside = group.said("is damaged and was set aside", process=0)
        resting.judge_damage(lap, group.layout, group.began, aside.time if aside else None)

    def disturb_at_rest(self, lap: Lap) -> None:
        steps = lap.outside.committed()
        if len(steps) < _STEPS_TO_DAMAGE or steps[-1] > STEPS - 6:
            return
        if fault := self.at_rest.take():
            resting.AT_REST[fault.kind](lap, fault)
            self.tell(lap, fault)

    def try_to(
        self,
        lap: Lap,
        group: Group,
        fault: Fault,
        queue: Queue,
        act: Callable[[Lap, Group, Fault], Outcome],
    ) -> Outcome | None:
        """What became of it; None when it found no occasion, and comes again."""
        try:
            outcome = act(lap, group, fault)
        except (Ended, running.TooLate) as error:
            if lap.faults[-1:] == [fault.number]:
                lap.faults.pop()
            self.tries[fault.number] += 1
            if self.tries[fault.number] > _TRIES:
                wrong = [f"found no occasion in {_TRIES} runs"]
                self.around.results.fault(Outcome(fault, seen="never injected", wrong=wrong))
            else:
                queue.back(fault)
            if isinstance(error, Ended):
                raise
            return None
        self.around.results.fault(outcome)
        self.tell(lap, fault)
        return outcome

    def end(self, lap: Lap, group: Group, fault: Fault) -> bool:
        """A fault that ends the processes; its recovery shows in the next go.

        Returns whether it did, and found an occasion.
        """

        def act(lap: Lap, group: Group, fault: Fault) -> Outcome:
            if fault.kind == plan.STALL:
                return running.stalled(lap, group, fault, lap.stalls_at)
            if fault.kind == plan.TAKEOVER:
                return running.takeover(lap, group, fault, self.layout(lap))
            return running.ENDING[fault.kind](lap, group, fault)

        outcome = self.try_to(lap, group, fault, self.ending, act)
        return outcome is not None and not self.ended_of(lap, group, outcome)

    def ended(self, lap: Lap, group: Group) -> bool:
        """When nothing is left to do to it. Returns whether the run is finished."""
        statuses = group.wait()
        lap.ended(group)
        asked, lap.asked_to_stop = lap.asked_to_stop, False
        if any(statuses) and not (asked and statuses == [exit_codes.PREEMPTED] * group.layout):
            lap.went_by_itself(group, statuses)
        return not any(statuses)

    def bad_record(self, lap: Lap, fault: Fault, layout: int) -> bool:
        """A go that reads a damaged row."""

        def start() -> Group:
            group = self.start(lap, [], layout)
            with suppress(Ended):
                self.settle(lap, group)
            return group

        outcome, group = running.bad_record(lap, start, fault)
        if outcome is None:
            lap.ended(group)
            self.ending.back(fault)
            return True
        self.tell(lap, fault)
        return self.ended_of(lap, group, outcome)

    # ----------------------------------------------------------------- other laps

    def disk_lap(self, undisturbed: Undisturbed) -> None:
        """A run on a small disk."""
        mount = self.around.work / "disk"
        try:
            space = Space(mount, _DISK_MEGABYTES)
        except NoNamespace as error:
            self.say(f"no disk that can be filled: {error}")
            while fault := self.disk.take():
                self.around.results.fault(Outcome(fault, seen="impossible", what=str(error)))
            return
        with space:
            changes = {"training__save_every": 6}
            lap = Lap(self.around, self.name(), undisturbed, space=space, changes=changes)
            self.lap(lap, self.disk_go)

    def disk_go(self, lap: Lap) -> bool:
        assert lap.space is not None
        with self.start(lap, [], self.layout(lap)) as group:
            with suppress(Ended):
                self.settle(lap, group)
                group.until(lambda: bool(lap.outside.committed()))
                while fault := self.disk.take():
                    outcome = self.try_to(lap, group, fault, self.disk, running.disk_full)
                    if outcome is None:
                        break
                    if outcome.ended:
                        return self.ended_of(lap, group, outcome)
            return self.ended(lap, group)

    def nan_go(self, lap: Lap) -> bool:
        """The first go meets too many steps whose loss is NaN; the second passes over them."""
        changes = {} if lap.expected is None else {"training__bad_steps": 9}
        with lap.start(self.around.draw.choice(list(self.around.layouts)), **changes) as group:
            with suppress(Ended):
                self.settle(lap, group)
            statuses = group.wait()
            lap.ended(group)
            if not any(statuses):
                return True
            taken = [fault for _ in (*_ALONE, None) if (fault := self.nan.take())]
            alone = iter(_ALONE)
            many = False
            for fault in taken:
                if fault.kind == plan.NAN and (step := next(alone, None)):
                    self.around.results.fault(self.skipped(lap, group, fault, step))
                elif fault.kind == plan.NANS and not many:
                    many = True
                    lap.open.append(self.too_many(lap, group, fault, statuses))
                else:
                    self.nan.back(fault)
                    continue
                self.tell(lap, fault)
            if not many and statuses != [exit_codes.REFUSED] * group.layout:
                lap.went_by_itself(group, statuses)
            return False

    def skipped(self, lap: Lap, group: Group, fault: Fault, step: int) -> Outcome:
        """A step whose update was not taken: the weights are those of the step before."""
        outcome = lap.outcome(fault, group.layout)
        outcome.seen = "update skipped"
        found = lap.undisturbed.checksums
        if found[step] != found[step - 1] or found[step] == found[step + 1]:
            outcome.wrong.append(f"step {step} changed a bit")
        if group.said(f"WARNING: step {step}: loss is nan") is None:
            outcome.wrong.append(f"nothing was said of step {step}")
        return outcome

    def too_many(self, lap: Lap, group: Group, fault: Fault, statuses: list[int]) -> Outcome:
        outcome = lap.outcome(fault, group.layout)
        outcome.seen, outcome.statuses = "refused, then recovered", statuses
        refused = statuses == [exit_codes.REFUSED] * group.layout
        if not (refused and group.said("3 steps in a row gave no usable numbers")):
            outcome.wrong.append(f"ended with {statuses}: {group.last()}")
        found = lap.undisturbed.checksums
        if any(found[step] != found[_IN_A_ROW[0] - 1] for step in _IN_A_ROW):
            outcome.wrong.append(f"a step of {_IN_A_ROW} changed a bit")
        return outcome

    # ----------------------------------------------------------------- telling

    def tell(self, lap: Lap, fault: Fault) -> None:
        step = lap.outside.last_step()
        self.say(f"{lap.name}, step {step}: {fault.kind}, {fault.where}")


def stall_at(fault: Fault, newest: int) -> int:
    """The step whose rows never come, in a go that goes on from step `newest`."""
    return newest + 5 + fault.skip
