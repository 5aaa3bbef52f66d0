"""A model to write, a tensor at a time, as a Flax checkpoint or a Hugging Face directory.

`copy` writes beside the destination and renames at the end: a failure leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llamapro_jax import __version__, flax_checkpoint
from llamapro_jax.data.prefetch import Prefetcher
from llamapro_jax.files import atomic_directory, write_json
from llamapro_jax.fingerprint import Fingerprint, TensorPrint, tensor_print
from llamapro_jax.hf.config import render
from llamapro_jax.hf.safetensors import Planned, SafetensorsWriter
from llamapro_jax.hf.tokenizer import find_tokenizer, write_tokenizer
from llamapro_jax.manifest import write_manifest
from llamapro_jax.model.weights import Tensor, tensors
from llamapro_jax.remote import is_remote
from llamapro_jax.sources import HFSource, Source

log = logging.getLogger(__name__)

Format = Literal["flax", "hf"]
SHARD_BYTES = 5 * 10**9


class Sink(Protocol):
    def write(self, tensor: Tensor, array: np.ndarray) -> None: ...
    def close(self) -> None: ...


class FlaxSink:
    """Writes `params/` of a Flax checkpoint."""

    def __init__(self, directory: Path, source: Source) -> None:
        self.config, self.plan = source.config, source.plan
        shapes = {
            leaf: shape
            for leaf, (_, shape) in flax_checkpoint.leaves(self.config, self.plan).items()
        }
        self.writer = flax_checkpoint.StackedWriter(directory / flax_checkpoint.PARAMS, shapes)

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        leaf, row = flax_checkpoint.address(tensor, self.plan)
        self.writer.write(leaf, row, tensor.weight.from_hf(array, self.config))

    def close(self) -> None:
        pass


class HFSink:
    """Writes the safetensors of a Hugging Face directory."""

    def __init__(self, directory: Path, source: Source, shard_bytes: int) -> None:
        planned = (
            Planned(t.name, t.weight.hf_shape(source.config), source.dtype(t))
            for t in tensors(source.config)
        )
        self.writer = SafetensorsWriter(directory, planned, shard_bytes)

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        self.writer.write(tensor.name, array)

    def close(self) -> None:
        self.writer.close()


def lineage_entry(verb: str, source: Source, **facts: Any) -> dict[str, Any]:
    """One line of a model's history: what was done, to which model, by which release.

    hub_id: where the source came from a hub, its name there without the revision.
    """
    local = is_remote(source.path) or Path(source.path).expanduser().is_dir()
    if isinstance(source, HFSource) and not local:
        facts["hub_id"] = source.path.partition("@")[0]
    return {"verb": verb, "source": source.path, "llamapro_jax": __version__, **facts}


def copy(
    source: Source,
    destination: str | Path,
    to: Format,
    *,
    lineage: Iterable[Mapping[str, Any]],
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path, Fingerprint], None] | None = None,
    progress: bool = True,
) -> Fingerprint:
    """Streams every tensor of `source` into a new directory. Returns what was written.

    to: "flax" or "hf". lineage: what was done to the model, for its config.json. shard_bytes: the
    largest size of a file of "hf". `check` gets the finished directory before it takes its name;
    when it raises, nothing stays. progress: show a bar on a terminal.
    """
    with atomic_directory(destination) as directory:
        dtypes = sorted({source.dtype(t).name for t in tensors(source.config)})
        sink: Sink
        sink = (
            FlaxSink(directory, source) if to == "flax" else HFSink(directory, source, shard_bytes)
        )
        prints: dict[str, TensorPrint] = {}
        for tensor, array, printed in read_ahead(source, progress):
            sink.write(tensor, array)
            prints[tensor.name] = printed.result()
        sink.close()
        fingerprint = Fingerprint(prints)
        # The dtype of the embedding speaks for a checkpoint of several.
        dtype = dtypes[0] if len(dtypes) == 1 else prints["model.embed_tokens.weight"].dtype
        lineage = tuple(lineage)
        config = render(source.hf_config, source.config, source.plan, dtype, lineage)
        write_json(directory / "config.json", config)
        if to == "flax":
            flax_checkpoint.write_description(directory, lineage)
        fingerprint.write(directory)
        copy_tokenizer(source.directory, directory)
        if check is not None:
            check(directory, fingerprint)
        # The arrays of a Flax checkpoint have their hashes in the fingerprint.
        write_manifest(directory, but=flax_checkpoint.PARAMS)
    return fingerprint


def copy_tokenizer(source: Path, destination: Path) -> None:
    """The tokenizer and generation_config.json, if there are any. A warning if there is none."""
    generation = source / "generation_config.json"
    if generation.is_file():
        (destination / generation.name).write_bytes(generation.read_bytes())
    if find_tokenizer(source):
        write_tokenizer(source, destination)
    else:
        log.warning("%s: has no tokenizer; the copy has none either", source)


def read_ahead(
    source: Source, progress: bool
) -> Iterator[tuple[Tensor, np.ndarray, Future[TensorPrint]]]:
    """Each tensor, its array and, in time, its print; a progress bar on a terminal.

    One tensor is read and one is hashed while the caller writes: two are in memory, no more.
    """
    from rich.console import Console
    from rich.progress import track

    everything = list(tensors(source.config))
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    arrays = Prefetcher(lambda i: source.read(everything[i]), 0, len(everything), depth=1)
    with arrays, ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        for tensor in track(everything, "tensors", console=console, disable=hidden):
            array = next(arrays)
            yield tensor, array, pool.submit(tensor_print, array)
