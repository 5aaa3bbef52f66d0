"""Several processes that are one run: how they join, speak to each other, and end together.

A process joins others when it has a reason to:

- explicit settings: `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`;
- Slurm: it is one of several tasks that `srun` started;
- a TPU slice of several hosts, or several slices;
- several CPU devices in one process (XLA's flag that forces their number): a group of one, so that
  they add in the order in which those of several processes do, and a run has the same bits.

Process 0 writes the run directory, the log and the messages, and when one process fails, all
end with its status and its message is shown once. They speak through jax's coordination service,
which needs no device.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.exit_codes import STALLED, status_of

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# In seconds. The hosts of a cold pod do not all start within jax's 300.
START_TIMEOUT = 1800
_END_TIMEOUT = 120
_PATIENCE = 60
# How long a process leaves it to process 0 to report an error that both may have.
_COURTESY = 5
# How long a file takes at most to be seen by the other hosts of a network file system.
SEEN_WITHIN = 60
# Between two questions to a metadata server that does not answer.
_METADATA_PAUSES = (1, 2, 4, 8)

_FAILED = "llamapro/failed"
_names = itertools.count()


# ------------------------------------------------------------------- reasons to join


@dataclass(frozen=True)
class Join:
    """How to join: explicit settings, or None where jax finds them in its surroundings.

    alone: a group of one.
    """

    reason: str
    address: str | None = None
    count: int | None = None
    index: int | None = None
    alone: bool = False


def reason_to_join(environment: Mapping[str, str] = os.environ) -> Join | None:
    """Why and how this process is one of several; None when it is alone.

    Raises UserError when the explicit settings are incomplete or wrong.
    """
    around = _slurm(environment) or _tpu(environment)
    given = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    if given and not (around is not None and given == [ADDRESS]):
        return _explicit(environment, given)
    return around or _cpu_devices(environment)


def _explicit(environment: Mapping[str, str], given: list[str]) -> Join | None:
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing:
        raise UserError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, but not "
            f"{' and '.join(missing)}. Set all three on every process ({ADDRESS}: host:port of "
            f"process 0; {COUNT}; {INDEX}: from 0), or none to run in one process."
        )
    address = environment[ADDRESS]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"{ADDRESS}: {address!r} is not host:port of process 0, such as 10.0.0.2:8476."
        )
    count, index = (_whole(environment, name) for name in (COUNT, INDEX))
    if not 0 <= index < count:
        raise UserError(
            f"{INDEX}: {index} is not between 0 and {count - 1}, the last of {COUNT}={count}."
        )
    return Join("explicit settings", address, count, index)


def _whole(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise UserError(f"{name}: {environment[name]!r} is not a whole number.")
    return int(environment[name])


def _slurm(environment: Mapping[str, str]) -> Join | None:
    """Without `srun`, as in a batch script itself, there is no step and so no other task."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = environment.get("SLURM_NTASKS", "1")
    if all(name in environment for name in needed) and tasks.isdecimal() and int(tasks) > 1:
        return Join("Slurm")
    return None


def _tpu(environment: Mapping[str, str]) -> Join | None:
    platforms = environment.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms.split(",")) or not _has_tpu():
        return None
    # The first two names are GKE's; a TPU VM knows its slice from the metadata server.
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = environment.get("MEGASCALE_NUM_SLICES")
    if workers is not None:
        where, needed = "GKE", ["TPU_WORKER_ID"]
    elif "TPU_SKIP_MDS_QUERY" not in environment:
        where, needed = "TPU VM", []
        workers = _metadata(environment, "worker-network-endpoints")
        told = re.search(
            r"^MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata(environment, "tpu-env"), re.MULTILINE
        )
        slices = slices or (told[1] if told else None)
    else:
        where, needed = "TPU", []
    hosts, slices = len((workers or "").split(",")), slices or "1"
    if hosts == 1 and slices == "1":
        return None
    if where == "GKE" and slices != "1":
        needed += ["MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"]
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            f"this is one of {hosts} hosts of {slices} TPU slice(s), but {' and '.join(missing)} "
            "is not set. GKE sets it in the pods of a Job or JobSet that ask for google.com/tpu."
        )
    several = f"{slices} TPU slices" if slices != "1" else "a TPU slice"
    return Join(f"{where}, {several} of {hosts} host{'s' * (hosts > 1)}")


def _cpu_devices(environment: Mapping[str, str]) -> Join | None:
    flags = environment.get("XLA_FLAGS", "")
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    devices = forced[-1:] or [environment.get("JAX_NUM_CPU_DEVICES", "1")]
    if environment.get("JAX_PLATFORMS") != "cpu" or devices[0] in ("", "0", "1"):
        return None
    address = f"127.0.0.1:{free_port()}"
    return Join("several CPU devices", address, 1, 0, alone=True)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _has_tpu() -> bool:
    return bool(list(Path("/dev").glob("accel[0-9]*")) or list(Path("/dev/vfio").glob("[0-9]*")))


def _metadata(environment: Mapping[str, str], key: str) -> str:
    """What the metadata server of Google's cloud has, "" where there is none or it has nothing.

    Raises UserError when it is there and does not answer: a host of a slice that took itself for
    a single machine would train by itself, while the others wait for it.
    """
    import urllib.error
    import urllib.request

    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    for pause in (*_METADATA_PAUSES, None):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except OSError as error:
            reason = getattr(error, "reason", None)
            if getattr(error, "code", None) == 404 or isinstance(reason, socket.gaierror):
                return ""
            if pause is None:
                raise UserError(
                    f"the metadata server ({url}) does not answer: {error}. Without it this host "
                    "does not know its slice. If it is a single host, set TPU_SKIP_MDS_QUERY=1."
                ) from error
        time.sleep(pause)
    raise AssertionError("unreachable")


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
