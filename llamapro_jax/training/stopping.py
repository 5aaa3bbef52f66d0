"""Asking a run to stop: finish the step, save, say how to go on.

With several processes one signal to one of them stops all, after the same step: at each question
whether to stop, the devices take the maximum of what the processes were sent, in a program of
their own behind the step, and the answer is read at the next question, when it is long there.
That costs a step microseconds, and works alike for both signals and on every platform; jax's
preemption service knows of SIGTERM alone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamapro_jax import exit_codes
from llamapro_jax.launch.processes import settled

T = TypeVar("T")

_COMPILING = "compiling"
STATUS = {signal.SIGTERM: exit_codes.PREEMPTED, signal.SIGINT: exit_codes.INTERRUPTED}


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
        self._agree: Callable[[int], int] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._message: str | None = None

    def agree_over(self, mesh: Mesh) -> None:
        """From now on the processes of the mesh stop together."""
        if mesh.is_multi_process:
            self._agree = _LargestBefore(mesh)

    def requested(self) -> bool:
        """Whether to stop. Several processes ask at the same places, and get the same answer."""
        if self._agree is not None:
            number = self._agree(self.signal or 0)
            if not number:
                return False
            # Once agreed, no process asks again.
            self.signal, self._agree = signal.Signals(number), None
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
        """While entered, a signal raises `Stopped(message)`, and one that came before does."""
        self._message = message
        try:
            if self.signal is not None:
                raise self.stopped(message)
            yield
        finally:
            self._message = None

    def interruptible(self, compiling: Callable[[], T]) -> T:
        """What `compiling` gives, which runs in another thread.

        Python handles no signal while its main thread is in the compiler, for minutes. After a
        signal that raises, `end_if_compiling` is how to end the process.
        """
        if threading.current_thread() is not threading.main_thread():
            return compiling()
        result: Future[T] = Future()

        def compile_for_main() -> None:
            try:
                result.set_result(compiling())
            except BaseException as error:
                result.set_exception(error)

        thread = threading.Thread(target=compile_for_main, name=_COMPILING, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
        return result.result()

    def stopped(self, message: str) -> Stopped:
        assert self.signal is not None
        return Stopped(message, STATUS[self.signal])


def end_if_compiling(status: int) -> None:
    """Ends the process when it was stopped while it compiles.

    Python's own end would take apart what the compiler, which nothing can interrupt, works with.
    """
    if any(thread.name == _COMPILING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _LargestBefore:
    """Called by all processes: the largest number that one of them gave at the call before."""

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max)
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        given = jax.make_array_from_callback(
            (self._sharding.mesh.size,), self._sharding, lambda _: np.full(1, number, np.int32)
        )
        before, self._before = self._before, settled(self._largest(given))
        return 0 if before is None else int(before)
