"""A process in which nothing moves for too long shows what it hangs in, and ends.

A loader that waits for a disk, a collective whose other side is gone, a device that does not
answer: none of them raises anything, and a launcher can start again only what has ended.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
import time
from pathlib import Path

from llamapro_jax import exit_codes
from llamapro_jax.launch.processes import end_others, index
from llamapro_jax.training.run_files import RunFiles

WATCHDOG = "watchdog"

# Loading, compiling and the first step may take so many times as long as a step.
SLOW = 4
# Seconds for writing down and telling; the disk or the network may be what hangs.
_GRACE = 20


class Watchdog:
    """A context manager that ends the process with exit_codes.STALLED without `progress`.

    seconds: the longest time between two; None: it never ends. directory: of the run, where
    `watchdog/process-I.txt` gets the stacks of all threads, as standard error does. place: of a
    run, where what is written down is copied to when the run is remote.
    """

    def __init__(
        self, seconds: float | None, directory: Path, place: RunFiles | None = None
    ) -> None:
        self._seconds = seconds
        self._directory, self._place = directory, place
        self._doing, self._limit, self._quiet = "starting", float("inf"), 0.0
        self._over = threading.Event()

    def progress(self, doing: str, *, slow: bool = False) -> None:
        """Something moved. doing: what comes next, and may take SLOW times as long when `slow`."""
        if self._seconds is not None:
            self._doing, self._quiet = doing, 0.0
            self._limit = self._seconds * (SLOW if slow else 1)

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            threading.Thread(target=self._watch, name=WATCHDOG, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        assert self._seconds is not None
        nap = min(self._seconds / 10, 5.0)
        before = time.monotonic()
        while not self._over.wait(nap):
            now = time.monotonic()
            # A process that was suspended, as by SIGSTOP, gets its time when it wakes.
            self._quiet += min(now - before, 2 * nap)
            before = now
            if self._quiet > self._limit:
                self._end()

    def _end(self) -> None:
        where = (self._place.run if self._place else self._directory) / WATCHDOG
        message = (
            f"watchdog: nothing moved for {self._quiet:.0f} s, while {self._doing} "
            f"(training.watchdog: {self._seconds:g} s). The stacks of all threads are in "
            f"{where}; run the same command again to go on."
        )
        for action in (self._show, self._write_down, end_others):
            arguments = (exit_codes.STALLED, message) if action is end_others else (message,)
            thread = threading.Thread(target=action, args=arguments, daemon=True)
            thread.start()
            thread.join(_GRACE)
        # The main thread may be in a call that never returns.
        os._exit(exit_codes.STALLED)

    def _show(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        with os.fdopen(os.dup(2), "w") as stream:
            _stacks(stream)

    def _write_down(self, message: str) -> None:
        (self._directory / WATCHDOG).mkdir(exist_ok=True)
        file = self._directory / WATCHDOG / f"process-{index()}.txt"
        with file.open("w", encoding="utf-8") as stream:
            stream.write(f"{message}\n")
            _stacks(stream)
        if self._place is not None:
            self._place.copy()


def _stacks(stream: io.TextIOBase) -> None:
    for thread in threading.enumerate():
        stream.write(f"thread {thread.ident or 0:#018x}: {thread.name}\n")
    stream.flush()
    faulthandler.dump_traceback(stream)
