"""`remat: auto` and `microbatch: auto`: the fastest step that fits in memory.

`train` asks it for the devices that are here, `llamapro plan` for those of a machine that is not:
who asks brings `compile_candidate`. A model of memory and time orders the candidates, and the
compiler decides: few are compiled, usually one.

T sequence length, D model, F feed-forward, H query heads, K key/value heads, C head dim,
V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from llamapro_jax.config import RunConfig
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.flops import StepFlops, first_trained, step_flops
from llamapro_jax.model.config import ModelConfig, Remat
from llamapro_jax.model.weights import Weight, block_weights, outer_weights
from llamapro_jax.sharding import check_batch
from llamapro_jax.training.state import dtype_of, trains

GIB = 2**30

# What `remat: auto` tries. Not `none`: what it keeps besides `minimal` costs as much to write and
# read as to compute again, and twice the memory.
_REMATS: tuple[Remat, ...] = ("minimal", "attention", "full")
# Float operations in the time in which a byte crosses the interconnect, and in which one is read
# from memory; of the machines of `llamapro_jax.machines` 760 (v5p, all links) to 2,200 (H100), and
# 170 (v5p) to 560 (v6e).
_FLOPS_A_BYTE_OVER_LINKS = 2000
_FLOPS_A_BYTE_OF_MEMORY = 250
# Collectives run beside the products, but for about this share of them.
_EXPOSED = 0.1
# A larger microbatch gains nothing once what each one costs is this share of the time.
_ENOUGH = 0.015
# The part of a block's products that is computed again without their results: all but `down`, which
# only the next block reads.
_FORWARD_AGAIN = 0.8
# How far the model of memory may be below what compilers need.
_MARGIN = 1.1

CompileCandidate = Callable[[RunConfig], jax.stages.Compiled]


@dataclass(frozen=True)
class Candidate:
    """microbatch: rows that each group of devices takes at a time.

    bytes: memory of a device by the model. seconds: time of a step by the model, in a unit of its
    own.
    """

    remat: Remat
    microbatch: int
    bytes: float
    seconds: float

    def of(self, run: RunConfig) -> RunConfig:
        """The run with this remat and microbatch."""
        training = replace(run.training, remat=self.remat, microbatch=self.microbatch)
        return replace(run, training=training)

    def __str__(self) -> str:
        return f"remat {self.remat}, microbatch {self.microbatch}"


@dataclass(frozen=True)
class Fitted:
    """run: with a remat and a microbatch in the place of `auto`. compiled: its step; None where
    memory is no matter and nothing was compiled."""

    run: RunConfig
    compiled: jax.stages.Compiled | None = None


class DoesNotFit(UserError):
    """Not even the leanest candidate fits. needed and memory: bytes of a device."""

    def __init__(self, run: RunConfig, needed: float, memory: float) -> None:
        self.run, self.needed, self.memory = run, needed, memory
        training = run.training
        super().__init__(
            f"the training step does not fit: it needs {needed / GIB:.2f} GiB of each device, "
            f"which has {memory / GIB:.2f}: {(needed - memory) / GIB:.2f} GiB too much, with "
            f"training.remat {training.remat} and training.microbatch {training.microbatch}, the "
            "leanest that may be taken."
        )


def resolve(
    run: RunConfig,
    config: ModelConfig,
    plan: ExpansionPlan,
    mesh: Mapping[str, int],
    memory: int | None,
    compile_candidate: CompileCandidate,
    report: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """The run with the fastest remat and microbatch that fit, and its compiled step.

    mesh: size of each axis. memory: bytes that a device has for the program; None where it is no
    matter (a CPU): `auto` is then `none` and all rows, and nothing is compiled. report: takes a
    line for the log. What the run sets itself stays; it is compiled all the same.

    Raises UserError when rows do not divide, before anything is compiled, and DoesNotFit.
    """
    rows = check_rows(run, mesh)
    if memory is None:
        training = run.training
        remat = "none" if training.remat == "auto" else training.remat
        part = rows if training.microbatch == "auto" else training.microbatch
        return Fitted(replace(run, training=replace(training, remat=remat, microbatch=part)))
    left = sorted(candidates(run, config, plan, mesh), key=lambda c: c.seconds)
    least = min(left, key=lambda c: c.bytes)
    # What compilers needed, as a share of what the model said.
    scale = 1.0
    needed = math.inf
    while left:
        likely = [c for c in left if c.bytes * scale <= memory * _MARGIN]
        candidate = likely[0] if likely else least
        report(f"compiling with {candidate} (about {candidate.bytes * scale / GIB:.1f} GiB)")
        concrete = candidate.of(run)
        compiled, needed = _attempt(compile_candidate, concrete)
        if compiled is not None and needed <= memory:
            report(f"fits: {needed / GIB:.2f} of {memory / GIB:.2f} GiB")
            return Fitted(concrete, compiled)
        report(f"does not fit: {needed / GIB:.2f} of {memory / GIB:.2f} GiB")
        scale = needed / candidate.bytes
        if candidate is least:
            break
        # Slower ones that take no less memory would not fit either.
        left = [c for c in left if c.bytes < candidate.bytes]
    raise DoesNotFit(least.of(run), needed, memory)


def _attempt(
    compile_candidate: CompileCandidate, run: RunConfig
) -> tuple[jax.stages.Compiled | None, float]:
    """(compiled step, bytes that it needs); None when the compiler found that it does not fit."""
    try:
        compiled = compile_candidate(run)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_by(str(error))
        if needed is None:
            raise
        return None, needed
    return compiled, peak_bytes(compiled)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """The most memory of a device that a run of the program has in use, arguments included."""
    memory = compiled.memory_analysis()
    lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes
    lasting -= memory.alias_size_in_bytes
    # The CPU compiler's peak has arguments and results alone.
    if memory.peak_memory_in_bytes < lasting + memory.temp_size_in_bytes / 2:
        return lasting + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OUT_OF_MEMORY = (
    re.compile(r"memory space hbm\. Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
    re.compile(r"Ran out of memory on HBM, .*?\(([\d.]+)([KMGT]?)\) exceeds"),
    re.compile(r"[Oo]ut of memory .*?allocate ([\d.]+)([KMGT]?)i?B"),
)


def needed_by(message: str) -> float | None:
    """Bytes that a program needs, from a compiler's error; None when it says something else."""
    for pattern in _OUT_OF_MEMORY:
        if found := pattern.search(message):
            return float(found[1]) * _UNITS[found[2]]
    return None


def device_memory(devices: Sequence[Any]) -> int | None:
    """Bytes that a program gets of each of these devices; None where it is not known (a CPU)."""
    statistics = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    return None if statistics is None else statistics.get("bytes_limit")


# ------------------------------------------------------------------- candidates


def check_rows(run: RunConfig, mesh: Mapping[str, int]) -> int:
    """Rows of a batch of each group of devices. Raises UserError when they do not divide."""
    batch, part = run.data.batch_size, run.training.microbatch
    check_batch(batch, run.data.sequence_length, mesh, "data.batch_size")
    rows = batch // (mesh["data"] * mesh["fsdp"])
    if part != "auto" and rows % part:
        raise UserError(
            f"training.microbatch: {part} does not divide the {rows} rows of each group of devices "
            f"(data.batch_size {batch} over mesh.data {mesh['data']} x mesh.fsdp {mesh['fsdp']})."
        )
    return rows


def candidates(
    run: RunConfig, config: ModelConfig, plan: ExpansionPlan, mesh: Mapping[str, int]
) -> list[Candidate]:
    """What the run leaves open, each combination once."""
    rows = check_rows(run, mesh)
    model = _Model(run, config, plan, mesh, rows)
    remats = _REMATS if run.training.remat == "auto" else (run.training.remat,)
    parts = [run.training.microbatch]
    if run.training.microbatch == "auto":
        divisors = [part for part in range(1, rows + 1) if rows % part == 0]
        enough = [part for part in divisors if model.cost_of_parts(part) <= _ENOUGH]
        parts = [part for part in divisors if not enough or part <= enough[0]]
    return [
        Candidate(remat, part, model.bytes(remat, part), model.seconds(remat, part))
        for remat in remats
        for part in parts
    ]


def leanest(
    run: RunConfig, config: ModelConfig, plan: ExpansionPlan, mesh: Mapping[str, int]
) -> RunConfig:
    """The run with what it leaves open set so that it takes the least memory."""
    return min(candidates(run, config, plan, mesh), key=lambda c: c.bytes).of(run)


@dataclass(frozen=True)
class _Model:
    """Memory and time of a step, near enough to order candidates. rows: of a group of devices."""

    run: RunConfig
    config: ModelConfig
    plan: ExpansionPlan
    mesh: Mapping[str, int]
    rows: int

    @property
    def _width(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.run.compute_dtype).itemsize

    @property
    def _reached(self) -> int:
        """Blocks that the backward pass reaches, which keep something for it."""
        first = first_trained(self.plan, self.run.trainable)
        return 0 if first is None else self.plan.num_blocks - first

    def _weights(self) -> list[tuple[str, Weight, int]]:
        """(stack, row, how often) of everything in the model."""
        blocks = {"base": self.plan.num_blocks - self.plan.num_new, "new": self.plan.num_new}
        rows = [(stack, w, n) for stack, n in blocks.items() for w in block_weights(self.config)]
        return rows + [("outer", w, 1) for w in outer_weights(self.config)]

    def _trained(self) -> float:
        """Parameters of a device that train."""
        spec = self.run.trainable
        count = sum(w.size(self.config) * n for s, w, n in self._weights() if trains(spec, s, w))
        return count / (self.mesh["fsdp"] * self.mesh["tensor"])

    def _resident(self) -> float:
        """Bytes of weights and optimizer state. What trains: float32, and two moments of it."""
        spec = self.run.trainable
        dtype = dtype_of(spec, self.run.compute_dtype, self.run.frozen_dtype)
        frozen = sum(
            w.size(self.config) * n * dtype(s, w).itemsize
            for s, w, n in self._weights()
            if not trains(spec, s, w)
        )
        return 12 * self._trained() + frozen / (self.mesh["fsdp"] * self.mesh["tensor"])

    def _kept(self, remat: Remat) -> float:
        """Bytes that a block keeps of each token for its backward pass, see `model.remat`."""
        config, share = self.config, self.mesh["tensor"]
        D, width = config.hidden_size, self._width
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = width * heads / share + 4 * config.num_heads / share
        products = width * ((heads + 2 * kv + 2 * config.intermediate_size) / share + D)
        return {
            "full": width * D,
            "attention": width * D + attention,
            "minimal": width * D + attention + products,
            # Also what lies between the products: norms, silu, their factors in float32.
            "none": 2 * (width * D + attention + products),
        }[remat]

    def bytes(self, remat: Remat, part: int) -> float:
        """Memory of a device."""
        config, share = self.config, self.mesh["tensor"]
        tokens = part * self.run.data.sequence_length / self.mesh["context"]
        kept = self._kept(remat) * self._reached * tokens
        # One block at work in the backward pass, with its gradients.
        at_work = 2 * self._kept("none") * tokens
        # Weights of blocks as they are multiplied, where they are stored in parts: compilers gather
        # those of some blocks ahead (four: as measured for TPUs); and the head.
        block = sum(w.size(config) for w in block_weights(config))
        gathered = 4 * block * self._width / share if self.mesh["fsdp"] > 1 else 0.0
        head = config.vocab_size * config.hidden_size * self._width / share
        logits = 8 * min(self.run.training.loss_chunk, tokens) * config.vocab_size / share
        # The gradients, and their sum over the microbatches.
        gradients = 4 * self._trained() * (2 if self.rows > part else 1)
        return self._resident() + kept + max(at_work + gathered, head + logits) + gradients

    def _useful(self) -> StepFlops:
        length = self.run.data.sequence_length
        return step_flops(self.config, self.plan, self.run.trainable, length)

    def _gathers(self, part: int) -> float:
        """Time that gathering the weights takes, as a share of the time of the products."""
        if self.mesh["fsdp"] == 1:
            return 0.0
        tokens = part * self.run.data.sequence_length / self.mesh["context"]
        size = sum(w.size(self.config) * n for s, w, n in self._weights() if s != "outer")
        # Forward for all blocks, backward for those that it reaches.
        times = 1 + self._reached / self.plan.num_blocks
        moved = times * size * self._width
        return moved * _FLOPS_A_BYTE_OVER_LINKS / (tokens * self._useful().total)

    def cost_of_parts(self, part: int) -> float:
        """What a microbatch costs however small it is, as a share of the time of its products."""
        cost = _EXPOSED * self._gathers(part)
        if self.rows > part:
            # Both gradients are read, and the sum is written.
            added = 12 * self._trained()
            tokens = part * self.run.data.sequence_length / self.mesh["context"]
            flops = tokens * self._useful().total / self.mesh["tensor"]
            cost += added * _FLOPS_A_BYTE_OF_MEMORY / flops
        return cost

    def seconds(self, remat: Remat, part: int) -> float:
        """Time of a step; 1 is that of its useful products."""
        flops = self._useful()
        head = 2 * self.config.vocab_size * self.config.hidden_size
        forward = (flops.forward - head) * self._reached / self.plan.num_blocks
        again = {"none": 0.0, "minimal": 0.01, "attention": _FORWARD_AGAIN, "full": _FORWARD_AGAIN}
        extra = again[remat] * forward
        if remat == "full":
            extra += flops.attention / 3
        return max(1 + extra / flops.total, self._gathers(part)) + self.cost_of_parts(part)
