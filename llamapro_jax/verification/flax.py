"""A Flax checkpoint: every tensor against the hash that was written with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamapro_jax import flax_checkpoint
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.fingerprint import FILE as FINGERPRINT_FILE
from llamapro_jax.fingerprint import Fingerprint, TensorPrint, tensor_print
from llamapro_jax.hf.config import read_config
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import Tensor, tensors
from llamapro_jax.sources import Source
from llamapro_jax.verification.files import check_files
from llamapro_jax.verification.findings import Findings, progress
from llamapro_jax.verification.hugging_face import (
    check_tokenizer,
    compare_names,
    compare_prints,
)
from llamapro_jax.verification.identity import prove_base


def verify_flax(findings: Findings, directory: Path, base: Source | None) -> None:
    """Reads and hashes every tensor. A config.json that cannot be read ends it, as a problem."""
    lineage: tuple[Mapping[str, Any], ...] | None = None
    with findings.collecting(directory / flax_checkpoint.DESCRIPTION):
        lineage = flax_checkpoint.read_description(directory)
    check_files(findings, directory)
    check_tokenizer(findings, directory)
    record = None
    with findings.collecting(directory / FINGERPRINT_FILE):
        record = Fingerprint.read(directory)
    with findings.collecting(directory / "config.json"):
        _, config, plan = read_config(directory)
        prints = _hash(findings, directory, config, plan)
        if record is not None:
            places = _places(directory, config, plan)
            compare_names(findings, directory / FINGERPRINT_FILE, record, set(places))
            compare_prints(findings, places, prints, record)
            _check_lineage(findings, directory, record, plan, lineage or ())
        if base is not None:

            def print_of(tensor: Tensor) -> TensorPrint | None:
                return prints.get(tensor.name)

            prove_base(findings, str(directory), config, plan, print_of, base)


def _places(directory: Path, config: ModelConfig, plan: ExpansionPlan) -> dict[str, Path]:
    """Where each tensor of the model lies."""
    params = directory / flax_checkpoint.PARAMS
    return {t.name: params / flax_checkpoint.address(t, plan)[0] for t in tensors(config)}


def _hash(
    findings: Findings, directory: Path, config: ModelConfig, plan: ExpansionPlan
) -> dict[str, TensorPrint]:
    arrays = flax_checkpoint.StackedArrays(directory / flax_checkpoint.PARAMS)
    usable = _check_leaves(findings, arrays, config, plan)
    prints = {}
    total = sum(t.weight.size(config) for t in tensors(config))
    with progress("tensors", total) as done:
        for tensor in tensors(config):
            leaf, row = flax_checkpoint.address(tensor, plan)
            if leaf in usable:
                try:
                    array = tensor.weight.to_hf(arrays.read(leaf, row), config)
                except UserError as error:
                    findings.problem(arrays.directory / leaf, tensor.name, error, "a tensor")
                else:
                    prints[tensor.name] = tensor_print(array)
                    findings.count("tensors hashed")
            done(tensor.weight.size(config))
    return prints


def _check_leaves(
    findings: Findings,
    arrays: flax_checkpoint.StackedArrays,
    config: ModelConfig,
    plan: ExpansionPlan,
) -> set[str]:
    """The leaves that are there in their shape; problems for the others, and for what is more."""
    expected = flax_checkpoint.leaves(config, plan)
    usable = set()
    for leaf, (_, shape) in expected.items():
        with findings.collecting(arrays.directory / leaf):
            found = arrays.shape(leaf)
            if findings.compare(arrays.directory / leaf, None, f"shape {found}", f"shape {shape}"):
                usable.add(leaf)
    present = {file.parent.name for file in arrays.directory.glob("*/.zarray")}
    for extra in sorted(present - set(expected)):
        findings.problem(arrays.directory / extra, None, "an array", "none, as config.json says")
    return usable


def _check_lineage(
    findings: Findings,
    directory: Path,
    record: Fingerprint,
    plan: ExpansionPlan,
    lineage: tuple[Mapping[str, Any], ...],
) -> None:
    """That without the last generation it is the model which the lineage says was expanded."""
    expansions = [i for i, entry in enumerate(lineage) if entry["verb"] == "expand"]
    if not expansions or not plan.generation or "base_digest" not in lineage[expansions[-1]]:
        return
    since = lineage[expansions[-1] + 1 :]
    # An export may have cast all tensors; a training of more than the new blocks changed them.
    if any(
        entry["verb"] == "export" or list(entry.get("trainable", ["new"])) != ["new"]
        for entry in since
    ):
        return
    findings.compare(
        directory / FINGERPRINT_FILE,
        f"digest without generation {plan.generation}",
        record.until(plan, plan.generation - 1).digest,
        lineage[expansions[-1]]["base_digest"],
    )
