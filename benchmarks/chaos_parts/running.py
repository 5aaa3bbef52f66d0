"""Faults of processes that run: signals in a phase, a stall, a full disk, a second writer."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from benchmarks.chaos_parts import plan
from benchmarks.chaos_parts.damage import records
from benchmarks.chaos_parts.group import GRACE, GRACE_KILLED, PATIENCE, Ended, Group
from benchmarks.chaos_parts.lap import Lap
from benchmarks.chaos_parts.material import STEPS
from benchmarks.chaos_parts.phases import COMPILE, READY, STEP, reach
from benchmarks.chaos_parts.plan import Fault
from benchmarks.chaos_parts.results import Outcome
from llamapro_jax import exit_codes
from llamapro_jax.checkpoint_files import ITEMS, read_meta
from llamapro_jax.training.lease import RENEW, REQUEST_FILE

# Seconds that a process is stopped, without anybody ending it.
_PAUSES = (0.5, 3.0)
# `training.watchdog` where it is to end a run.
WATCHDOG = 10.0
# So many steps before the end no fault is begun.
_MARGIN = 4
NOT_SAVED = "could not be saved"


class TooLate(Exception):
    """The run is nearly finished."""


def hit(lap: Lap, group: Group, fault: Fault, phase: str) -> int:
    """Stops all processes in the phase. Returns the number of the process to do something to."""
    if lap.outside.last_step() > STEPS - _MARGIN:
        raise TooLate
    reach(group, lap.outside, phase, fault.process, 0 if phase == COMPILE else fault.skip)
    if lap.outside.last_step() > STEPS - _MARGIN:
        group.thaw()
        raise TooLate
    return fault.process


def goes_on(lap: Lap, group: Group) -> float:
    """Seconds until the next step is in the log, or the step is compiled."""
    began, step = time.monotonic(), lap.outside.last_step()
    ready = group.said(READY, process=0)

    def moved() -> bool:
        if ready is None:
            return group.said(READY, process=0) is not None
        return lap.outside.last_step() > step

    group.until(moved)
    return time.monotonic() - began


# ------------------------------------------------------------------- the processes go on


def pause(lap: Lap, group: Group, fault: Fault) -> Outcome:
    """One process is stopped for a while, the others go on until they wait for it."""
    process = hit(lap, group, fault, fault.where)
    outcome = lap.outcome(fault, group.layout)
    seconds = fault.random().choice(_PAUSES)
    group.thaw(but=[process])
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not group.pump():
            break
        time.sleep(0.05)
    group.thaw()
    outcome.recovered = goes_on(lap, group)
    outcome.seen, outcome.what = "survived", f"{seconds:g} s"
    return outcome


def save_fails(lap: Lap, group: Group, fault: Fault) -> Outcome:
    """No large file can be written, by one process, until a save has failed of it."""
    process = hit(lap, group, fault, STEP)
    outcome = lap.outcome(fault, group.layout)
    began, before = time.monotonic(), group.times_said(NOT_SAVED)
    group.limit_files([process])
    group.thaw()
    group.until(lambda: group.times_said(NOT_SAVED) > before)
    outcome.detected = time.monotonic() - began
    group.limit_files([])
    return saves_again(lap, group, outcome)


def saves_again(lap: Lap, group: Group, outcome: Outcome) -> Outcome:
    """After a save that failed, and now could be written: the next one is, or has failed too."""
    began, newest = time.monotonic(), lap.outside.committed()[-1:]
    try:
        group.until(lambda: lap.outside.committed()[-1:] > newest)
        outcome.recovered = time.monotonic() - began
        outcome.seen = "survived"
    except Ended:  # the next save, or the log, was faster than who made room
        refused(group, outcome)
    return outcome


def refused(group: Group, outcome: Outcome) -> None:
    """The processes have ended, of what the system did not give."""
    outcome.ended, outcome.statuses = True, group.wait()
    outcome.seen = "refused, then recovered"
    _expect(outcome, group, outcome.statuses == [exit_codes.REFUSED] * group.layout)


def disk_full(lap: Lap, group: Group, fault: Fault) -> Outcome:
    """The disk has room for the log, and not for a step: before it is begun, or on its way."""
    assert lap.space is not None
    hit(lap, group, fault, STEP)
    while lap.outside.half_saved() or lap.outside.half_deleted():
        group.thaw()
        time.sleep(0.01)
        hit(lap, group, fault, STEP)
    outcome = lap.outcome(fault, group.layout)
    needed = _bytes_of_a_step(lap)
    lap.space.fill(needed // 2 if fault.where == "before a save" else needed + 100_000)
    began, before = time.monotonic(), group.times_said(NOT_SAVED)
    group.thaw()
    try:
        group.until(lambda: group.times_said(NOT_SAVED) > before)
        outcome.detected = time.monotonic() - began
    except Ended:
        refused(group, outcome)
        outcome.detected = time.monotonic() - began
    lap.space.make_room()
    return outcome if outcome.ended else saves_again(lap, group, outcome)


def _bytes_of_a_step(lap: Lap) -> int:
    """Of its arrays, as the run itself looks for room."""
    newest = lap.outside.checkpoints / str(lap.outside.committed()[-1])
    leaves = read_meta(newest)["leaves"]
    shapes = [leaf["shape"] for item in ITEMS for leaf in leaves[item].values()]
    sizes = [4] * len(shapes)
    for place, shape in enumerate(shapes):
        for size in shape:
            sizes[place] *= size
    return sum(sizes)


def second_writer(lap: Lap, group: Group, fault: Fault) -> Outcome:
    """The same command again while the first is at work: it is refused."""
    hit(lap, group, fault, STEP)
    outcome = lap.outcome(fault, group.layout)
    with lap.start(1) as second:
        statuses = second.wait()
        outcome.detected = time.monotonic() - second.began
        outcome.statuses = statuses
        told = second.said("another process trains here") is not None
        if statuses != [exit_codes.REFUSED] or not told:
            outcome.wrong.append(f"the second ended with {statuses}: {second.last()}")
    group.thaw()
    outcome.recovered = goes_on(lap, group)
    outcome.seen = "refused"
    return outcome


# ------------------------------------------------------------------- the processes end


def end_by_signal(lap: Lap, group: Group, fault: Fault) -> Outcome:
    """SIGKILL or SIGTERM to one process. After SIGTERM what was done is saved by all."""
    process = hit(lap, group, fault, fault.where)
    outcome = lap.outcome(fault, group.layout)
    newest, step = lap.outside.committed()[-1:], lap.outside.last_step()
    kill = fault.kind == plan.KILL
    began = time.monotonic()
    group.signal(process, signal.SIGKILL if kill else signal.SIGTERM)
    group.thaw()
    outcome.statuses = group.wait(GRACE_KILLED if kill else GRACE)
    outcome.detected = time.monotonic() - began
    saved = lap.outside.committed()[-1:]
    if kill:
        _expect(outcome, group, outcome.statuses[process] == -signal.SIGKILL)
    else:
        _expect(outcome, group, outcome.statuses == [exit_codes.PREEMPTED] * group.layout)
        if fault.where != COMPILE and saved < [step]:
            outcome.wrong.append(f"step {step} was done, and the newest saved is {saved}")
    outcome.lost = int(saved < newest)
    outcome.again = max(0, step - (saved[0] if saved else 0))
    outcome.seen = "recovered"
    return outcome


def dead_host(lap: Lap, group: Group, fault: Fault) -> Outcome:
    """One process stands for ever: the watchdogs of the others end them."""
    process = hit(lap, group, fault, STEP)
    outcome = lap.outcome(fault, group.layout)
    began = time.monotonic()
    group.thaw(but=[process])
    outcome.statuses = group.wait(GRACE_KILLED)
    outcome.detected = min(p.ended_at or 0.0 for p in group.processes) - began
    others = [status for i, status in enumerate(outcome.statuses) if i != process]
    _expect(outcome, group, set(others) == {exit_codes.STALLED})
    outcome.seen = "recovered"
    return outcome


def stalled(lap: Lap, group: Group, fault: Fault, step: int) -> Outcome:
    """The loader of one process never gives the rows of a step: see `driver.stall`."""
    group.until(lambda: lap.outside.last_step() >= step - 1)
    outcome = lap.outcome(fault, group.layout)
    began = time.monotonic()
    outcome.statuses = group.wait()
    outcome.detected = min(p.ended_at or 0.0 for p in group.processes) - began
    _expect(outcome, group, set(outcome.statuses) == {exit_codes.STALLED})
    if group.said(f"while taking step {step} ", "while saving step", "while evaluating") is None:
        outcome.wrong.append(f"nothing says what it hung in: {group.last()}")
    outcome.seen = "recovered"
    return outcome


def saves_fail(lap: Lap, group: Group, fault: Fault) -> Outcome:
    """No large file can be written any more: the second save in a row that fails ends the run."""
    hit(lap, group, fault, STEP)
    outcome = lap.outcome(fault, group.layout)
    began = time.monotonic()
    group.limit_files(range(group.layout))
    group.thaw()
    group.wait()
    outcome.detected = time.monotonic() - began
    refused(group, outcome)
    _expect(outcome, group, group.said("could not be written") is not None)
    return outcome


def bad_record(lap: Lap, start: Callable[[], Group], fault: Fault) -> tuple[Outcome | None, Group]:
    """A bit of a row of the training text is another.

    No outcome when the run ended without reading it. Returns also the processes, which have ended.
    """
    file = records(lap.outside.directory)
    draw = fault.random()
    data = file.read_bytes()
    rows = len(data[:60_000].rstrip(b"\0"))  # the first of its blocks has all
    place = draw.randrange(rows // 20, rows)
    try:
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with start() as group:
            began = time.monotonic()
            statuses = group.wait()
            if not any(statuses):
                return None, group
            outcome = lap.outcome(fault, group.layout)
            outcome.detected = time.monotonic() - began
            refused(group, outcome)
            named = group.said("cannot be read", "prepare it again", "is damaged")
            _expect(outcome, group, named is not None)
            outcome.what = f"byte {place} of {file.name}"
            return outcome, group
    finally:
        file.write_bytes(data)


def takeover(lap: Lap, group: Group, fault: Fault, layout: int) -> Outcome:
    """The same command with --takeover: the first one stops, the second goes on.

    The first one is stopped until the second has asked, and until its own next look is due; else it
    would be done before the second has started.
    """
    hit(lap, group, fault, STEP)
    outcome = lap.outcome(fault, group.layout)
    began = time.monotonic()
    lap.next = second = lap.start(layout, ["--takeover"])
    request = lap.outside.directory / REQUEST_FILE
    try:
        second.until(lambda: request.exists() and time.monotonic() > began + RENEW + 1)
    except Ended:
        outcome.wrong.append(f"the second ended with {second.status()}: {second.last()}")
    began = time.monotonic()
    group.thaw()
    while group.pump() and time.monotonic() < began + PATIENCE:
        second.pump()  # both write, and both are to be read
        time.sleep(0.01)
    outcome.statuses = group.wait()
    outcome.detected = time.monotonic() - began
    _expect(outcome, group, outcome.statuses == [exit_codes.TAKEN_OVER] * group.layout)
    outcome.seen = "recovered"
    return outcome


def _expect(outcome: Outcome, group: Group, holds: bool) -> None:
    if not holds:
        outcome.wrong.append(f"ended with {outcome.statuses}: {group.last()}")


DURING = {plan.PAUSE: pause, plan.SAVE_FAILS: save_fails, plan.SECOND_WRITER: second_writer}
ENDING = {
    plan.KILL: end_by_signal,
    plan.TERM: end_by_signal,
    plan.DEAD_HOST: dead_host,
    plan.SAVES_FAIL: saves_fail,
}
