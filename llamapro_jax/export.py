"""The trained model as a Hugging Face directory, checked against ours after writing."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.expand import written
from llamapro_jax.files import atomic_write, require_new_directory
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.hf.config import read_config
from llamapro_jax.hf.tokenizer import find_tokenizer, load_tokenizer
from llamapro_jax.model.weights import tensors, total_parameters
from llamapro_jax.proof import PROOF_TEXT, compare_logits, proof_tokens
from llamapro_jax.sinks import SHARD_BYTES, copy, lineage_entry
from llamapro_jax.sources import Source, altered_by, open_source
from llamapro_jax.training.run_directory import RunSource
from llamapro_jax.views import Cast, Strength, Until

log = logging.getLogger(__name__)

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Export:
    """What was written, and the largest difference of its logits from the stored model's.

    The difference is zero unless another dtype was asked for. frozen_bits: of what a run did not
    train, all of them unchanged; None where that was not compared: of no run, an earlier
    generation, or another dtype.
    """

    parameters: int
    dtype: str
    largest_difference: float
    frozen_bits: int | None


def export(
    source: str,
    destination: str | Path,
    *,
    dtype: str | None = None,
    strength: float = 1.0,
    generation: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    licence: str = "other",
) -> Export:
    """Writes safetensors, config, tokenizer and a model card; then reads them back and compares.

    Base tensors come from the converted checkpoint byte for byte, never from a cast copy, unless
    `dtype` ("float32", "bfloat16" or "float16") asks for a cast. strength: a factor from 0 to 1 on
    what the new blocks add. generation: the model as it was after that expansion. shard_bytes: the
    largest size of a file. licence: for the model card.

    Raises UserError when the reloaded model is not what was written; nothing is left then.
    """
    require_new_directory(Path(destination))
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    # A cast starts from what was trained, not from its copy in the dtype of the base.
    stored = open_source(source, masters=dtype is not None)
    view: Source = stored
    if generation is not None:
        view = Until(view, generation)
    if strength != 1.0:
        view = Strength(view, strength)
    exact = view
    if dtype is not None:
        view = Cast(view, DTYPES[dtype])
    differences: list[float] = []
    frozen: list[int] = []

    def check(directory: Path, fingerprint: Fingerprint) -> None:
        if isinstance(stored, RunSource) and dtype is None and generation is None:
            frozen.append(require_frozen(stored, fingerprint, destination))
        atomic_write(directory / "README.md", model_card(view, licence))
        check_transformers(directory)
        again = written(directory, str(destination), "hf")
        tokens_BT, _ = proof_tokens(stored)
        _, different, largest = compare_logits(view, again, tokens_BT)
        if different:
            raise UserError(
                f"{destination}: {different:,} logits of the files differ from the model that was "
                f"exported (by up to {largest:.3g}); nothing was kept. Check the disk."
            )
        if dtype is not None:
            largest = compare_logits(exact, again, tokens_BT)[2]
        differences.append(largest)

    facts: dict[str, object] = {"strength": strength} if strength != 1.0 else {}
    if generation is not None:
        facts["generations"] = generation
        altered = altered_by(stored, generation)
        if altered is not None:
            log.warning(
                "%s: generation %d is not what it was: %s trained later",
                source, generation, ", ".join(altered["trainable"]),
            )  # fmt: skip
    lineage = public((*view.lineage, lineage_entry("export", stored, **facts)))
    fingerprint = copy(
        view, destination, "hf", lineage=lineage, shard_bytes=shard_bytes, check=check
    )
    dtypes = sorted({tensor.dtype for tensor in fingerprint.tensors.values()})
    parameters = total_parameters(view.config)
    return Export(parameters, ", ".join(dtypes), differences[0], frozen[0] if frozen else None)


def require_frozen(run: RunSource, written: Fingerprint, destination: str | Path) -> int:
    """The bits of all tensors that the run did not train.

    Raises UserError unless what was written of them is what the run began from, by their hashes.
    """
    before = run.base.fingerprint().tensors
    frozen = [tensor for tensor in tensors(run.config) if run.address(tensor) is None]
    changed = [t.name for t in frozen if written.tensors[t.name] != before[t.name]]
    if changed:
        raise UserError(
            f"{destination}: {len(changed)} of the {len(frozen)} tensors that {run.path} did not "
            f"train are not those of {run.base.path}, the first {changed[0]}; nothing was kept. "
            "Check the memory and the disk of this machine."
        )
    return 8 * sum(math.prod(before[t.name].shape) * run.dtype(t).itemsize for t in frozen)


def check_transformers(directory: Path) -> None:
    """transformers reads the sizes that we wrote, and its tokenizer gives our ids."""
    # It says at import that it has no PyTorch, which nobody asked.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig, AutoTokenizer

    _, ours, _ = read_config(directory)
    theirs = AutoConfig.from_pretrained(directory)
    for key, value in {
        "num_hidden_layers": ours.num_blocks,
        "hidden_size": ours.hidden_size,
        "vocab_size": ours.vocab_size,
        "num_key_value_heads": ours.num_kv_heads,
        "head_dim": ours.head_dim,
    }.items():
        if getattr(theirs, key) != value:
            raise UserError(
                f"{directory}: transformers reads {key} {getattr(theirs, key)} where {value} was "
                "written; report this with its version."
            )
    if find_tokenizer(directory):
        expected = load_tokenizer(directory).encode(PROOF_TEXT)
        found = AutoTokenizer.from_pretrained(directory)(PROOF_TEXT)["input_ids"]
        if list(found) != expected:
            raise UserError(
                f"{directory}: the tokenizer gives other ids in transformers than here; report "
                "this with the tokenizer files."
            )


def public(lineage: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The lineage without the directories of the machine: of a path, its last part."""
    return tuple({**entry, "source": Path(entry["source"]).name} for entry in lineage)


def model_card(source: Source, licence: str) -> str:
    """README.md with the metadata that the hub reads, and what was done to the base."""
    plan = source.plan
    first = source.lineage[0] if source.lineage else {}
    name = first.get("hub_id")
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"license: {licence}",
        *([f"base_model: {name}"] if name else []),
        "tags:",
        "- llama-pro",
        "- block-expansion",
        "- jax",
        "---",
    ]
    steps = []
    for entry in source.lineage:
        verb = entry["verb"]
        if verb == "expand":
            depths = [b.depth for b in plan.blocks if b.generation == entry["generation"]]
            steps.append(f"- expanded by {len(depths)} blocks, now at depth {depths}")
        elif verb == "train":
            steps.append(f"- trained {', '.join(entry['trainable'])} for {entry['steps']} steps")
    title = name or Path(first.get("source", "model")).name
    inserted = plan.num_blocks - plan.base_blocks
    return "\n".join(
        [
            *front,
            "",
            f"# {title}, with {inserted} inserted blocks",
            "",
            f"A LLaMA Pro model ([arXiv 2401.02415](https://arxiv.org/abs/2401.02415)) of "
            f"{total_parameters(source.config):,} parameters: {plan.base_blocks} blocks of the "
            f"base and {inserted} inserted ones."
            + (" The key `llamapro` of `config.json` says which is which." if inserted else ""),
            "",
            *(["What was done:", "", *steps, ""] if steps else []),
            "Made with llamapro_jax.",
            "",
        ]
    )
