"""Keeps a run on a queued resource going until it is done, or until going on would not help.

A state machine without a memory of its own: at each turn it asks Google how the request stands and
the hosts how training stands, and does the one next thing. So it can be ended and started at any
time, on any machine, and the run on the hosts does not notice.

    ABSENT                        create
    waiting, leaving              wait
    SUSPENDED, FAILED             delete (then it is ABSENT)
    FAILED for want of room       the same, each time after a longer pause
    ACTIVE, nothing on the hosts  set up and start
            running               wait
            ended, worth it       start again; hosts that run do not mind
            ended, not worth it   delete, and end with the run's status
            not to be reached     after a while: delete

What is worth another start says `exit_codes.worth_restarting`. Starts in a row after none of which
a newer step was saved are counted, and end it when there are more than the budget. From the first
restart on, starts take the output over (`train --takeover`): of hosts that were lost one may hang
and keep its lock. Therefore a run that was itself taken over, 45, is never started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llamapro_jax import exit_codes
from llamapro_jax.errors import UserError
from llamapro_jax.launch.gcloud import GcloudError, Kind, kind_of
from llamapro_jax.launch.queued_resource import ABSENT, GONE, LEAVING, WAITING, Report, State

NOT_BEGUN = ("none", "installed")
_LONGEST_PAUSE = 600


class Cloud(Protocol):
    """What the supervisor does to the world. `launch.tpu` has the real one.

    create, delete, setup_and_start and start may raise GcloudError.
    take_over: from now on starts end whatever else trains in the output.
    starts_itself: the hosts start training at boot, by their start-up script.
    """

    starts_itself: bool

    def take_over(self) -> None: ...
    def state(self) -> State: ...
    def create(self) -> None: ...
    def delete(self) -> None: ...
    def hosts(self, state: State) -> int: ...
    def reports(self) -> list[Report]: ...
    def setup_and_start(self) -> None: ...
    def start(self) -> None: ...
    def last_words(self) -> str: ...


@dataclass(frozen=True)
class Patience:
    """poll: seconds between two turns. The rest are numbers of turns, or of events, in a row.

    restarts: starts and new resources without a newer step saved.
    unreachable: turns in which not all hosts answer, until the resource is thought broken.
    installing: turns that the hosts may take from ACTIVE until training runs.
    apart: turns in which some hosts run and others do not. They end each other in two minutes.
    tries: calls of gcloud that fail, or requests for which there is no room, until somebody has to
        look.
    """

    poll: float = 60
    restarts: int = 10
    unreachable: int = 20
    installing: int = 45
    apart: int = 5
    tries: int = 30


class Supervisor:
    def __init__(
        self,
        cloud: Cloud,
        name: str,
        patience: Patience,
        keep: bool = False,
        say: Callable[[str], None] = print,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._cloud, self._name, self._patience, self._keep = cloud, name, patience, keep
        self._say, self._sleep = say, sleep
        self._saved = -1
        self._restarts = self._failures = self._crowded = 0
        self._turns = {"unreachable": 0, "installing": 0, "apart": 0}
        self._said = ""

    def run(self) -> int:
        """Returns the run's exit status, FAILED when the budget of restarts is used up.

        Raises UserError when gcloud refuses, or has failed for too long.
        """
        while True:
            pause = self._patience.poll
            try:
                status = self._turn()
                self._failures = 0
                if status is not None:
                    return status
            except GcloudError as error:
                pause = self._after(error)
            self._sleep(pause)

    def _turn(self) -> int | None:
        """One look, and the one thing to do about it. The exit status when it is over."""
        state = self._cloud.state()
        if state.name == ABSENT:
            self._tell(f"{self._name} does not exist: creating it")
            self._cloud.create()
        elif state.name in WAITING or state.name in LEAVING:
            self._tell(f"{self._name} is {state.name}")
        elif state.name in GONE:
            if state.name == "FAILED" and kind_of(state.error) is Kind.NO_ROOM:
                self._cloud.delete()
                raise GcloudError(("create", self._name), 1, state.error, Kind.NO_ROOM)
            because = f" ({state.error})" if state.error else ""
            return self._renew(f"{self._name} is {state.name}{because}")
        elif state.name == "ACTIVE":
            self._crowded = 0
            return self._look_at_hosts(state)
        else:
            self._tell(f"{self._name} is {state.name}, which is not known here; waiting")
        return None

    # --------------------------------------------------------------- hosts

    def _look_at_hosts(self, state: State) -> int | None:
        try:
            expected = self._cloud.hosts(state)
            reports = self._cloud.reports()
        except GcloudError as error:
            if error.kind is Kind.REFUSED:
                raise
            return self._unreachable(error.said)
        self._note_progress(reports)
        ended = self._ended_for_good(reports)
        if ended is not None:
            return self._finish(ended)
        if len(reports) < expected:
            return self._unreachable(f"{len(reports)} of {expected} hosts answer")
        self._turns["unreachable"] = 0
        states = {report.state for report in reports}
        if "installing" in states or (self._cloud.starts_itself and states & set(NOT_BEGUN)):
            return self._installing(reports)
        self._turns["installing"] = 0
        if states == {"running"}:
            self._turns["apart"] = 0
            saved = f", step {self._saved} saved" if self._saved >= 0 else ""
            self._tell(f"{self._name}: training runs on {expected} host(s){saved}")
            return None
        if "running" in states:
            self._turns["apart"] += 1
            if self._turns["apart"] <= self._patience.apart:
                self._tell(f"{self._name}: not all hosts run: {_listed(reports)}")
                return None
        self._turns["apart"] = 0
        if states <= set(NOT_BEGUN):
            self._tell(f"{self._name} is ACTIVE: setting up {expected} host(s) and starting")
            self._cloud.setup_and_start()
            return None
        return self._start_again(reports)

    def _ended_for_good(self, reports: Sequence[Report]) -> int | None:
        """The status of a run that is over, None of one that is not, or is worth another start."""
        states = {report.state for report in reports}
        if "running" not in states:
            # Before all else: another start would end the run that goes on.
            if any(report.status == exit_codes.TAKEN_OVER for report in reports):
                return exit_codes.TAKEN_OVER
            if "stopped" in states:
                return exit_codes.PREEMPTED
        if states != {"ended"}:
            return None
        # All processes of a run end with the same status. Where one died, or was started alone
        # after its host was, they do not, and the next start tells.
        statuses = [exit_codes.FAILED if r.status is None else r.status for r in reports]
        return None if any(map(exit_codes.worth_restarting, statuses)) else max(statuses)

    def _start_again(self, reports: Sequence[Report]) -> int | None:
        if any(report.status == exit_codes.TAKEN_OVER for report in reports):
            return self._finish(exit_codes.TAKEN_OVER)
        if not self._may_go_on(f"{self._name}: training does not run: {_listed(reports)}"):
            return self._finish(exit_codes.FAILED)
        if any(report.state in NOT_BEGUN for report in reports):
            self._cloud.setup_and_start()
        else:
            self._cloud.start()
        return None

    def _installing(self, reports: Sequence[Report]) -> int | None:
        self._turns["installing"] += 1
        if self._turns["installing"] > self._patience.installing:
            self._turns["installing"] = 0
            if any(report.state == "installing" for report in reports):
                return self._renew(f"{self._name}: training does not begin: {_listed(reports)}")
            return self._start_again(reports)
        self._tell(f"{self._name} is ACTIVE: the hosts install and start by themselves")
        return None

    def _unreachable(self, reason: str) -> int | None:
        self._turns["unreachable"] += 1
        if self._turns["unreachable"] > self._patience.unreachable:
            return self._renew(f"{self._name} cannot be reached: {reason}")
        self._tell(f"{self._name}: {reason}; asking again")
        return None

    # --------------------------------------------------------------- going on, and the end

    def _note_progress(self, reports: Sequence[Report]) -> None:
        saved = max((report.saved for report in reports), default=-1)
        if saved > self._saved:
            self._saved, self._restarts = saved, 0

    def _may_go_on(self, reason: str) -> bool:
        """Counts a restart. False: the budget is used up."""
        self._restarts += 1
        budget = self._patience.restarts
        if self._restarts > budget:
            self._say(f"{reason}. {budget} restarts in a row saved no newer step: giving up")
            return False
        self._say(f"{reason}. Restart {self._restarts} of {budget} without a newer step")
        self._cloud.take_over()
        return True

    def _renew(self, reason: str) -> int | None:
        """Deletes the resource; the next turn finds none and creates it."""
        if not self._may_go_on(reason):
            return self._finish(exit_codes.FAILED, words=False)
        self._cloud.delete()
        self._turns = dict.fromkeys(self._turns, 0)
        return None

    def _finish(self, status: int, words: bool = True) -> int:
        saved = f", step {self._saved} saved" if self._saved >= 0 else ""
        if status == exit_codes.PREEMPTED:
            self._say(
                f"{self._name}: training was stopped by launch/tpu.sh stop{saved}. The resource "
                f"stays, and costs; launch/tpu.sh delete {self._name}"
            )
            return status
        said = "done" if status == exit_codes.DONE else f"ended with status {status}"
        self._say(f"{self._name}: training is {said}{saved}")
        try:
            if words and status != exit_codes.DONE:
                self._say(self._cloud.last_words())
            if not self._keep:
                self._cloud.delete()
                self._say(f"{self._name}: deleted")
        except GcloudError as error:
            self._say(f"warning: {error}")
            self._keep = True
        if self._keep:
            self._say(f"The resource stays, and costs; launch/tpu.sh delete {self._name}")
        return status

    # --------------------------------------------------------------- failures of gcloud

    def _after(self, error: GcloudError) -> float:
        """Seconds to wait after a call that failed. Raises UserError when that would not help."""
        if error.kind is Kind.NO_ROOM:
            # Only a slice that is there resets it: the request itself is taken each time.
            self._crowded += 1
        else:
            self._failures += 1
        count = self._crowded if error.kind is Kind.NO_ROOM else self._failures
        if error.kind is Kind.REFUSED or count > self._patience.tries:
            often = "" if error.kind is Kind.REFUSED else f" {count} times in a row"
            raise UserError(
                f"{error}{often}. What runs on {self._name} goes on; the same command watches it "
                "again."
            ) from error
        if error.kind is Kind.EXISTS:
            # Of a create whose answer was lost.
            return self._patience.poll
        self._tell(f"{error.said}; trying again")
        return min(self._patience.poll * 2 ** min(count - 1, 10), _LONGEST_PAUSE)

    def _tell(self, text: str) -> None:
        """Says what has changed."""
        if text != self._said:
            self._say(text)
            self._said = text


def _listed(reports: Sequence[Report]) -> str:
    return "; ".join(str(report) for report in reports)
