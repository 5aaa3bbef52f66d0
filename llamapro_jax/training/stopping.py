"""Asking a run to stop: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What launchers read: 42 says "preempted and saved, start again"; 130 is a shell's Ctrl-C.
STATUS = {signal.SIGTERM: 42, signal.SIGINT: 130}


class Stopped(BaseException):
    """The run was asked to stop and did, with what it had done saved. `status`: to exit with.

    Like KeyboardInterrupt no `Exception`, so that no library swallows it.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class StopSignals:
    """While entered, the first SIGTERM or SIGINT only sets `requested`; the second one acts.

    Within `at_once` the first one raises `Stopped`: where no step is under way, nothing is lost.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._message: str | None = None

    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STATUS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._before[self.signal])
        if self._message is not None:
            raise self.stopped(self._message)
        name = self.signal.name
        print(f"\n{name}: stopping after this step; once more to stop at once", file=sys.stderr)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """While entered, a signal raises `Stopped(message)`."""
        self._message = message
        try:
            yield
        finally:
            self._message = None

    def stopped(self, message: str) -> Stopped:
        assert self.signal is not None
        return Stopped(message, STATUS[self.signal])
