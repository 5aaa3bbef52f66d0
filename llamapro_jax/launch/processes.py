"""Several processes that are one run: how they join, speak to each other, and end together.

A process joins others when `launch.surroundings` finds a reason to. Process 0 writes the run
directory, the log and the messages, and when one process fails, all end with its status and its
message is shown once. They speak through jax's coordination service, which needs no device.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.exit_codes import STALLED, status_of
from llamapro_jax.launch.surroundings import Join, reason_to_join

# In seconds. The hosts of a cold pod do not all start within jax's 300.
START_TIMEOUT = 1800
_END_TIMEOUT = 120
_PATIENCE = 60
# How long a process leaves it to process 0 to report an error that both may have.
_COURTESY = 5
# How long a file takes at most to be seen by the other hosts of a network file system.
SEEN_WITHIN = 60

_FAILED = "llamapro/failed"
_names = itertools.count()


# ------------------------------------------------------------------- joining and leaving


@contextmanager
def joined() -> Iterator[None]:
    """While entered, this process is one of its run's, when there is a reason to join others.

    Must be entered before jax starts its devices. Ends together: when one process raises, all end
    with the same status, and process 0 shows the message.
    """
    import jax

    join = reason_to_join()
    if join is None or (join.alone and _devices_started()):
        yield
        return
    with _stoppable():
        _initialize(join)
    watch = _Watch()
    try:
        # Devices start on all processes at a time.
        jax.devices()
        yield
    except BaseException as error:
        _end(watch, error)
        raise
    else:
        watch.stop()
        _leave()
        watch.join()


def _initialize(join: Join) -> None:
    import jax

    # Its handler would take the place of ours, which also knows of SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit = {} if join.count is None else {"cluster_detection_method": "deactivate"}
    # jaxlib aborts the process when the others do not come in time: say what it waits for.
    where = join.address or "the first host"
    waiting = threading.Timer(_PATIENCE, _say_waiting, [join.reason, where])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address=join.address,
            num_processes=join.count,
            process_id=join.index,
            coordinator_bind_address=join.address if join.alone else None,
            initialization_timeout=START_TIMEOUT,
            shutdown_timeout_seconds=_END_TIMEOUT,
            **explicit,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run ({join.reason}) did not come together: "
            f"{str(error).splitlines()[0]}. All must run the same command and reach {where}."
        ) from error
    finally:
        waiting.cancel()


def _say_waiting(reason: str, where: str) -> None:
    print(
        f"still waiting for the other processes of this run ({reason}); all of them must run the "
        f"same command and reach {where}. Aborts after {START_TIMEOUT // 60} minutes.",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _stoppable() -> Iterator[None]:
    """While jax waits for the other processes, where Python handles no signal, SIGTERM ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _state() -> Any:
    """jax's record of the group that this process is in, which it keeps private."""
    from jax._src import distributed

    return distributed.global_state


def _devices_started() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def count() -> int:
    """Number of processes of this run."""
    return _state().num_processes if _state().client is not None else 1


def index() -> int:
    """The number of this process, from 0."""
    return _state().process_id if _state().client is not None else 0


def is_first() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return _state().client is None or _state().process_id == 0


def _described(error: BaseException) -> str:
    return str(error) if isinstance(error, Exception) or hasattr(error, "status") else "stopped"


def _end(watch: _Watch, error: BaseException) -> None:
    """Tells the others of an exception. Raises SystemExit where it is shown already."""
    watch.stop()
    first = is_first()
    expected = not isinstance(error, Exception) or isinstance(error, UserError | OSError)
    if not expected:
        # Now: when another process died, jaxlib aborts this one as it leaves.
        traceback.print_exception(error)
    elif not first:
        # The same error on all processes is reported by the first.
        with suppress(TimeoutError):
            _get(_FAILED, _COURTESY)
    described = _described(error) if expected else traceback.format_exception_only(error)[-1]
    _tell(status_of(error), described)
    _leave()
    watch.join()
    if not (first and expected):
        raise SystemExit(status_of(error)) from None


def _tell(status: int, message: str) -> None:
    told = {
        "process": _state().process_id,
        "host": socket.gethostname(),
        "status": status,
        "message": message,
    }
    with suppress(Exception):  # another was first
        _state().client.key_value_set(_FAILED, json.dumps(told))


def end_others(status: int, message: str) -> None:
    """Ends the other processes of the run with `status`, from a process that is about to die.

    Returns when they had time to hear of it: process 0 holds what is told.
    """
    if count() > 1:
        _tell(status, message)
        time.sleep(_COURTESY)


def _leave() -> None:
    """Waits until all processes leave: the service must outlive its last user."""
    import jax

    try:
        jax.distributed.shutdown()
    except Exception as error:  # jaxlib raises several types, and the end is near anyway
        print(f"warning: left the other processes: {str(error).splitlines()[0]}", file=sys.stderr)


class _Watch:
    """Ends this process when another one failed, whatever the main thread waits for."""

    def __init__(self) -> None:
        # Either the main thread leaves the others, or this one: two that do so at a time, of which
        # one ends Python while the other is in jaxlib, abort the process.
        self._lock = threading.Lock()
        self._stopped = self._ending = False
        # Asked now, since `_leave` clears it.
        self._first = is_first()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This process ends by itself from now on. Does not return where the watch is ending it."""
        with self._lock:
            self._stopped = True
        if self._ending:
            self._thread.join()

    def join(self) -> None:
        """After `_leave`: Python must not end while the thread waits in jaxlib."""
        self._thread.join(_END_TIMEOUT)

    def _run(self) -> None:
        while True:
            try:
                told = json.loads(_get(_FAILED, 60))
                break
            except TimeoutError:
                if self._stopped:
                    return
            except Exception:  # the service has ended: all left
                return
        with self._lock:
            if self._stopped:
                return
            self._ending = True
        if told["status"] == STALLED:
            # What this process waited for says where the other one was missing.
            faulthandler.dump_traceback()
        if self._first:
            where = f"process {told['process']} on {told['host']}"
            print(f"error: {where}: {told['message'].strip()}", file=sys.stderr)
        with suppress(Exception):
            _leave()
        sys.stdout.flush()
        sys.stderr.flush()
        # The main thread may be in a collective that never ends.
        os._exit(told["status"])


# ------------------------------------------------------------------- speaking


def _get(key: str, seconds: float) -> str:
    """The value of a key once it has one. Raises TimeoutError."""
    import jax

    try:
        return _state().client.blocking_key_value_get(key, round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(key) from None
        raise


def from_first(action: Callable[[], Any]) -> Any:
    """What `action` gives on process 0, where alone it runs: a JSON value. The others wait for it.

    All processes call this in the same order.
    """
    if count() == 1:
        return action()
    key = f"llamapro/{next(_names)}"
    if is_first():
        value = action()
        _state().client.key_value_set(key, json.dumps(value))
        return value
    while True:
        # In short turns, between which Python handles signals.
        with suppress(TimeoutError):
            return json.loads(_get(key, 1))


def from_all(value: Any) -> list[Any]:
    """What each process gives, by process: JSON values. All call this in the same order."""
    if count() == 1:
        return [value]
    key = f"llamapro/{next(_names)}"
    _state().client.key_value_set(f"{key}/{_state().process_id}", json.dumps(value))

    def gathered() -> list[Any]:
        return [json.loads(_get(f"{key}/{i}", START_TIMEOUT)) for i in range(count())]

    return from_first(gathered)


def first_given(value: Any) -> Any:
    """The value of the first process whose value is not None; None when there is none."""
    return next((given for given in from_all(value) if given is not None), None)


def everywhere(holds: bool) -> bool:
    """Whether it holds on all processes. All call this in the same order as `from_first`."""
    return all(from_all(holds))


def meet(place: str, called_off: str, seconds: float) -> None:
    """Returns when all processes are at `place`, a name that each comes to once.

    Raises RuntimeError with what one of them gave to `call_off(called_off, ...)`, once it has,
    and TimeoutError after so many seconds. Any thread may call this.
    """
    if count() == 1:
        return
    _state().client.key_value_set(f"{place}/{_state().process_id}", "here")
    deadline = time.monotonic() + seconds
    for index in range(count()):
        while True:
            with suppress(TimeoutError):
                _get(f"{place}/{index}", 0.5)
                break
            with suppress(TimeoutError):
                raise RuntimeError(_get(called_off, 0.01))
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {index} did not come to {place}")


def call_off(called_off: str, reason: str) -> None:
    """Ends the meetings of that name, on all processes, with a RuntimeError."""
    with suppress(Exception):  # another was first
        _state().client.key_value_set(called_off, reason)


def forget(names: str) -> None:
    """Of meetings that are over: removes all keys that begin with `names` and a slash."""
    if count() > 1:
        _state().client.key_value_delete(f"{names}/")


def settled(results: Any) -> Any:
    """`results`, computed to their end where two programs must not be under way at a time.

    That is so for several processes on CPUs, whose collectives (gloo) then wait for each other.
    """
    import jax

    if _state().client is not None and jax.default_backend() == "cpu":
        jax.block_until_ready(results)
    return results
