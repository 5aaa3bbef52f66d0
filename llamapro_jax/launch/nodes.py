"""What a machine's name stands for on GKE: labels, machine types, hosts, chips a host.

TPUs: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. A slice of one host is asked for
as one host, so that v5e-8 and v6e-8 are hosts of eight chips. GPUs: the machine types whose nodes
reach each other without going through the host's memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llamapro_jax.errors import UserError
from llamapro_jax.machines import GIB, GPUS_PER_NODE, Chip, Machine, parse_machine

TPU, GPU = "google.com/tpu", "nvidia.com/gpu"


@dataclass(frozen=True)
class _Tpu:
    """accelerator: the label of its nodes. machine: the machine type, for the chips of a host."""

    accelerator: str
    machine: str


@dataclass(frozen=True)
class _Gpu:
    """accelerator, machine: as of a TPU. network: how NCCL reaches other nodes.

    environment: the script that the node's own NCCL plugin brings, which sets what it needs.
    """

    accelerator: str
    machine: str
    network: str
    environment: str


_TPUS = {
    "v4": _Tpu("tpu-v4-podslice", "ct4p-hightpu-{}t"),
    "v5e": _Tpu("tpu-v5-lite-podslice", "ct5lp-hightpu-{}t"),
    "v5p": _Tpu("tpu-v5p-slice", "ct5p-hightpu-{}t"),
    "v6e": _Tpu("tpu-v6e-slice", "ct6e-standard-{}t"),
    "tpu7x": _Tpu("tpu7x", "tpu7x-standard-{}t"),
}
_GIB_SCRIPT = "/usr/local/gib/scripts/set_nccl_env.sh"
_TCPXO_SCRIPT = "/usr/local/nvidia/lib64/nccl-env-profile.sh"
_GPUS = {
    "h100": _Gpu("nvidia-h100-mega-80gb", "a3-megagpu-8g", "tcpxo", _TCPXO_SCRIPT),
    "h200": _Gpu("nvidia-h200-141gb", "a3-ultragpu-8g", "rdma", _GIB_SCRIPT),
    "b200": _Gpu("nvidia-b200", "a4-highgpu-8g", "rdma", _GIB_SCRIPT),
}
# `plan` cannot compile for it, so that it is no machine of its list. NVIDIA's data sheet; the
# memory is the driver's figure less a twentieth, as of the others.
_B200 = Chip("b200", "gpu", int(182_631 * 2**20 * 0.95), 2250e12, 7700e9, 900e9, 50e9)
# Networks of a node beside the first one, by the names that Google's guides give them.
_NETWORKS = {
    "tcpxo": [f"vpc{number}" for number in range(1, 9)],
    "rdma": ["gvnic-1", *(f"rdma-{number}" for number in range(8))],
}


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run. hosts: of one slice; chips: of one host.

    topology: of a slice of TPUs, None of GPUs. networks: beside the first, of each of several GPU
    nodes; network, environment: see `_Gpu`, None where nodes need not reach each other.
    """

    machine: Machine
    resource: str
    chips: int
    hosts: int
    labels: dict[str, str]
    machine_type: str
    topology: str | None = None
    network: str | None = None
    environment: str | None = None

    @property
    def slices(self) -> int:
        return self.machine.slices

    @property
    def networks(self) -> list[str]:
        return _NETWORKS[self.network] if self.network else []

    @property
    def description(self) -> str:
        """In words, with the memory that a program gets."""
        hbm = self.machine.devices * self.machine.chip.hbm_bytes / GIB
        kind = "TPU chips" if self.topology else "GPUs"
        hosts = f"{self.hosts} host{'s' * (self.hosts > 1)} of {self.chips} {kind}"
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{hosts} ({self.machine_type}), {hbm:,.0f} GiB of memory in all"


def nodes_of(name: str) -> Nodes:
    """The nodes of `v5p-128`, `2xv6e-16`, `h200-16`. Raises UserError for what GKE has not."""
    if gpus := re.fullmatch(r"b200-(\d+)", name):
        # Of the same sizes as the others.
        shape = parse_machine(f"h200-{gpus.group(1)}").shape
        machine = Machine(name, _B200, shape)
    else:
        machine = parse_machine(name)
    chip = machine.chip.name
    if chip in _TPUS:
        return _tpu_nodes(machine, _TPUS[chip])
    if chip in _GPUS:
        return _gpu_nodes(machine, _GPUS[chip])
    known = ", ".join([*_TPUS, *_GPUS])
    raise UserError(
        f"topology: {name!r} cannot be launched on GKE; give a machine of {known}, such as v6e-16."
    )


def _tpu_nodes(machine: Machine, tpu: _Tpu) -> Nodes:
    chips = math.prod(machine.shape)
    # Flat slices have hosts of 1, 4 or 8 chips, cuboids of 4.
    of_host = chips if chips < 8 or (chips == 8 and len(machine.shape) == 2) else 4
    hosts = chips // of_host
    if machine.slices > 1 and hosts == 1:
        raise UserError(
            f"topology: {machine.name!r}: GKE joins only slices of several hosts, and "
            f"{machine.name.partition('x')[2]} is one host; take one larger slice instead."
        )
    topology = "x".join(map(str, machine.shape))
    labels = {
        "cloud.google.com/gke-tpu-accelerator": tpu.accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    return Nodes(machine, TPU, of_host, hosts, labels, tpu.machine.format(of_host), topology)


def _gpu_nodes(machine: Machine, gpu: _Gpu) -> Nodes:
    hosts, chips = machine.shape
    labels = {"cloud.google.com/gke-accelerator": gpu.accelerator}
    network, environment = (gpu.network, gpu.environment) if hosts > 1 else (None, None)
    assert chips <= GPUS_PER_NODE
    return Nodes(
        machine,
        GPU,
        chips,
        hosts,
        labels,
        gpu.machine,
        network=network,
        environment=environment,
    )
