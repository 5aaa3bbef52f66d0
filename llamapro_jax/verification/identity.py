"""The identity proof: with the new blocks off, a model is its base, bit for bit.

Tensors are compared by the hashes of their bytes, read now on both sides; of a recorded hash
nothing is believed. What decides the computation beside them is compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.fingerprint import TensorPrint, tensor_print
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import Tensor, tensors
from llamapro_jax.sources import Source
from llamapro_jax.verification.findings import Findings, progress

PrintOf = Callable[[Tensor], TensorPrint | None]


def prove_base(
    findings: Findings,
    where: str,
    config: ModelConfig,
    plan: ExpansionPlan,
    print_of: PrintOf,
    base: Source,
) -> None:
    """Compares every tensor of `base` with the one that it became.

    print_of: of a tensor of the grown model; None when it could not be read, which is then a
    problem already.
    """
    before = len(findings.problems)
    generation = _generation(plan, base.plan)
    if generation is None:
        findings.problem(
            where,
            "expansion plan",
            f"{plan.base_blocks} blocks and {plan.generation} generations",
            f"one that grew from the {base.plan.num_blocks} blocks and "
            f"{base.plan.generation} generations of {base.path}",
        )
        return
    for one in fields(ModelConfig):
        if one.name != "num_blocks":
            findings.compare(
                where, one.name, getattr(config, one.name), getattr(base.config, one.name)
            )
    depths = plan.depths_until(generation)
    expected = list(tensors(base.config))
    same = 0
    with progress("comparing with the base", len(expected)) as done:
        for tensor in expected:
            deep = Tensor(tensor.weight, None if tensor.block is None else depths[tensor.block])
            with findings.collecting(base.path):
                wanted = tensor_print(base.read(tensor))
                same += _compare(findings, where, deep, print_of(deep), wanted)
            done(1)
    findings.count("tensors of the base", len(expected))
    if same == len(expected) and len(findings.problems) == before:
        inserted = plan.num_blocks - base.plan.num_blocks
        findings.notes.append(
            f"identity proven: all {same} tensors of {base.path} are in it bit for bit; without "
            f"the {inserted} blocks inserted since it is that base"
        )


def _generation(plan: ExpansionPlan, base: ExpansionPlan) -> int | None:
    """After which generation the model was laid out as the base is."""
    return next((g for g in range(plan.generation + 1) if plan.until(g) == base), None)


def _compare(
    findings: Findings, where: str, deep: Tensor, found: TensorPrint | None, wanted: TensorPrint
) -> bool:
    if found is None:
        return False
    for what in ("shape", "dtype", "sha256"):
        value, expected = getattr(found, what), getattr(wanted, what)
        if value != expected:
            findings.problem(where, deep.name, f"{what} {value}", f"the base's {expected}")
            return False
    return True
