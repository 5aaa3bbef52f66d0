"""Sources over a source: a model before it grew, at another strength, in another dtype, grown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan, Insertion
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import Tensor
from llamapro_jax.sources import Source, compute_fingerprint


class Through:
    """What a view passes on from the source below it."""

    source: Source

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def directory(self) -> Path:
        return self.source.directory

    @property
    def hf_config(self) -> Mapping[str, Any]:
        return self.source.hf_config

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def plan(self) -> ExpansionPlan:
        return self.source.plan

    @property
    def lineage(self) -> tuple[Mapping[str, Any], ...]:
        return self.source.lineage

    def dtype(self, tensor: Tensor) -> np.dtype:
        return self.source.dtype(tensor)

    def read(self, tensor: Tensor) -> np.ndarray:
        return self.source.read(tensor)

    def fingerprint(self) -> Fingerprint:
        return compute_fingerprint(self)


@dataclass(frozen=True)
class Until(Through):
    """The model as it was after `generation`; 0 is the original. Nothing is computed."""

    source: Source
    generation: int

    @property
    def plan(self) -> ExpansionPlan:
        return self.source.plan.until(self.generation)

    @property
    def config(self) -> ModelConfig:
        return replace(self.source.config, num_blocks=self.plan.num_blocks)

    @property
    def lineage(self) -> tuple[Mapping[str, Any], ...]:
        """What made this generation, and what changed it afterwards, other than growth."""
        entries = self.source.lineage
        generation = self.source.plan.generation - sum(e["verb"] == "expand" for e in entries)
        kept = []
        for entry in entries:
            generation += entry["verb"] == "expand"
            touched_base = entry["verb"] == "train" and list(entry["trainable"]) != ["new"]
            if generation <= self.generation or touched_base:
                kept.append(entry)
        return tuple(kept)

    def _below(self, tensor: Tensor) -> Tensor:
        if tensor.block is None:
            return tensor
        depths = self.source.plan.depths_until(self.generation)
        return Tensor(tensor.weight, depths[tensor.block])

    def dtype(self, tensor: Tensor) -> np.dtype:
        return self.source.dtype(self._below(tensor))

    def read(self, tensor: Tensor) -> np.ndarray:
        return self.source.read(self._below(tensor))

    def fingerprint(self) -> Fingerprint:
        return self.source.fingerprint().until(self.source.plan, self.generation)


@dataclass(frozen=True)
class Expanded(Through):
    """The source with one more generation of blocks: copies whose output projections are zero."""

    source: Source
    insertions: Sequence[Insertion]

    @property
    def plan(self) -> ExpansionPlan:
        return self.source.plan.expand(self.insertions)

    @property
    def config(self) -> ModelConfig:
        return replace(self.source.config, num_blocks=self.plan.num_blocks)

    def _below(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """The tensor of the source that this one is a copy of, and whether it is zeroed."""
        if tensor.block is None:
            return tensor, False
        plan = self.plan
        block = plan.blocks[tensor.block]
        inserted = block.stack == "new"
        depth = block.copied_from if inserted else block.depth
        below = plan.depths_until(plan.generation - 1).index(depth)
        return Tensor(tensor.weight, below), inserted and tensor.weight.zeroed

    def dtype(self, tensor: Tensor) -> np.dtype:
        return self.source.dtype(self._below(tensor)[0])

    def read(self, tensor: Tensor) -> np.ndarray:
        below, zeroed = self._below(tensor)
        if zeroed:
            return np.zeros(tensor.weight.hf_shape(self.config), self.source.dtype(below))
        return self.source.read(below)


@dataclass(frozen=True)
class Strength(Through):
    """The new blocks' two output projections (and their biases) times `strength`, in float32."""

    source: Source
    strength: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise UserError(f"strength is {self.strength}; it must be between 0 and 1.")
        if not self.source.plan.generation:
            raise UserError(f"{self.source.path}: has no new blocks, so strength means nothing.")

    def read(self, tensor: Tensor) -> np.ndarray:
        array = self.source.read(tensor)
        inserted = tensor.block in self.source.plan.new_depths
        if not (inserted and tensor.weight.zeroed) or self.strength == 1.0:
            return array
        return (array.astype(np.float32) * np.float32(self.strength)).astype(array.dtype)


@dataclass(frozen=True)
class Cast(Through):
    """Every tensor in one dtype. Raises UserError where a finite value would become infinite."""

    source: Source
    to: np.dtype

    def dtype(self, tensor: Tensor) -> np.dtype:
        return self.to

    def read(self, tensor: Tensor) -> np.ndarray:
        array = self.source.read(tensor)
        if array.dtype == self.to:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(self.to)
        if np.isinf(cast.astype(np.float32)).any() and np.isfinite(array.astype(np.float32)).all():
            raise UserError(
                f"{self.source.path}: tensor {tensor.name} does not fit into {self.to.name}; "
                "export in bfloat16 or float32."
            )
        return cast
