"""Small models in memory and on disk for tests of what runs a model; none needs torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import write_tiny

from llamapro_jax.expansion import Insertion, spread
from llamapro_jax.hf.tokenizer import train_tokenizer
from llamapro_jax.model.api import Model, load
from llamapro_jax.model.params import block_row
from llamapro_jax.model.weights import Tensor
from llamapro_jax.sinks import copy, lineage_entry
from llamapro_jax.sources import open_hf
from llamapro_jax.views import Expanded

WORDS = "the cat sat on a mat and saw how many small birds sang in green trees near water".split()


def english(seed: int, words: int = 400) -> str:
    """Lines of random words."""
    drawn = np.random.default_rng(seed).choice(WORDS, words)
    return "\n".join(" ".join(drawn[i : i + 10]) for i in range(0, words, 10)) + "\n"


def write_with_tokenizer(directory: Path, **changes: Any) -> Path:
    """A random model whose vocabulary is that of a tokenizer trained beside it."""
    tokenizer = train_tokenizer([english(0)], 300, directory)
    return write_tiny(directory, **{"vocab_size": tokenizer.vocab_size, **changes})


def expand_to(
    source: Path,
    destination: Path,
    insertions: tuple[Insertion, ...] = spread(4, 2),
    trained: tuple[str, ...] | None = None,
) -> Path:
    """The model at `source` with new blocks; `trained` adds a training to its lineage."""
    model = open_hf(str(source))
    grown = Expanded(model, insertions)
    entry = lineage_entry("expand", model, generation=grown.plan.generation)
    lineage = [*model.lineage, entry]
    if trained is not None:
        facts = {"trainable": list(trained), "steps": 3}
        lineage.append({"verb": "train", "source": str(source), **facts})
    copy(grown, destination, "hf", lineage=lineage, progress=False)
    return destination


def disturbed(model: Model, scale: float = 0.2) -> Model:
    """The model as if its new blocks had trained: random output projections in place of zeros."""
    params = {**model.params, "new": [dict(leaves) for leaves in model.params["new"]]}
    key = jax.random.key(7)
    for leaves in params["new"]:
        for name in ("o", "down"):
            if name in leaves:
                key, used = jax.random.split(key)
                leaves[name] = scale * jax.random.normal(used, leaves[name].shape, jnp.float32)
    return replace(model, params=params)


class _InMemory:
    """The source of a model, but for the output projections that are in memory."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.source, name)

    def read(self, tensor: Tensor) -> np.ndarray:
        if tensor.weight.zeroed and tensor.block in self.plan.new_depths:
            row = block_row(self._model.params, self.plan, tensor.block)[tensor.weight.name]
            return tensor.weight.to_hf(np.asarray(row), self.config)
        return self._model.source.read(tensor)


def save(model: Model, directory: Path) -> Path:
    """Writes a disturbed model as a Hugging Face directory."""
    source: Any = _InMemory(model)
    copy(source, directory, "hf", lineage=model.source.lineage, progress=False)
    return directory


def random_model(tmp_path: Path, insertions: tuple[Insertion, ...] = (), **changes: Any) -> Model:
    """A random model in memory, expanded and disturbed when there are insertions."""
    base = write_tiny(tmp_path / "base", **changes)
    if not insertions:
        return load(str(base))
    return disturbed(load(str(expand_to(base, tmp_path / "grown", insertions))))
