"""A LLaMA of random weights, as a Hugging Face directory in PyTorch's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.hf.config import parse
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import Params
from llamapro_jax.model.params import block_row, init_params
from llamapro_jax.model.weights import Tensor, total_parameters
from llamapro_jax.sinks import copy
from llamapro_jax.sources import compute_fingerprint


@dataclass(frozen=True)
class InMemory:
    """Parameters in memory as a `sources.Source`. directory: where its tokenizer lies."""

    directory: Path
    hf_config: Mapping[str, Any]
    config: ModelConfig
    params: Params = field(repr=False)
    path: str = "a random model"
    lineage: tuple[Mapping[str, Any], ...] = ()

    @property
    def plan(self) -> ExpansionPlan:
        return ExpansionPlan(self.config.num_blocks)

    def dtype(self, tensor: Tensor) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, tensor: Tensor) -> np.ndarray:
        leaves = (
            self.params
            if tensor.block is None
            else block_row(self.params, self.plan, tensor.block)
        )
        return tensor.weight.to_hf(np.asarray(leaves[tensor.weight.name]), self.config)

    def fingerprint(self) -> Fingerprint:
        return compute_fingerprint(self)


def write_random_model(
    hf_config: Mapping[str, Any], tokenizer: Path, destination: Path, seed: int
) -> int:
    """Writes a model of random float32 weights. Returns its number of parameters.

    hf_config: the keys of its config.json. tokenizer: the directory that holds its tokenizer.
    """
    config = parse(hf_config)
    plan = ExpansionPlan(config.num_blocks)
    params = init_params(jax.random.key(seed), config, plan, jnp.float32)
    copy(
        InMemory(tokenizer, hf_config, config, params),
        destination,
        "hf",
        lineage=(),
        progress=False,
    )
    return total_parameters(config)


@contextmanager
def shared_programs(directory: Path) -> Iterator[None]:
    """Programs compiled in the block are kept in `directory`: a second run compiles nothing."""
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
