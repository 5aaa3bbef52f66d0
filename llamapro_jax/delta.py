"""The new blocks alone, as people share adapters, and putting them onto the same base again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.files import (
    atomic_directory,
    check_format,
    read_json,
    require_new_directory,
    write_json,
)
from llamapro_jax.fingerprint import Fingerprint, tensor_print
from llamapro_jax.hf.safetensors import Planned, SafetensorsReader, SafetensorsWriter
from llamapro_jax.manifest import write_manifest
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import Tensor, block_weights
from llamapro_jax.sinks import SHARD_BYTES, Format, copy, copy_tokenizer, lineage_entry
from llamapro_jax.sources import HFSource, Source, base_is_original, open_source
from llamapro_jax.views import Through, Until

DESCRIPTION = "delta.json"
FORMAT = {"format": "llamapro_jax delta", "version": 1}


def write_delta(source: str, destination: str | Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes the blocks of the last generation, the plan, and the base's digest.

    shard_bytes: the largest size of a file. Returns the number of parameters written. Raises
    UserError when there are no new blocks, or when more than they was trained: then the delta
    would not give the model back.
    """
    require_new_directory(Path(destination))
    model = open_source(source)
    if not model.plan.generation:
        raise UserError(f"{source}: has no new blocks; export it without --delta.")
    if not base_is_original(model):
        raise UserError(
            f"{source}: more than the new blocks was trained, so that they alone do not give the "
            "model back; export it without --delta."
        )
    wanted = [
        Tensor(weight, depth)
        for depth in model.plan.new_depths
        for weight in block_weights(model.config)
    ]
    before = Until(model, model.plan.generation - 1)
    prints = {}
    with atomic_directory(destination) as directory:
        planned = [
            Planned(t.name, t.weight.hf_shape(model.config), model.dtype(t)) for t in wanted
        ]
        writer = SafetensorsWriter(directory, planned, shard_bytes)
        for tensor in wanted:
            array = model.read(tensor)
            prints[tensor.name] = tensor_print(array)
            writer.write(tensor.name, array)
        writer.close()
        copy_tokenizer(model.directory, directory)
        write_json(
            directory / DESCRIPTION,
            {
                **FORMAT,
                "plan": model.plan.to_json(),
                "base_digest": before.fingerprint().digest,
                "digest": Fingerprint(prints).digest,
                "lineage": [*model.lineage, lineage_entry("delta", model)],
            },
        )
        write_manifest(directory)
    return sum(int(np.prod(p.shape)) for p in planned)


@dataclass(frozen=True)
class Applied(Through):
    """A base with the new blocks of a delta."""

    source: Source
    grown: ExpansionPlan
    blocks: SafetensorsReader

    @property
    def plan(self) -> ExpansionPlan:
        return self.grown

    @property
    def config(self) -> ModelConfig:
        return replace(self.source.config, num_blocks=self.grown.num_blocks)

    def _below(self, tensor: Tensor) -> Tensor | None:
        """The base's tensor, or None for one of the delta."""
        if tensor.block is None:
            return tensor
        if tensor.block in self.grown.new_depths:
            return None
        depths = self.grown.depths_until(self.grown.generation - 1)
        return Tensor(tensor.weight, depths.index(tensor.block))

    def dtype(self, tensor: Tensor) -> np.dtype:
        below = self._below(tensor)
        return self.blocks.tensors[tensor.name].dtype if below is None else self.source.dtype(below)

    def read(self, tensor: Tensor) -> np.ndarray:
        below = self._below(tensor)
        return self.blocks.read(tensor.name) if below is None else self.source.read(below)


def apply_delta(
    base: str, delta: str | Path, destination: str | Path, to: Format | None = None
) -> Fingerprint:
    """Puts the blocks of `delta` onto `base` and writes the whole. Returns its fingerprint.

    base: the model that the delta was made on, in any format. to: "flax" or "hf"; by default the
    format of the base. Raises UserError for another base than its own, and for a damaged delta.
    """
    require_new_directory(Path(destination))
    delta = Path(delta)
    description = read_json(delta / DESCRIPTION)
    check_format(description, FORMAT, delta / DESCRIPTION)
    plan = ExpansionPlan.from_json(description.get("plan"), f"{delta / DESCRIPTION}")
    model = open_source(base)
    if model.plan != plan.until(plan.generation - 1):
        raise UserError(
            f"{base}: has {model.plan.num_blocks} blocks and {model.plan.generation} generations; "
            f"the delta was made on {plan.until(plan.generation - 1).num_blocks} blocks and "
            f"{plan.generation - 1} generations."
        )
    digest = model.fingerprint().digest
    if digest != description.get("base_digest"):
        raise UserError(
            f"{base}: is not the base of {delta}: its fingerprint is {digest[:12]}, the delta's "
            f"base has {str(description.get('base_digest'))[:12]}. Take the base it was made on."
        )
    applied = Applied(model, plan, SafetensorsReader(delta))
    _check_blocks(applied, delta, description.get("digest"))
    to = to or ("hf" if isinstance(model, HFSource) else "flax")
    lineage = (*description.get("lineage", ()), lineage_entry("apply", model))
    return copy(applied, destination, to, lineage=lineage)


def _check_blocks(applied: Applied, delta: Path, digest: object) -> None:
    """The delta has exactly the tensors of the new blocks, in their shapes, as written."""
    expected = {
        tensor.name: weight.hf_shape(applied.config)
        for depth in applied.plan.new_depths
        for weight in block_weights(applied.config)
        for tensor in (Tensor(weight, depth),)
    }
    found = {name: stored.shape for name, stored in applied.blocks.tensors.items()}
    if found != expected:
        wrong = sorted(n for n in set(found) | set(expected) if found.get(n) != expected.get(n))
        raise UserError(f"{delta}: tensor {wrong[0]} is missing, unexpected or of another shape.")
    prints = {name: tensor_print(applied.blocks.read(name)) for name in expected}
    if Fingerprint(prints).digest != digest:
        raise UserError(f"{delta}: is not what was written (its hash differs); fetch it again.")
