"""An assessment as tables for people: for `llamapro plan` and for docs/capacity.md."""

from __future__ import annotations

from collections import defaultdict

from llamapro_jax.capacity import Assessment
from llamapro_jax.machines import GIB

# (what, figure, remark)
Row = tuple[str, str, str]


def size(number: float) -> str:
    """Bytes, in the largest unit of which there is one."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number:,.0f} bytes"


def count(number: float | None, unit: str = "") -> str:
    """A large number in steps of a thousand."""
    if number is None:
        return "-"
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:,.2f} {prefix}{unit}"
    return f"{number:,.0f} {unit}".rstrip()


def seconds(time: float | None) -> str:
    if time is None:
        return "-"
    return f"{time:,.2f} s" if time >= 1 else f"{time * 1e3:.3g} ms"


def sections(assessment: Assessment) -> list[tuple[str, list[Row]]]:
    """Title and rows of each table."""
    found = [
        (_title(assessment), _what(assessment)),
        ("Memory of a device", _memory(assessment)),
        ("Work of a step", _work(assessment)),
        ("Collectives of a device, a step", _collectives(assessment)),
        ("Time", _time(assessment)),
    ]
    return [(title, rows) for title, rows in found if rows]


def _title(a: Assessment) -> str:
    verdict = "fits" if a.fits else "does not fit"
    return f"{a.run.model} on {a.topology} ({a.devices} devices): {verdict}"


def _what(a: Assessment) -> list[Row]:
    training = a.run.training
    mesh = " x ".join(f"{axis} {size}" for axis, size in a.mesh.items() if size > 1)
    share = a.trainable_parameters / a.parameters
    rows = [
        ("parameters", f"{a.parameters:,}", f"{a.trainable_parameters:,} train ({share:.1%})"),
        ("mesh", mesh or "1 device", ""),
        ("remat", training.remat, ""),
        ("microbatch", f"{training.microbatch}", f"rows a group, {a.microbatches} times a step"),
    ]
    if a.run.frozen_dtype != "compute":
        rows.append(("frozen weights", a.run.frozen_dtype, ""))
    return rows


def _memory(a: Assessment) -> list[Row]:
    rows = [
        ("frozen", size(a.base_bytes), ""),
        ("trained, float32", size(a.new_bytes), ""),
        ("optimizer", size(a.optimizer_bytes), ""),
        ("activations, gradients, gathered weights", size(a.activation_bytes), ""),
        ("peak", size(a.peak_bytes), f"of {size(a.hbm_bytes)}"),
    ]
    if not a.fits:
        rows.append(("too much", size(a.peak_bytes - a.hbm_bytes), ""))
        rows += [("it fits with", "", remedy) for remedy in a.advice]
        if not a.advice:
            rows.append(("it fits with", "", "none of the settings and larger machines tried"))
    return rows


def _work(a: Assessment) -> list[Row]:
    rows = [
        ("tokens", f"{a.tokens_per_step:,}", ""),
        ("useful FLOPs a token", count(a.useful_flops_per_token), "matrix products and attention"),
    ]
    if a.summary is not None:
        rows.append(
            ("compiled FLOPs a token", count(a.compiled_flops_per_token), "matrix products")
        )
        if a.attention_flops_per_token:
            kernels = ", ".join(f"{n} x {name}" for name, n in sorted(a.summary.kernels.items()))
            rows.append(("", count(a.attention_flops_per_token), f"attention kernels: {kernels}"))
    return rows


def _collectives(a: Assessment) -> list[Row]:
    if a.summary is None:
        return []
    moved: dict[tuple[str, str, int], float] = defaultdict(float)
    times: dict[tuple[str, str, int], int] = defaultdict(int)
    for c in a.summary.collectives:
        key = (c.kind, c.dtype, c.devices)
        moved[key] += c.moved * c.times
        times[key] += c.times
    rows = [
        (
            f"{kind}, {dtype}",
            count(bytes_moved, "B"),
            f"{times[kind, dtype, devices]:,} times over {devices} devices",
        )
        for (kind, dtype, devices), bytes_moved in sorted(moved.items(), key=lambda item: -item[1])
        if bytes_moved >= 1e6 or len(moved) < 4
    ]
    return [*rows, ("all", count(a.summary.collective_bytes, "B"), "")] if rows else []


def _time(a: Assessment) -> list[Row]:
    if a.seconds is None:
        return []
    step, steps = a.seconds.roofline, a.run.training.steps
    tokens = steps * a.tokens_per_step
    rows = [
        ("products at the peak rate", seconds(a.seconds.compute), ""),
        ("memory, at least", seconds(a.seconds.memory), ""),
        ("collectives", seconds(a.seconds.collectives), "beside the products where they overlap"),
    ]
    for name, factor in (("step at the roofline", 1), ("step at 50 %", 2)):
        rate = a.tokens_per_step / (step * factor)
        rows.append(
            (
                name,
                seconds(step * factor),
                f"{rate:,.0f} tokens/s, {rate / a.devices:,.0f} a device; {steps:,} steps, "
                f"{count(tokens)} tokens: {a.days(1 / factor):,.2f} days",
            )
        )
    return rows
