"""What a model is: blocks, generations, parameters, bytes. No weights but what opening it reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from llamapro_jax.delta import DESCRIPTION as DELTA
from llamapro_jax.errors import UserError
from llamapro_jax.flax_checkpoint import DESCRIPTION as CHECKPOINT
from llamapro_jax.hf.hub import HUB_ID
from llamapro_jax.model.weights import (
    Tensor,
    block_parameters,
    block_weights,
    tensors,
    total_parameters,
)
from llamapro_jax.remote import as_path, is_remote
from llamapro_jax.sources import base_is_original, open_source

# One of these, and a directory is a model (or a delta, which says so itself when it is opened).
_MODEL_FILES = (CHECKPOINT, "run.json", "config.json", DELTA)
_DATA_FILE = "dataset_info.json"


def is_data_set(path: str, expected: bool) -> bool:
    """Whether `path` is a TFDS data set, by its directory or by name, and not a model.

    expected: take what is no directory for a data set and not for a hub id, so that what opens it
    says what is wrong. Raises UserError for a directory that is neither.
    """
    directory = as_path(path)
    if not directory.is_dir():
        return not directory.exists() and (expected or _is_data_set_name(path))
    if any((directory / name).is_file() for name in _MODEL_FILES):
        return False
    if (directory / _DATA_FILE).is_file() or any(directory.glob(f"*/{_DATA_FILE}")):
        return True
    raise UserError(
        f"{path}: is neither a model (a directory with one of {', '.join(_MODEL_FILES[:3])}) nor "
        f"a prepared data set (a directory with {_DATA_FILE}). Make a data set of text with "
        "`llamapro prepare`."
    )


def _is_data_set_name(path: str) -> bool:
    if is_remote(path) or path.startswith((".", "/", "~")) or HUB_ID.fullmatch(path):
        return False
    from llamapro_jax.data.records import open_builder

    try:
        open_builder(path)
    except UserError:
        raise UserError(
            f"{path}: no such directory. A model is a directory or a hub id like "
            "org/name@revision; a data set is a directory or a name in $TFDS_DATA_DIR."
        ) from None
    return True


def refuse_options(path: str, options: Iterable[str]) -> None:
    """Raises UserError when options of a data set are given for a model."""
    given = ", ".join(f"--{name}" for name in options)
    if given:
        raise UserError(f"{path}: is a model; {given} is for data sets.")


def describe(path: str) -> dict[str, Any]:
    """The model at `path`: its sizes, each block, and what was done to it. Plain JSON values.

    Sizes are parameters and bytes as stored. No weights are read, but to hash a run's model when
    that is a Hugging Face directory. Raises UserError as `sources.open_source` does.
    """
    source = open_source(path)
    config, plan = source.config, source.plan
    bytes_of_block = [
        sum(
            weight.size(config) * source.dtype(Tensor(weight, block.depth)).itemsize
            for weight in block_weights(config)
        )
        for block in plan.blocks
    ]
    everything = list(tensors(config))
    return {
        "path": path,
        "architecture": config.architecture,
        "parameters": total_parameters(config),
        "bytes": sum(t.weight.size(config) * source.dtype(t).itemsize for t in everything),
        "dtypes": sorted({source.dtype(t).name for t in everything}),
        "new_parameters": plan.num_new * block_parameters(config),
        "base_blocks": plan.base_blocks,
        "generations": plan.generation,
        "base_is_original": base_is_original(source),
        "blocks": [
            {
                "depth": block.depth,
                "generation": block.generation,
                "stack": block.stack,
                "copied_from": block.copied_from,
                "trainable": block.stack == "new",
                "parameters": block_parameters(config),
                "bytes": size,
            }
            for block, size in zip(plan.blocks, bytes_of_block, strict=True)
        ],
        "lineage": [dict(entry) for entry in source.lineage],
    }


def as_json(description: dict[str, Any]) -> str:
    return json.dumps(description, indent=2)


def as_text(description: dict[str, Any]) -> str:
    """A table of the blocks under a heading of the whole."""
    lines = [
        f"{description['path']}: {description['architecture']}, "
        f"{description['parameters']:,} parameters in {', '.join(description['dtypes'])} "
        f"({size(description['bytes'])}), {len(description['blocks'])} blocks",
        "",
        f"{'block':>5}  {'stack':<5}  {'generation':>10}  {'copied from':>11}  "
        f"{'with `new` trains':<17}  {'parameters':>13}  {'size':>10}",
    ]
    for block in description["blocks"]:
        copied = "" if block["copied_from"] is None else str(block["copied_from"])
        trains = "yes" if block["trainable"] else "no"
        lines.append(
            f"{block['depth']:>5}  {block['stack']:<5}  {block['generation']:>10}  {copied:>11}  "
            f"{trains:<17}  {block['parameters']:>13,}  {size(block['bytes']):>10}"
        )
    new = sum(block["trainable"] for block in description["blocks"])
    lines += ["", f"{new} new blocks with {description['new_parameters']:,} parameters"]
    if not description["base_is_original"]:
        lines.append("more than the new blocks was trained: the base is not the original")
    for entry in description["lineage"]:
        facts = {k: v for k, v in entry.items() if k not in ("verb", "source", "llamapro_jax")}
        tail = " " + ", ".join(f"{k} {v}" for k, v in facts.items()) if facts else ""
        lines.append(f"{entry['verb']} from {entry['source']}{tail}")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in the unit that reads best."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
