"""Machines by name: what a chip has, and what `v5e-4`, `2xv5p-128` or `h100-8` stand for.

Names are those under which the machines are rented: Cloud TPU counts TensorCores in the names of
v4, v5p and TPU7x (v5p-128 is 64 chips) and chips in those of v5e and v6e; for GPUs the number is
that of GPUs. `NxNAME` is N TPU slices joined by the data-centre network.

A device is what jax calls one: a chip, but half a chip of TPU7x.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from llamapro_jax.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one device has.

    hbm_bytes: memory that a program gets of it. peak_flops: of bfloat16 products a second.
    hbm_bandwidth, link_bandwidth, network_bandwidth: bytes a second in one direction; the second of
    a link between two chips, the third of a device's share of the network between slices or nodes.
    links: of a chip to its neighbours; None where a switch joins the devices of a node.
    cores_in_name: what a machine's name counts for each chip.

    Zero stands for "not known"; what depends on it is then left out.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    links: int | None = None
    devices_per_chip: int = 1
    cores_in_name: int = 1


# Sources. TPU: cloud.google.com/tpu/docs, the page of each generation (peak, bandwidths;
# "interchip interconnect" is the sum of a chip's links, in one direction the half of what newer
# pages call bidirectional; "data center network" by chip). The memory is what the TPU compiler says
# is available when a program does not fit.
# GPU: NVIDIA's data sheets, dense bfloat16 without sparsity; NVLink in one direction; one 400 Gb/s
# network card a GPU (A100: 200). The memory is the driver's figure less a twentieth, which stays
# free for CUDA, cuDNN and NCCL.
_OF_A_GPU = 0.95
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", int(30.75 * GIB), 275e12, 1228e9, 50e9, 6.25e9, 6, cores_in_name=2),
        Chip("v5e", "tpu", int(15.75 * GIB), 197e12, 819e9, 50e9, 3.125e9, 4),
        Chip("v5p", "tpu", int(95.74 * GIB), 459e12, 2765e9, 100e9, 6.25e9, 6, cores_in_name=2),
        Chip("v6e", "tpu", int(31.25 * GIB), 918e12, 1640e9, 112e9, 12.5e9, 4),
        Chip("tpu7x", "tpu", int(94.75 * GIB), 1153.5e12, 3690e9, 50e9, 6.25e9, 6, 2, 2),
        Chip("a100", "gpu", int(85_094_170_624 * _OF_A_GPU), 312e12, 2039e9, 300e9, 25e9),
        Chip("h100", "gpu", int(84_942_979_072 * _OF_A_GPU), 989e12, 3352e9, 450e9, 50e9),
        Chip("h200", "gpu", int(150_109_880_320 * _OF_A_GPU), 989e12, 4800e9, 450e9, 50e9),
        Chip("cpu", "cpu", 0, 0.0, 0.0, 0.0, 0.0),
    )
}

# Chips of a slice -> its shape. Of v4, v5p and TPU7x: cuboids, of which these are the usual ones.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
         256: (16, 16)}  # fmt: skip
_CUBE = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
         256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
         4096: (16, 16, 16)}  # fmt: skip
_GPUS = (1, 2, 4, 8, *(8 * nodes for nodes in (2, 4, 8, 16, 32, 64, 128)))
GPUS_PER_NODE = 8
MAX_CPU_DEVICES = 64

_NAME = re.compile(r"(?:(\d+)x)?([a-z]\w*?)(?:-(\d+))?")


@dataclass(frozen=True)
class Machine:
    """A machine by its name. shape: the chips of one slice; of GPUs (nodes, GPUs of a node)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.chip.devices_per_chip

    def interconnect_bandwidth(self) -> float:
        """Bytes a second that a device can receive from its slice or node, at best; 0: not known.

        A chip has two links along each axis of a torus, but one along an axis of two chips, and
        the devices of a chip share them. Several nodes of GPUs: the network between them.
        """
        chip = self.chip
        if chip.links is None:
            between_nodes = chip.platform == "gpu" and self.shape[0] > 1
            return chip.network_bandwidth if between_nodes else chip.link_bandwidth
        links = sum(min(chips - 1, 2) for chips in self.shape)
        # A single TPU7x chip: its two halves exchange within the chip.
        return (links or 1) * chip.link_bandwidth

    def next_larger(self) -> list[str]:
        """Names of the machines of the same kind with two and four times the devices."""
        names = [name for name in machine_names() if parse_machine(name).chip == self.chip]
        wanted = [self.devices * factor for factor in (2, 4)]
        return [
            f"{self.slices}x{name}" if self.slices > 1 else name
            for name in names
            if parse_machine(name).devices * self.slices in wanted
        ]


def machine_names() -> list[str]:
    """All names of one slice, but those of CPUs with a number of devices."""
    names = []
    for chip in CHIPS.values():
        if chip.platform == "cpu":
            names.append(chip.name)
        elif chip.platform == "gpu":
            names += [f"{chip.name}-{gpus}" for gpus in _GPUS]
        else:
            names += [f"{chip.name}-{chips * chip.cores_in_name}" for chips in _shapes(chip)]
    return names


def parse_machine(name: str) -> Machine:
    """The machine `v5e-4`, `2xv5e-16`, `h100-8`, `cpu`, `cpu-8`. Raises UserError for others."""
    match = _NAME.fullmatch(name)
    slices, kind, number = match.groups() if match else (None, name, None)
    chip = CHIPS.get(kind)
    if chip is None or slices == "0":
        raise UserError(
            f"topology: {name!r} is not known.{nearest(name, machine_names())} Known: "
            f"{', '.join(_ranges())}; Nx before the name of a TPU: N slices."
        )
    count = int(number or 1)
    if chip.platform != "tpu" and slices is not None:
        raise UserError(f"topology: {name!r}: only TPUs come in slices; leave out {slices}x.")
    if chip.platform == "cpu":
        if not 1 <= count <= MAX_CPU_DEVICES:
            raise UserError(f"topology: {name!r}: give cpu-1 to cpu-{MAX_CPU_DEVICES}.")
        return Machine(name, chip, (count,))
    if number is None:
        raise _no_such_size(name, chip)
    if chip.platform == "gpu":
        if count not in _GPUS:
            raise _no_such_size(name, chip)
        return Machine(name, chip, (-(-count // GPUS_PER_NODE), min(count, GPUS_PER_NODE)))
    chips, rest = divmod(count, chip.cores_in_name)
    if rest or chips not in _shapes(chip):
        raise _no_such_size(name, chip)
    return Machine(name, chip, _shapes(chip)[chips], int(slices or 1))


def _shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
    return _FLAT if chip.links == 4 else _CUBE


def _sizes(chip: Chip) -> list[int]:
    if chip.platform == "gpu":
        return list(_GPUS)
    return [chips * chip.cores_in_name for chips in _shapes(chip)]


def _ranges() -> list[str]:
    return [
        "cpu or cpu-N" if chip.platform == "cpu" else f"{chip.name}-{{{_list(_sizes(chip))}}}"
        for chip in CHIPS.values()
    ]


def _list(sizes: list[int]) -> str:
    return ",".join(map(str, sizes))


def _no_such_size(name: str, chip: Chip) -> UserError:
    meant = "GPUs" if chip.platform == "gpu" else "TensorCores"
    meant = "chips" if chip.platform == "tpu" and chip.cores_in_name == 1 else meant
    return UserError(
        f"topology: {name!r} is not known; of {chip.name} there are "
        f"{', '.join(f'{chip.name}-{size}' for size in _sizes(chip))} (the number counts {meant})."
    )
