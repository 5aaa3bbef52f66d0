"""A delta: the new blocks of a model, and the base that they belong to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamapro_jax.delta import DESCRIPTION, FORMAT
from llamapro_jax.expansion import ExpansionPlan, checked_lineage
from llamapro_jax.files import check_format, read_json
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.hf.safetensors import Stored
from llamapro_jax.model.weights import BLOCK, Tensor, block_weights
from llamapro_jax.sources import Source, compute_fingerprint
from llamapro_jax.verification.files import check_files
from llamapro_jax.verification.findings import Findings
from llamapro_jax.verification.hugging_face import check_tokenizer, hash_stored, read_headers


def verify_delta(findings: Findings, directory: Path, base: Source | None) -> None:
    """Checks names, shapes and the hash of all its tensors, and that `base` is its base."""
    path = directory / DESCRIPTION
    stored = read_headers(findings, directory)
    check_tokenizer(findings, directory)
    check_files(findings, directory)
    prints = hash_stored(findings, stored)
    with findings.collecting(path):
        description = read_json(path)
        check_format(description, FORMAT, path)
        checked_lineage(description.get("lineage", ()), str(path))
        found = Fingerprint(prints).digest
        findings.compare(path, "digest of the tensors", found, description.get("digest"))
        plan = ExpansionPlan.from_json(description.get("plan"), str(path))
        _check_names(findings, directory, plan, stored)
        if base is not None:
            _check_base(findings, directory, plan, stored, base, description.get("base_digest"))


def _check_names(
    findings: Findings, directory: Path, plan: ExpansionPlan, stored: dict[str, Stored]
) -> None:
    """Exactly the blocks of the last generation are there, all alike."""
    known = {weight.hf_name: weight for weight in BLOCK}
    depths = plan.new_depths
    for depth in depths:
        for name, weight in known.items():
            tensor = Tensor(weight, depth)
            twins = [stored.get(Tensor(known[name], d).name) for d in depths]
            first = next((twin for twin in twins if twin is not None), None)
            if first is None:  # a bias, which models of this kind do not have
                continue
            found = stored.get(tensor.name)
            if found is None:
                findings.problem(directory, tensor.name, "no such tensor", "one")
                continue
            for what in ("shape", "dtype"):
                value, other = getattr(found, what), getattr(first, what)
                findings.compare(found.file, tensor.name, f"{what} {value}", f"{what} {other}")
    expected = {Tensor(weight, depth).name for weight in BLOCK for depth in depths}
    for name in sorted(set(stored) - expected):
        findings.problem(
            stored[name].file, name, "a tensor", f"only those of the new blocks {list(depths)}"
        )
    if not any(name in stored for name in expected):
        findings.problem(directory, None, "no tensor of a new block", f"blocks {list(depths)}")


def _check_base(
    findings: Findings,
    directory: Path,
    plan: ExpansionPlan,
    stored: dict[str, Stored],
    base: Source,
    digest: object,
) -> None:
    path = directory / DESCRIPTION
    before = len(findings.problems)
    found = compute_fingerprint(base).digest
    findings.compare(path, f"base_digest, against {base.path}", digest, found)
    below = plan.until(plan.generation - 1).to_json()
    if not findings.compare(path, "plan of the base", below, base.plan.to_json()):
        return
    config = replace(base.config, num_blocks=plan.num_blocks)
    for depth in plan.new_depths:
        for weight in block_weights(config):
            tensor = Tensor(weight, depth)
            if tensor.name in stored:
                found = stored[tensor.name]
                shape = weight.hf_shape(config)
                findings.compare(found.file, tensor.name, f"shape {found.shape}", f"shape {shape}")
            else:
                findings.problem(directory, tensor.name, "no such tensor", "one")
    if len(findings.problems) == before:
        findings.notes.append(f"{base.path} is the base that it was made on: `apply` puts it there")
