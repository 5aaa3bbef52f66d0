"""Why a process joins others, found in its surroundings: its environment and its machine.

- explicit settings: `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`;
- Slurm: it is one of several tasks that `srun` started;
- a TPU slice of several hosts, or several slices;
- several CPU devices in one process (XLA's flag that forces their number): a group of one, so that
  they add in the order in which those of several processes do, and a run has the same bits.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamapro_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Seconds between two questions to a metadata server that does not answer.
_METADATA_PAUSES = (1, 2, 4, 8)


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
