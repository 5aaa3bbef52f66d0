"""safetensors files of a Hugging Face directory, read and written a tensor at a time.

Reading memory-maps; writing streams, so that a shard is never whole in memory. A header is whatever
its author wrote: all of it is checked before a tensor is mapped.
Source of the format: huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.files import parse_json, read_json, write_json
from llamapro_jax.hf.hub import check_link

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

# Of a model with 9,000 tensors it is 1 MB. JSON takes up to thirty times as much as an object.
LARGEST_HEADER = 2**23
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what its header says. offset: in bytes, of a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(Protocol):
    """Named tensors of a directory, whichever the file format."""

    tensors: Mapping[str, Stored]

    def read(self, name: str) -> np.ndarray: ...


def listed_files(directory: Path, single: str, index: str) -> dict[str, list[str] | None]:
    """File name -> the tensors that the index says it has (None without an index).

    Raises UserError when the index is malformed or a name in it leaves the directory.
    """
    path = directory / index
    if not path.is_file():
        return {single: None}
    check_link(directory, path)
    weight_map = read_json(path)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map.")
    files: dict[str, list[str] | None] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise UserError(
                f"{path}: {tensor} is in {str(file)[:100]!r}; it must be a plain file name."
            )
        names = files.setdefault(file, [])
        assert names is not None
        names.append(tensor)
    return files


def _is_plain(name: str) -> bool:
    """Whether it names a file of the directory itself, on any system."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")


def check_shard(directory: Path, file: str) -> None:
    """Raises UserError unless the file is there, and in `directory`."""
    if not (directory / file).is_file():
        raise UserError(
            f"{directory / file}: no such file, though the checkpoint needs it; "
            "fetch it again or restore it."
        )
    check_link(directory, directory / file)


def shard_files(directory: Path, single: str, index: str) -> dict[str, list[str] | None]:
    """As `listed_files`. Raises UserError also for a file that `check_shard` refuses."""
    files = listed_files(directory, single, index)
    for file in files:
        check_shard(directory, file)
    return files


class SafetensorsReader:
    """The safetensors files of a directory. Raises UserError on a damaged or missing shard."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        for file, expected in shard_files(directory, SINGLE, INDEX).items():
            self._add(directory / file, expected)

    def _add(self, path: Path, expected: Sequence[str] | None) -> None:
        header = read_header(path)
        for name, stored in header.items():
            if name in self.tensors:
                raise UserError(f"{path}: tensor {name} is also in {self.tensors[name].file}.")
            self.tensors[name] = stored
        for name in expected or ():
            if name not in header:
                raise UserError(f"{path}: has no tensor {name}, though {INDEX} says so.")

    def read(self, name: str) -> np.ndarray:
        return read_stored(self.tensors[name])


def read_stored(stored: Stored) -> np.ndarray:
    """The tensor as its safetensors file has it, mapped into memory and not writable."""
    if 0 in stored.shape:  # nothing to map
        return np.empty(stored.shape, stored.dtype)
    mapped = np.memmap(stored.file, stored.dtype, "r", stored.offset, stored.shape)
    return mapped.view(np.ndarray)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Raises UserError unless they fill the file exactly.

    That is: shapes and dtypes say how long each tensor is, each begins where the one before it
    ends, and the last ends with the file. No memory is taken but for the header.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header would be {length:,} bytes long")
            header = parse_json(file.read(length).decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    header.pop("__metadata__", None)
    stored = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise _damaged(path, f"{name} begins at byte {tensor.offset:,}, not at {end:,}")
        end += tensor.nbytes
    if end != size:
        raise _damaged(path, f"it has {size:,} bytes, and its tensors end at {end:,}")
    return stored


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    """One entry of a header, its offsets counted from `start`, with the shape and dtype checked."""
    entry = entry if isinstance(entry, dict) else {}
    code, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(
            f"{path}: tensor {name} has dtype {code if isinstance(code, str) else 'none'}; "
            f"supported: {', '.join(DTYPES)}."
        )
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _damaged(path, f"{name} has no shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name} has no data_offsets")
    stored = Stored(path, tuple(shape), DTYPES[code], start + offsets[0])
    if stored.nbytes != offsets[1] - offsets[0]:
        raise _damaged(
            path,
            f"{name} of shape {shape} in {code} has {stored.nbytes:,} bytes, "
            f"its data_offsets {offsets[1] - offsets[0]:,}",
        )
    return stored


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: cannot be read ({why[:200]}); the file is damaged or truncated, fetch it again."
    )


class BinReader:
    """`pytorch_model*.bin` through `torch.load(weights_only=True)`, a file at a time."""

    def __init__(self, directory: Path) -> None:
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{directory}: reading .bin needs PyTorch, which is not installed; "
                "install torch, or convert the checkpoint to safetensors."
            ) from None
        self._torch = torch
        self._loaded: tuple[Path, Mapping[str, Any]] | None = None
        self.tensors: dict[str, Stored] = {}
        for file in shard_files(directory, BIN_SINGLE, BIN_INDEX):
            for name, tensor in self._load(directory / file).items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                if dtype not in ("bfloat16", "float16", "float32"):
                    raise UserError(f"{directory / file}: tensor {name} has dtype {dtype}.")
                stored = Stored(directory / file, tuple(tensor.shape), np.dtype(dtype))
                self.tensors[name] = stored

    def _load(self, path: Path) -> Mapping[str, Any]:
        if self._loaded is None or self._loaded[0] != path:
            try:
                state = self._torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            except Exception as error:
                # torch raises many types here, pickle's and zip's among them.
                raise UserError(
                    f"{path}: cannot be read as weights only ({type(error).__name__}: {error})."
                ) from None
            self._loaded = (path, state)
        return self._loaded[1]

    def read(self, name: str) -> np.ndarray:
        tensor = self._load(self.tensors[name].file)[name].contiguous()
        if tensor.dtype == self._torch.bfloat16:
            return tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes planned tensors, in their order, into shards of at most `shard_bytes` each.

    A tensor larger than that has a shard of its own. `close` raises when one is missing.
    """

    def __init__(self, directory: Path, planned: Iterable[Planned], shard_bytes: int) -> None:
        self.directory = directory
        self.shards = _split(planned, shard_bytes)
        self.queue = [(i, tensor) for i, shard in enumerate(self.shards) for tensor in shard]
        self.position = 0
        self._file: BinaryIO | None = None
        self._shard = -1

    def file_name(self, shard: int) -> str:
        count = len(self.shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def write(self, name: str, array: np.ndarray) -> None:
        shard, planned = self.queue[self.position]
        given = (name, array.shape, array.dtype)
        if given != (planned.name, planned.shape, planned.dtype):
            raise AssertionError(f"tensor {given} came where {planned} was planned")
        if shard != self._shard:
            self._start(shard)
        assert self._file is not None
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        self.position += 1

    def _start(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.shards[shard]:
            header[tensor.name] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        # A start on 64 bytes lets JAX on a CPU take a mapped tensor over without a copy.
        encoded += b" " * (-(8 + len(encoded)) % 64)
        self._file = open(self.directory / self.file_name(shard), "wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._shard = shard

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self.position != len(self.queue):
            raise AssertionError(f"tensor {self.queue[self.position][1].name} was not written")
        if len(self.shards) == 1:
            return
        tensors = [tensor for shard in self.shards for tensor in shard]
        metadata = {
            "total_size": sum(tensor.nbytes for tensor in tensors),
            "total_parameters": sum(int(np.prod(tensor.shape)) for tensor in tensors),
        }
        weight_map = {tensor.name: self.file_name(i) for i, tensor in self.queue}
        write_json(self.directory / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _split(planned: Iterable[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
