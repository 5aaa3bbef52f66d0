"""What a compiled program computes and moves: matrix products, kernels, collectives, arrays."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from llamapro_jax.hlo import Array, Computation, Instruction, Program, read_program

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GEMM_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_HIDDEN_MATMUL = re.compile("gemm|matmul|dot|conv", re.IGNORECASE)
_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")

# Custom calls that are kernels of ours or of a library, by a part of their target.
_KERNELS = ("tpu_custom_call", "triton", "mosaic", "fmha")
# The runtime of several TPU slices exchanges through the hosts what a program sends to it.
_BETWEEN_SLICES = "xla_megascale_runtime"
SEND_TO_SLICES = "send-to-slices"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    payload: bytes of the whole array: what a gather gives, what a reduction takes. devices: how
    many exchange with each other. times: how often it runs in one run of the program.
    """

    kind: str
    payload: int
    devices: int
    times: int
    op_name: str
    dtype: str

    @property
    def moved(self) -> float:
        """Bytes that each device must send, and receive, for it once, whatever the algorithm."""
        if self.kind in ("collective-permute", SEND_TO_SLICES):
            return self.payload
        share = self.payload * (self.devices - 1) / self.devices
        return 2 * share if self.kind == "all-reduce" else share


@dataclass(frozen=True)
class Buffer:
    """An array that lies in memory at some time."""

    array: Array
    computation: str
    op_name: str


@dataclass(frozen=True)
class Summary:
    """One run of a program on one device.

    matmul_flops: of matrix products, a multiplication and an addition counting as two; what
    kernels compute is not in it. kernels: name -> calls.
    """

    matmul_flops: int
    kernels: dict[str, int]
    collectives: tuple[Collective, ...]

    @property
    def collective_bytes(self) -> float:
        """Bytes that a device sends, and receives, in all collectives."""
        return sum(c.moved * c.times for c in self.collectives)


def summarize(text: str) -> Summary:
    """Reads a compiled program. Raises ValueError where the text does not tell enough."""
    program = read_program(text)
    return Summary(matmul_flops(program), kernel_calls(program), tuple(collectives(program)))


# ------------------------------------------------------------------- matrix products


def matmul_flops(program: Program) -> int:
    """FLOPs of all matrix products of one run on one device.

    A loop's body counts as often as it runs. TPU programs hold products as convolutions. Raises
    ValueError for a loop without a known trip count, and for a custom call that may be a product.
    """
    return sum(
        product_flops(instruction, computation) * program.times[computation.name]
        for instruction, computation in program.instructions()
    )


def product_flops(instruction: Instruction, computation: Computation) -> int:
    """FLOPs of an instruction, when it is a matrix product; else 0."""

    def array(operand: int) -> Array:
        return computation.instructions[instruction.operands[operand]].results[0]

    if instruction.operation == "dot":
        contracted = _CONTRACTED.search(instruction.attributes)[1]
        return _dot_flops(instruction.results[0], array(0), contracted)
    if instruction.operation == "convolution":
        return _convolution_flops(instruction, array(0), array(1))
    if instruction.operation == "custom-call":
        target = _TARGET.search(instruction.attributes)[1]
        if _is_kernel(target) or not _HIDDEN_MATMUL.search(target):
            return 0
        dimensions = _GEMM_CONTRACTED.search(instruction.attributes)
        if dimensions is None:
            raise ValueError(f"cannot count the matrix product of {instruction.name} ({target})")
        return _dot_flops(instruction.results[0], array(0), dimensions[1].replace('"', ""))
    return 0


def _dot_flops(result: Array, left: Array, contracted: str) -> int:
    sizes = [left.dims[int(dimension)] for dimension in contracted.split(",") if dimension]
    return 2 * math.prod(result.dims) * math.prod(sizes)


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    """As XLA's cost analysis counts them: positions in the padding do not count."""
    of_left, of_right, of_result = _LABELS.search(instruction.attributes).groups()
    window = _WINDOW.search(instruction.attributes)
    entries = dict(entry.split("=") for entry in window[1].split()) if window else {}
    groups = int(instruction.attribute("batch_group_count") or 1)
    positions = 1
    for dimension in sorted(set(of_left) - set("bf?")):
        axis = int(dimension)

        def entry(name: str, default: str, axis: int = axis) -> str:
            return entries[name].split("x")[axis] if name in entries else default

        positions *= _valid_positions(
            size=left.dims[of_left.index(dimension)],
            results=instruction.results[0].dims[of_result.index(dimension)],
            window=int(entry("size", "1")),
            stride=int(entry("stride", "1")),
            before=int(entry("pad", "0_0").split("_")[0]),
            left_dilation=int(entry("lhs_dilate", "1")),
            right_dilation=int(entry("rhs_dilate", "1")),
        )
    rows = left.dims[of_left.index("b")] // groups
    features = instruction.results[0].dims[of_result.index("f")]
    return 2 * rows * features * right.dims[of_right.index("i")] * positions


@functools.cache
def _valid_positions(
    size: int,
    results: int,
    window: int,
    stride: int,
    before: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of a result and a place in the window that meet an element, not padding or a hole."""
    starts = np.arange(results, dtype=np.int64) * stride - before
    count = 0
    for place in range(window):
        at = starts + place * right_dilation
        inside = (at >= 0) & (at < (size - 1) * left_dilation + 1) & (at % left_dilation == 0)
        count += int(np.count_nonzero(inside))
    return count


# ------------------------------------------------------------------- kernels


def _is_kernel(target: str) -> bool:
    return any(part in target for part in _KERNELS)


def kernel_calls(program: Program) -> dict[str, int]:
    """How often each kernel runs: Pallas kernels by their name, others by their target."""
    calls: Counter[str] = Counter()
    for instruction, computation in program.instructions():
        if instruction.operation != "custom-call":
            continue
        target = _TARGET.search(instruction.attributes)[1]
        if _is_kernel(target):
            *path, last = instruction.op_name.split("/")
            name = path[-1] if path and last == "pallas_call" else target
            calls[name] += program.times[computation.name]
    return dict(calls)


# ------------------------------------------------------------------- collectives


def collectives(program: Program) -> Iterator[Collective]:
    """All collectives that run; an asynchronous one counts where it starts."""
    begun = _begun_in_fusions(program)
    for instruction, computation in program.instructions():
        kind = instruction.operation.removesuffix("-start")
        times = program.times[computation.name]
        if kind == "send" and _BETWEEN_SLICES in instruction.attributes and times:
            sent = computation.instructions[instruction.operands[0]]
            dtype = sent.results[0].dtype
            yield Collective(SEND_TO_SLICES, sent.bytes, 1, times, instruction.op_name, dtype)
        if kind not in COLLECTIVES or not times:
            continue
        if begun.get(_channel(instruction), computation.name) != computation.name:
            continue
        given = sum(
            computation.instructions[name].bytes
            for name in instruction.operands
            if name in computation.instructions
        )
        # The result of a `-start` holds the operands before the results.
        results, operands = instruction.results, len(instruction.operands)
        if instruction.operation.endswith("-start") and len(results) >= 2 * operands:
            results = results[operands : 2 * operands]
        got = sum(result.bytes for result in results)
        devices = _group_size(instruction.attributes)
        if kind == "all-reduce" and _only_a_part_is_kept(program, computation):
            kind = "reduce-scatter"
        payload = got if kind == "all-gather" else given
        if devices > 1 or kind == "collective-permute":
            op_name = instruction.op_name or _name_of_fusion(program, computation)
            yield Collective(kind, payload, devices, times, op_name, results[-1].dtype)


def _name_of_fusion(program: Program, computation: Computation) -> str:
    """What the fusion was that a computation is the inside of; else nothing."""
    names = (
        instruction.op_name
        for instruction, _ in program.instructions()
        if instruction.operation == "fusion" and computation.name in instruction.called
    )
    return next(names, "")


def _channel(instruction: Instruction) -> str | None:
    return instruction.attribute("channel_id")


def _begun_in_fusions(program: Program) -> dict[str | None, str]:
    """Channel -> the computation that begins its collective.

    A TPU's asynchronous collective is in three fusions: one that begins it, the product that runs
    at the same time, and one that waits for it. All three hold the instruction.
    """
    return {
        _channel(inner): name
        for instruction, _ in program.instructions()
        if instruction.operation == "fusion" and instruction.name.startswith("async-collective-st")
        for name in instruction.called
        for inner in program.computations[name].instructions.values()
        if inner.operation in COLLECTIVES
    }


def _only_a_part_is_kept(program: Program, computation: Computation) -> bool:
    """Whether a fusion is a reduction of which each device keeps a slice, as TPUs write it."""
    root = computation.instructions[computation.root].operation
    return computation.name in program.fused and root == "dynamic-slice"


def _group_size(attributes: str) -> int:
    """How many devices exchange with each other, from the ways in which XLA writes groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        size = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]):
            size *= int(part or sizes[name])
        return size
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    return 1


# ------------------------------------------------------------------- memory


def buffers(program: Program, at_least: int = 0) -> list[Buffer]:
    """Arrays that lie in memory at some time of a run, the largest first.

    at_least: bytes. Views of the same memory, such as a loop's state and its element, are each one.
    """
    found = [
        Buffer(array, computation.name, instruction.op_name)
        for instruction, computation in program.instructions()
        if computation.name not in program.fused and instruction.operation != "tuple"
        for array in instruction.results
        if array.bytes >= at_least
    ]
    return sorted(found, key=lambda buffer: -buffer.array.bytes)


def compiled_matmul_flops(compiled: jax.stages.Compiled) -> int:
    """FLOPs of all matrix products of one run of a compiled function. See `matmul_flops`."""
    return matmul_flops(read_program(compiled.as_text()))
