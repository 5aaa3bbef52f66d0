"""Whether a run fits a machine, and how fast it can be there: from its compiled training step.

The step is the one that `train` runs, lowered and compiled for the machine, which need not be
there. What it computes, moves and needs is read from the compiled program; time is a bound from
the machine's published rates, see `Seconds`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamapro_jax.architecture import check_length
from llamapro_jax.config import RunConfig
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.flops import first_trained, step_flops
from llamapro_jax.machines import GIB, Machine, parse_machine
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.precision import full_precision
from llamapro_jax.model.weights import total_parameters
from llamapro_jax.program import SEND_TO_SLICES, Summary, summarize
from llamapro_jax.sharding import build_mesh, check_model, mesh_shape
from llamapro_jax.topology import devices_of
from llamapro_jax.training.abstract import Arguments, abstract_arguments
from llamapro_jax.training.fit import (
    DoesNotFit,
    Fitted,
    check_rows,
    leanest,
    peak_bytes,
    resolve,
)
from llamapro_jax.training.state import check_spec
from llamapro_jax.training.step import build_train_step
from llamapro_jax.xla import compiler_options

Report = Callable[[str], None]
SECONDS_A_DAY = 86400


@dataclass(frozen=True)
class Seconds:
    """Lower bounds of a step's time, on each device. Nothing runs faster than the slowest of them.

    compute: FLOPs of the compiled matrix products and of the attention kernels, at the peak.
    memory: bytes that must pass between memory and the chip, at its bandwidth: all weights that
    are multiplied, once a microbatch forward and once backward as far as that reaches, and what
    trains with its gradient and two moments, read and written once.
    collectives: bytes of the compiled collectives over the device's links, and over its share of
    the network what the program sends to other slices.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def roofline(self) -> float:
        return max(self.compute, self.memory, self.collectives)


@dataclass(frozen=True)
class Assessment:
    """What is known of a run on a machine; bytes are of one device. None: not known.

    activation_bytes: all of the peak that is no argument of the step. compiled figures and times
    are of the step that fits, None when none does.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    run: RunConfig
    microbatches: int
    parameters: int
    trainable_parameters: int
    base_bytes: int
    new_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    hbm_bytes: int
    fits: bool
    tokens_per_step: int
    useful_flops_per_token: float
    summary: Summary | None
    attention_flops_per_token: float | None
    seconds: Seconds | None
    compile_seconds: float
    advice: tuple[str, ...] = ()

    @property
    def activation_bytes(self) -> int:
        return self.peak_bytes - self.base_bytes - self.new_bytes - self.optimizer_bytes

    @property
    def compiled_flops_per_token(self) -> float | None:
        if self.summary is None:
            return None
        return self.summary.matmul_flops * self.devices / self.tokens_per_step

    def days(self, share: float = 1.0) -> float | None:
        """Days that all steps take at a share of the roofline."""
        if self.seconds is None:
            return None
        return self.seconds.roofline / share * self.run.training.steps / SECONDS_A_DAY

    def as_json(self) -> dict[str, Any]:
        """One flat object. `..._at_50_percent`: when everything takes twice the bound."""
        seconds, summary = self.seconds, self.summary
        step = None if seconds is None else seconds.roofline
        rate = None if step is None else self.tokens_per_step / step
        of_kind: dict[str, float] = {}
        for collective in () if summary is None else summary.collectives:
            name = collective.kind.replace("-", "_")
            of_kind[name] = of_kind.get(name, 0) + collective.moved * collective.times
        return {
            "topology": self.topology,
            "devices": self.devices,
            **{f"mesh_{axis}": size for axis, size in self.mesh.items()},
            "model": self.run.model,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "remat": self.run.training.remat,
            "microbatch": self.run.training.microbatch,
            "microbatches": self.microbatches,
            "frozen_dtype": self.run.frozen_dtype,
            "fits": self.fits,
            "hbm_bytes_per_device": self.hbm_bytes,
            "peak_bytes_per_device": self.peak_bytes,
            "missing_bytes_per_device": max(0, self.peak_bytes - self.hbm_bytes),
            "base_bytes_per_device": self.base_bytes,
            "new_bytes_per_device": self.new_bytes,
            "optimizer_bytes_per_device": self.optimizer_bytes,
            "activation_bytes_per_device": self.activation_bytes,
            "tokens_per_step": self.tokens_per_step,
            "useful_flops_per_token": self.useful_flops_per_token,
            "compiled_matmul_flops_per_token": self.compiled_flops_per_token,
            "attention_kernel_flops_per_token": self.attention_flops_per_token,
            "kernel_calls": None if summary is None else sum(summary.kernels.values()),
            "collective_bytes_per_step": None if summary is None else summary.collective_bytes,
            **{f"{name}_bytes_per_step": size for name, size in sorted(of_kind.items())},
            "step_seconds_compute": None if seconds is None else seconds.compute,
            "step_seconds_memory": None if seconds is None else seconds.memory,
            "step_seconds_collectives": None if seconds is None else seconds.collectives,
            "step_seconds_roofline": step,
            "step_seconds_at_50_percent": None if step is None else 2 * step,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": None if rate is None else rate / self.devices,
            "tokens_per_second_per_device_at_50_percent": (
                None if rate is None else rate / self.devices / 2
            ),
            "days_roofline": self.days(),
            "days_at_50_percent": self.days(0.5),
            "compile_seconds": self.compile_seconds,
            "advice": "; ".join(self.advice),
        }


def assess(
    run: RunConfig,
    config: ModelConfig,
    plan: ExpansionPlan,
    machine: Machine,
    report: Report = lambda line: None,
) -> Assessment:
    """Compiles the training step for the machine and reads the program.

    Raises UserError, before anything is compiled, when the model or the batch does not divide over
    the mesh. A step that does not fit is no error: `advice` says what would make it fit.
    """
    target = Target(run, config, plan, machine, report)
    began = time.monotonic()
    try:
        fitted = target.fit()
    except DoesNotFit as problem:
        spent = time.monotonic() - began
        return _assessment(target, problem.run, None, problem.needed, spent, _advice(target))
    compiled = fitted.compiled or target.compile(fitted.run)
    spent = time.monotonic() - began
    peak = peak_bytes(compiled)
    # A CPU's memory is no limit to `auto`, and may be too little all the same.
    advice = _advice(target) if peak > target.hbm else ()
    return _assessment(target, fitted.run, compiled, peak, spent, advice)


class Target:
    """A run on a machine: checked, and ready to be compiled."""

    def __init__(
        self,
        run: RunConfig,
        config: ModelConfig,
        plan: ExpansionPlan,
        machine: Machine,
        report: Report,
    ) -> None:
        self.run, self.config, self.plan = run, config, plan
        self.machine, self.report = machine, report
        check_spec(run.trainable, config, plan)
        check_length(run, config)
        self.shape = mesh_shape(run.mesh, machine.devices, machine.slices)
        check_model(config, self.shape)
        check_rows(run, self.shape)
        self.mesh: Mesh = build_mesh(run.mesh, devices_of(machine))

    @property
    def memory(self) -> int | None:
        """Bytes that a device has for the step; None: as much as it takes."""
        return self.machine.chip.hbm_bytes or None

    @property
    def hbm(self) -> int:
        """Bytes that a device has; of a CPU, its share of this machine's memory."""
        return self.memory or _host_memory() // self.machine.devices

    def arguments(self, run: RunConfig) -> Arguments:
        with jax.set_mesh(self.mesh):
            return abstract_arguments(self.config, self.plan, run, self.mesh)

    def compile(self, run: RunConfig) -> jax.stages.Compiled:
        arguments = self.arguments(run)
        step = build_train_step(self.config, self.plan, run, arguments.optimizer)
        with jax.set_mesh(self.mesh), full_precision(jnp.dtype(run.compute_dtype)):
            lowered = step.trace(arguments.state, arguments.frozen, arguments.batch).lower()
        return lowered.compile(compiler_options=compiler_options(self.machine.chip.name, run.xla))

    def fit(self) -> Fitted:
        return resolve(
            self.run,
            self.config,
            self.plan,
            self.shape,
            self.memory,
            self.compile,
            self.report,
        )


def _assessment(
    target: Target,
    run: RunConfig,
    compiled: jax.stages.Compiled | None,
    peak: float,
    compile_seconds: float,
    advice: tuple[str, ...] = (),
) -> Assessment:
    config, plan, machine = target.config, target.plan, target.machine
    arguments = target.arguments(run)
    frozen, state = arguments.frozen, arguments.state
    tokens = run.data.batch_size * run.data.sequence_length
    flops = step_flops(config, plan, run.trainable, run.data.sequence_length)
    rows = check_rows(run, target.shape)
    parts = rows // run.training.microbatch
    summary = attention = seconds = None
    if compiled is not None:
        summary = summarize(compiled.as_text())
        attention = _attention_flops(target, summary, flops.attention, parts)
        seconds = _seconds(target, run, summary, attention * tokens, parts)
    return Assessment(
        topology=machine.name,
        devices=machine.devices,
        mesh=target.shape,
        run=run,
        microbatches=parts,
        parameters=total_parameters(config),
        trainable_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.trainable)),
        base_bytes=_device_bytes(frozen),
        new_bytes=_device_bytes(state.trainable),
        optimizer_bytes=_device_bytes(state.opt_state),
        peak_bytes=int(peak),
        hbm_bytes=target.hbm,
        fits=compiled is not None and peak <= target.hbm,
        tokens_per_step=tokens,
        useful_flops_per_token=flops.total,
        summary=summary,
        attention_flops_per_token=attention,
        seconds=seconds,
        compile_seconds=compile_seconds,
        advice=advice,
    )


def _device_size(leaf: jax.ShapeDtypeStruct) -> int:
    """Elements of one device's part of an abstract array; a scalar counter has no sharding."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape)


def _device_bytes(tree: Any) -> int:
    return sum(_device_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------- time


def _attention_flops(target: Target, summary: Summary, useful: float, parts: int) -> float:
    """FLOPs a token of the attention kernels, which the program's text does not show.

    A forward kernel makes two products of queries and keys, a backward one five: it computes the
    scores again. A forward kernel may run again in the backward pass.
    """
    if not summary.kernels:
        return 0.0
    blocks = target.plan.num_blocks
    first = first_trained(target.plan, target.run.trainable)
    reached = 0 if first is None else blocks - first
    forward = useful / (blocks + 2 * reached)
    calls = sum(n for name, n in summary.kernels.items() if _is_forward(name))
    # Over `context` a block makes several smaller calls, whose sum is one.
    again = 1.0 if target.shape["context"] > 1 else max(1.0, calls / (blocks * parts))
    return forward * (blocks * again + 2.5 * reached)


def _is_forward(kernel: str) -> bool:
    return not any(part in kernel.lower() for part in ("backward", "bwd", "dkv", "dq"))


def _seconds(
    target: Target, run: RunConfig, summary: Summary, attention: float, parts: int
) -> Seconds:
    machine, chip, shape = target.machine, target.machine.chip, target.shape
    plan, config = target.plan, target.config
    peak = chip.peak_flops or _measured_peak() / machine.devices
    compute = (summary.matmul_flops + attention / machine.devices) / peak

    arguments = target.arguments(run)
    trained = sum(_device_size(leaf) for leaf in jax.tree.leaves(arguments.state.trainable))
    first = first_trained(plan, run.trainable)
    reached = 0 if first is None else 1 - first / plan.num_blocks
    used = total_parameters(config) * jnp.dtype(run.compute_dtype).itemsize / shape["tensor"]
    # Weight, gradient and two moments in float32; three of them are written again.
    memory = parts * used * (1 + reached) + 7 * 4 * trained

    between = sum(c.moved * c.times for c in summary.collectives if c.kind == SEND_TO_SLICES)
    within = summary.collective_bytes - between

    def over(size: float, bandwidth: float) -> float:
        return size / bandwidth if bandwidth else 0.0

    return Seconds(
        compute=compute,
        memory=over(memory, chip.hbm_bandwidth),
        collectives=over(within, machine.interconnect_bandwidth())
        + over(between, chip.network_bandwidth),
    )


def _measured_peak(size: int = 1024, times: int = 5) -> float:
    """FLOP/s of a float32 matrix product on this CPU: there is no published figure for it."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = math.inf
    for _ in range(times):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


# ------------------------------------------------------------------- what would make it fit


def _advice(target: Target) -> tuple[str, ...]:
    """What was tried, and makes the run fit: settings first, then larger machines."""
    run, machine, report = target.run, target.machine, target.report
    found = []
    free = replace(run, training=replace(run.training, remat="auto", microbatch="auto"))
    # Of a machine with a limit `auto` has found already that nothing fits.
    if free != run or target.memory is None:
        if (settings := _leanest_fits(target, free, machine)) is not None:
            found.append(settings)
    base_is_frozen = run.trainable != ("all",) and run.frozen_dtype == "compute"
    if base_is_frozen and not found:
        report("trying frozen_dtype int8")
        settings = _leanest_fits(target, replace(free, frozen_dtype="int8"), machine)
        if settings is not None:
            found.append(f"frozen_dtype=int8 ({settings})")
    for name in machine.next_larger():
        report(f"trying {name}")
        settings = _leanest_fits(target, free, parse_machine(name))
        if settings is not None:
            found.append(f"topology={name} ({settings})")
            break
    return tuple(found)


def _leanest_fits(target: Target, run: RunConfig, machine: Machine) -> str | None:
    """The settings with which the leanest step of a run fits a machine; None when it does not."""
    try:
        other = Target(run, target.config, target.plan, machine, target.report)
        other.run = leanest(run, target.config, target.plan, other.shape)
        fitted = other.fit()
    except UserError:  # Neither does the batch divide over every machine.
        return None
    peak = peak_bytes(fitted.compiled or other.compile(fitted.run))
    if peak > other.hbm:
        return None
    training = fitted.run.training
    return (
        f"training.remat={training.remat} training.microbatch={training.microbatch}: "
        f"{peak / GIB:.1f} GiB"
    )
