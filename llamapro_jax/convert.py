"""A Hugging Face checkpoint as a Flax checkpoint, its dtype kept, a tensor at a time."""

from __future__ import annotations

from pathlib import Path

from llamapro_jax.files import require_new_directory
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.sinks import copy, lineage_entry
from llamapro_jax.sources import open_hf


def convert(source: str, destination: str | Path, *, allow_bin: bool = False) -> Fingerprint:
    """Converts a Hugging Face directory or hub id. Returns the fingerprint of its tensors.

    Every tensor of the source is used once and every parameter filled once; names, shapes and
    dtypes are checked before anything is written. Raises UserError that names the tensor.
    """
    require_new_directory(Path(destination))
    model = open_hf(source, allow_bin)
    lineage = (*model.lineage, lineage_entry("convert", model))
    return copy(model, destination, "flax", lineage=lineage)
