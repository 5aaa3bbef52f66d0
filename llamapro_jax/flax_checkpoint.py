"""The Flax checkpoint on disk: an Orbax tree of stacked arrays, written a block at a time.

```
config.json        Hugging Face's keys, and the plan under "llamapro"
llamapro.json      format, version, lineage
fingerprint.json   name, shape, dtype, SHA-256 of each Hugging Face tensor
SHA256SUMS         of each file outside params/
params/            Orbax: embed, final_norm, head, base/{leaf: [L, ...]}, new/{leaf: [N, ...]}
tokenizer files    as they came
```
Orbax copies a whole leaf when it saves one, and one stacked leaf of a 7B is 2.7 GiB. So Orbax
writes the skeleton, TensorStore the rows, and Orbax restores the result like any other.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan, checked_lineage
from llamapro_jax.files import check_format, read_json, write_json
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import Tensor, Weight, block_weights, outer_weights
from llamapro_jax.remote import RemotePath, kvstore, raise_if_unreachable

DESCRIPTION = "llamapro.json"
PARAMS = "params"
FORMAT = {"format": "llamapro_jax model", "version": 1}

# One chunk is one file and one copy in memory while it is written.
CHUNK_BYTES = 128 * 2**20
_OPENED_AT_ONCE = 16


def address(tensor: Tensor, plan: ExpansionPlan) -> tuple[str, int | None]:
    """Leaf of the Orbax tree and its row, for a tensor of the model."""
    if tensor.block is None:
        return tensor.weight.name, None
    block = plan.blocks[tensor.block]
    return f"{block.stack}.{tensor.weight.name}", block.stack_index


def leaves(config: ModelConfig, plan: ExpansionPlan) -> dict[str, tuple[Weight, tuple[int, ...]]]:
    """Leaf of the Orbax tree -> its row in the table, and its shape with the stack's length."""
    result = {w.name: (w, w.shape(config)) for w in outer_weights(config)}
    for stack, length in (("base", plan.num_blocks - plan.num_new), ("new", plan.num_new)):
        if length:
            for w in block_weights(config):
                result[f"{stack}.{w.name}"] = (w, (length, *w.shape(config)))
    return result


def read_description(directory: Path) -> tuple[Mapping[str, Any], ...]:
    """The lineage in llamapro.json. Raises UserError for another format or a later version."""
    path = directory / DESCRIPTION
    values = read_json(path)
    check_format(values, FORMAT, path)
    return checked_lineage(values.get("lineage", ()), str(path))


def write_description(directory: Path, lineage: tuple[Mapping[str, Any], ...]) -> None:
    write_json(directory / DESCRIPTION, {**FORMAT, "lineage": list(lineage)})


class StackedArrays:
    """Reads rows of the arrays that Orbax keeps one directory a leaf (zarr, no OCDBT)."""

    def __init__(self, directory: Path | RemotePath) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}

    def open(self, leaves: Iterable[str]) -> None:
        """Opens several at a time, since each takes a while where they are far away."""
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as threads:
            list(threads.map(self._array, leaves))

    def _array(self, leaf: str) -> Any:
        if leaf not in self._open:
            self._open[leaf] = _open_zarr(self.directory / leaf)
        return self._open[leaf]

    def dtype(self, leaf: str, row: int | None = None) -> np.dtype:
        return np.dtype(self._array(leaf).dtype.numpy_dtype)

    def shape(self, leaf: str) -> tuple[int, ...]:
        return tuple(self._array(leaf).shape)

    def chunks(self, leaf: str) -> int:
        """How many files it consists of."""
        array = self._array(leaf)
        chunk = array.chunk_layout.write_chunk.shape or ()
        return math.prod(math.ceil(s / c) for s, c in zip(array.shape, chunk, strict=True))

    def files(self, leaf: str, bounds: Sequence[tuple[int, int]] | None) -> list[str]:
        """The names of those of its files that a part of it is in."""
        array = self._array(leaf)
        chunk = array.chunk_layout.write_chunk.shape or ()
        bounds = bounds or [(0, size) for size in array.shape]
        spans = [range(a // c, math.ceil(b / c)) for (a, b), c in zip(bounds, chunk, strict=True)]
        return [".".join(map(str, place)) or "0" for place in itertools.product(*spans)]

    def read(
        self,
        leaf: str,
        row: int | tuple[int, ...] | None = None,
        bounds: Sequence[tuple[int, int]] | None = None,
    ) -> np.ndarray:
        """The leaf, or its row (an index, or one for each of the leading axes).

        bounds: the start and stop in each dimension of the part that is wanted of it; None: all.
        Its memory order is the one on disk, which saves a transposition.
        """
        import tensorstore

        array = self._array(leaf)
        wanted = array if row is None else array[row]
        if bounds is not None:
            # TensorStore would keep the start of a part as its origin.
            wanted = wanted[tuple(slice(*bound) for bound in bounds)].translate_to[0]
        by_column = wanted.chunk_layout.inner_order == tuple(reversed(range(wanted.rank)))
        # Into memory of numpy's, which has large pages: TensorStore's own costs ten times as much.
        result = _aligned_empty(wanted.shape, self.dtype(leaf), "F" if by_column else "C")
        try:
            tensorstore.array(result).write(wanted).result()
            return result
        except ValueError as error:
            raise_if_unreachable(self.directory / leaf, error)
            raise UserError(
                f"{self.directory / leaf}: cannot be read ({_first_line(error)}); "
                "the checkpoint is damaged."
            ) from None


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype, order: Literal["C", "F"]) -> np.ndarray:
    """Memory that JAX on a CPU takes over without a copy: it wants a start on 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return np.ndarray(shape, dtype, raw[start : start + size].data, order=order)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _open_zarr(path: Path | RemotePath) -> Any:
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": kvstore(path),
        # Mapped, so that what is copied out of a file is not copied into a buffer before.
        "context": {"file_io_mode": {"mode": "memmap"}},
        # A file that is not there is a loss, not zeros.
        "fill_missing_data_reads": False,
    }
    try:
        array = tensorstore.open(spec, open=True, read=True).result()
    except ValueError as error:
        raise_if_unreachable(path, error)
        raise UserError(
            f"{path}: cannot be read ({_first_line(error)}); the checkpoint is damaged."
        ) from None
    # A whole chunk is decoded at a time, however little of it the array has.
    chunk = array.chunk_layout.read_chunk.shape or ()  # None of a scalar
    if any(c > max(s, 1) for c, s in zip(chunk, array.shape, strict=True)):
        raise UserError(
            f"{path}: has chunks of {list(chunk)}, which is more than its shape "
            f"{list(array.shape)}; the checkpoint is damaged."
        )
    return array


def check_shapes(arrays: StackedArrays, config: ModelConfig, plan: ExpansionPlan) -> None:
    """Raises UserError unless every leaf of the model is there in its shape."""
    for leaf, (_, shape) in leaves(config, plan).items():
        if arrays.shape(leaf) != shape:
            raise UserError(
                f"{arrays.directory / leaf}: has shape {list(arrays.shape(leaf))}; "
                f"config.json says {list(shape)}."
            )


class StackedWriter:
    """Writes the rows of the arrays of a Flax checkpoint, one at a time."""

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.directory = directory
        self.shapes = shapes
        self._open: dict[str, Any] = {}
        self._write_skeleton()

    def _write_skeleton(self) -> None:
        import orbax.checkpoint as ocp

        # The embedding's dtype and size do not matter here: each leaf's array is made anew by
        # `_create`. What stays is Orbax's own record of the tree.
        tree: dict[str, Any] = {}
        for leaf in self.shapes:
            *parents, name = leaf.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = np.zeros((1,), np.float32)
        absl_log = logging.getLogger("absl")
        level = absl_log.level
        absl_log.setLevel(logging.ERROR)
        try:
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(self.directory.resolve(), args=ocp.args.PyTreeSave(tree))
        finally:
            absl_log.setLevel(level)

    def _create(self, leaf: str, array: np.ndarray) -> Any:
        import tensorstore

        path = self.directory / leaf
        shutil.rmtree(path)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{path.resolve()}/"},
            "dtype": array.dtype.name,
            "metadata": {
                "shape": list(self.shapes[leaf]),
                "chunks": chunks(leaf, self.shapes[leaf], array.dtype),
                # Hugging Face's matrices are ours transposed. The order in which they come goes
                # to the disk: turning them round takes several times as long as writing them.
                "order": "F" if array.strides[0] < array.strides[-1] else "C",
                # Weights hardly compress; the time is better spent on writing them.
                "compressor": None,
            },
            # A row of zeros is written too: an absent file must mean a lost one.
            "store_data_equal_to_fill_value": True,
        }
        return tensorstore.open(spec, create=True, write=True).result()

    def write(self, leaf: str, row: int | None, array: np.ndarray) -> None:
        if leaf not in self._open:
            self._open[leaf] = self._create(leaf, array)
        target = self._open[leaf] if row is None else self._open[leaf][row]
        target.write(array).result()


def chunks(leaf: str, shape: tuple[int, ...], dtype: np.dtype) -> list[int]:
    """One block a chunk in a stack; elsewhere, and in large blocks, at most CHUNK_BYTES each."""
    result = list(shape)
    axis = 0
    if "." in leaf:
        result[0], axis = 1, 1
    if axis < len(shape):
        row_bytes = math.prod(shape[axis + 1 :]) * dtype.itemsize
        rows = max(1, CHUNK_BYTES // max(row_bytes, 1))
        # Chunks of one size: zarr fills up the last one.
        count = max(1, math.ceil(shape[axis] / rows))
        result[axis] = max(1, math.ceil(shape[axis] / count))
    return result
