"""A model to read from, a tensor at a time, whatever the format it lies in.

What every source gives is the Hugging Face tensor (name, layout, stored dtype), so that convert,
expand, export, apply and the proof are one copy from a source to a sink (`sinks.py`).
Views (a model before it grew, another strength, another dtype) are sources over a source.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamapro_jax import flax_checkpoint
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan, checked_lineage
from llamapro_jax.fingerprint import FILE as FINGERPRINT_FILE
from llamapro_jax.fingerprint import Fingerprint, tensor_print
from llamapro_jax.hf.config import PLAN_KEY, read_config
from llamapro_jax.hf.hub import resolve
from llamapro_jax.hf.safetensors import (
    BIN_INDEX,
    BIN_SINGLE,
    INDEX,
    SINGLE,
    BinReader,
    SafetensorsReader,
    Weights,
)
from llamapro_jax.local_copies import opened
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import OUTER_BY_NAME, Tensor, tensors
from llamapro_jax.remote import as_path, is_remote

log = logging.getLogger(__name__)


# The start and stop of a part in each dimension.
Bounds = Sequence[tuple[int, int]]


class Source(Protocol):
    """A model: its architecture, its plan, and its tensors one by one.

    path: for messages. hf_config: the raw config.json. directory: where tokenizer files lie.
    """

    @property
    def path(self) -> str: ...
    @property
    def directory(self) -> Path: ...
    @property
    def hf_config(self) -> Mapping[str, Any]: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def plan(self) -> ExpansionPlan: ...
    @property
    def lineage(self) -> tuple[Mapping[str, Any], ...]: ...

    def dtype(self, tensor: Tensor) -> np.dtype: ...

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor in the layout of Hugging Face, in its stored dtype."""
        ...

    def fingerprint(self) -> Fingerprint: ...


def read_part(source: Source, tensor: Tensor, bounds: Bounds) -> np.ndarray:
    """A part of a tensor, in our layout: what one of several hosts needs of it.

    No more than that is copied from the disk, and so its bytes cannot be compared with the hash of
    the whole tensor. A source whose `read` does more than map a file has a `read_part` of its own.
    """
    own = getattr(source, "read_part", None)
    if own is not None:
        return own(tensor, bounds)
    whole = tensor.weight.from_hf(source.read(tensor), source.config)
    return whole[tuple(slice(*bound) for bound in bounds)]


def compute_fingerprint(source: Source) -> Fingerprint:
    """Reads and hashes every tensor."""
    return Fingerprint({t.name: tensor_print(source.read(t)) for t in tensors(source.config)})


@dataclass(frozen=True)
class HFSource:
    """A Hugging Face directory. Opening it checks names, shapes and dtypes of all tensors."""

    path: str
    directory: Path
    hf_config: Mapping[str, Any]
    config: ModelConfig
    plan: ExpansionPlan
    weights: Weights = field(repr=False)
    lineage: tuple[Mapping[str, Any], ...] = ()

    def dtype(self, tensor: Tensor) -> np.dtype:
        return self.weights.tensors[tensor.name].dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        return self.weights.read(tensor.name)

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        return compute_fingerprint(self)

    def fingerprint(self) -> Fingerprint:
        return self._fingerprint


def open_hf(path: str, allow_bin: bool = False) -> HFSource:
    """Opens a Hugging Face directory or hub id. Raises UserError that names what is wrong."""
    directory = resolve(path, allow_bin)
    hf_config, config, plan = read_config(directory)
    weights = _open_weights(directory, allow_bin)
    lineage = checked_lineage(
        hf_config.get(PLAN_KEY, {}).get("lineage", ()), f"{directory / 'config.json'}: {PLAN_KEY}"
    )
    source = HFSource(path, directory, hf_config, config, plan, weights, lineage)
    _check_tensors(source)
    return source


def _open_weights(directory: Path, allow_bin: bool) -> Weights:
    if (directory / INDEX).is_file() or (directory / SINGLE).is_file():
        return SafetensorsReader(directory)
    if (directory / BIN_INDEX).is_file() or (directory / BIN_SINGLE).is_file():
        if allow_bin:
            return BinReader(directory)
        raise UserError(
            f"{directory}: has only pickled weights ({BIN_SINGLE}). Convert them to safetensors, "
            "or pass --allow-bin, which reads them as weights only and needs PyTorch."
        )
    raise UserError(
        f"{directory}: has neither {SINGLE} nor {INDEX}. If it has only {BIN_SINGLE}, "
        "pass --allow-bin, which needs PyTorch."
    )


def _check_tensors(source: HFSource) -> None:
    """Every tensor of the table is there once in its shape, and nothing else is."""
    stored = source.weights.tensors
    expected = {tensor.name: tensor for tensor in tensors(source.config)}
    for name, tensor in expected.items():
        if name not in stored:
            raise UserError(
                f"{source.directory}: has no tensor {name}, which "
                f"{source.config.architecture} with {source.config.num_blocks} layers needs."
            )
        shape = tensor.weight.hf_shape(source.config)
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}; "
                f"config.json says {list(shape)}."
            )
    for leaf in {tensor.weight.name for tensor in expected.values()}:
        _check_one_dtype(source, [t for t in expected.values() if t.weight.name == leaf])
    head = OUTER_BY_NAME["head"].hf_name
    for name in stored:
        # Old checkpoints carry the rope frequencies, which config.json already decides.
        if name in expected or name.endswith(".rotary_emb.inv_freq"):
            continue
        if name == head and source.config.tie_embeddings:
            embedding = source.weights.read(OUTER_BY_NAME["embed"].hf_name)
            if np.array_equal(source.weights.read(head), embedding):
                log.info("%s: %s is the tied embedding again; left out", source.directory, name)
                continue
            raise UserError(
                f"{stored[name].file}: tensor {name} differs from the embedding, though "
                "config.json says tie_word_embeddings; set it to false if the head is its own."
            )
        raise UserError(
            f"{stored[name].file}: tensor {name} is not one of {source.config.architecture} "
            f"with {source.config.num_blocks} layers; config.json and the weights do not match."
        )


def _check_one_dtype(source: HFSource, of_one_leaf: list[Tensor]) -> None:
    first = of_one_leaf[0]
    for tensor in of_one_leaf[1:]:
        if source.dtype(tensor) != source.dtype(first):
            raise UserError(
                f"{source.directory}: tensor {tensor.name} has dtype {source.dtype(tensor)}, but "
                f"{first.name} has {source.dtype(first)}; save the checkpoint in one dtype."
            )


@dataclass(frozen=True)
class FlaxSource:
    """A Flax checkpoint: Orbax arrays of the two stacks, with config, plan and fingerprint."""

    path: str
    directory: Path
    hf_config: Mapping[str, Any]
    config: ModelConfig
    plan: ExpansionPlan
    lineage: tuple[Mapping[str, Any], ...]
    arrays: flax_checkpoint.StackedArrays = field(repr=False)
    # Names of the tensors that were read and found to be what was written.
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    def dtype(self, tensor: Tensor) -> np.dtype:
        return self.arrays.dtype(*flax_checkpoint.address(tensor, self.plan))

    def read(self, tensor: Tensor) -> np.ndarray:
        """Raises UserError when the bytes are not those that were written."""
        leaf, row = flax_checkpoint.address(tensor, self.plan)
        array = tensor.weight.to_hf(self.arrays.read(leaf, row), self.config)
        # Neither zarr nor Orbax notices a flipped bit.
        if tensor.name not in self._verified:
            if tensor_print(array) != self.fingerprint().tensors.get(tensor.name):
                raise UserError(
                    f"{self.directory / flax_checkpoint.PARAMS / leaf}: {tensor.name} is not what "
                    f"was written (its hash is another than {FINGERPRINT_FILE} says); the "
                    "checkpoint is damaged, make it again."
                )
            self._verified.add(tensor.name)
        return array

    def read_part(self, tensor: Tensor, bounds: Bounds) -> np.ndarray:
        """As `sources.read_part`. Its bytes are not compared with what was written."""
        return self.arrays.read(*flax_checkpoint.address(tensor, self.plan), bounds)

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        if not (self.directory / FINGERPRINT_FILE).is_file():
            raise UserError(
                f"{self.directory}: has no {FINGERPRINT_FILE}; convert the model again."
            )
        return Fingerprint.read(self.directory)

    def fingerprint(self) -> Fingerprint:
        """What was recorded when the checkpoint was written; no tensor is read."""
        return self._fingerprint


def open_flax(path: str) -> FlaxSource:
    """Opens a Flax checkpoint and checks that each array is there in its shape."""
    directory, params = opened(path, flax_checkpoint.PARAMS)
    hf_config, config, plan = read_config(directory)
    lineage = flax_checkpoint.read_description(directory)
    arrays = flax_checkpoint.StackedArrays(params)
    if is_remote(params):
        arrays.open(flax_checkpoint.leaves(config, plan))
    flax_checkpoint.check_shapes(arrays, config, plan)
    return FlaxSource(path, directory, hf_config, config, plan, lineage, arrays)


def altered_by(source: Source, generation: int) -> Mapping[str, Any] | None:
    """The first training that changed what the model was after `generation`, if there was one.

    source: the whole model. generation -1: what it was before any training at all. Returns the
    entry of the lineage; its "source" is the model before that training.
    """
    # Several expansions may stand before the first entry that the lineage still has.
    expansions = sum(entry["verb"] == "expand" for entry in source.lineage)
    current = source.plan.generation - expansions
    for entry in source.lineage:
        if entry["verb"] == "expand":
            current += 1
        elif entry["verb"] == "train" and current > generation:
            # At generation 0 there are no new blocks: whatever trained was the model itself.
            if list(entry["trainable"]) != ["new"]:
                return entry
    return None


def base_is_original(source: Source) -> bool:
    """Whether the model without its last generation of blocks is what it was before they came."""
    return altered_by(source, source.plan.generation - 1) is None


def open_source(path: str, *, allow_bin: bool = False, masters: bool = False) -> Source:
    """Opens a Flax checkpoint, a run directory, a Hugging Face directory or a hub id.

    allow_bin: read pickled `.bin` files, as weights only; needs PyTorch. masters: of a run, give
    what was trained in float32 as it was trained, rather than in the dtype of the base.

    Raises UserError for what is no model, is not supported, or lacks a tensor.
    """
    directory = as_path(path)
    if (directory / flax_checkpoint.DESCRIPTION).is_file():
        return open_flax(path)
    from llamapro_jax.training import run_directory

    if run_directory.is_run(path):
        return run_directory.open_run(path, masters=masters)
    return open_hf(path, allow_bin)
