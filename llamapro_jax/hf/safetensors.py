"""safetensors files of a Hugging Face directory, read and written a tensor at a time.

Reading memory-maps; writing streams, so that a shard is never whole in memory.
Source of the format: huggingface/safetensors, README.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json, write_json

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


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what its header says. offset: in bytes, of a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0


class Weights(Protocol):
    """Named tensors of a directory, whichever the file format."""

    tensors: Mapping[str, Stored]

    def read(self, name: str) -> np.ndarray: ...


def shard_files(directory: Path, single: str, index: str) -> dict[str, list[str] | None]:
    """File name -> the tensors that the index says it has (None without an index).

    Raises UserError when a file is missing or its name leaves the directory.
    """
    if (directory / index).is_file():
        path = directory / index
        weight_map = read_json(path)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path}: has no weight_map.")
        files: dict[str, list[str] | None] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise UserError(f"{path}: {tensor} is in {file!r}; it must be a plain file name.")
            names = files.setdefault(file, [])
            assert names is not None
            names.append(tensor)
    else:
        files = {single: None}
    for file in files:
        if not (directory / file).is_file():
            raise UserError(
                f"{directory / file}: no such file, though the checkpoint needs it; "
                "fetch it again or restore it."
            )
    return files


class SafetensorsReader:
    """The safetensors files of a directory. Raises UserError on a damaged or missing shard."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        for file, expected in shard_files(directory, SINGLE, INDEX).items():
            self._add(directory / file, expected)

    def _add(self, path: Path, expected: Sequence[str] | None) -> None:
        try:
            # Opening it checks the header: lengths, offsets, and that the file is as long as that.
            with safe_open(path, framework="numpy"):
                header, start = _read_header(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); the file is damaged or truncated, "
                "fetch it again."
            ) from None
        for name, tensor in header.items():
            if name in self.tensors:
                raise UserError(f"{path}: tensor {name} is also in {self.tensors[name].file}.")
            if tensor["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: tensor {name} has dtype {tensor['dtype']}; "
                    f"supported: {', '.join(DTYPES)}."
                )
            dtype, offset = DTYPES[tensor["dtype"]], start + tensor["data_offsets"][0]
            self.tensors[name] = Stored(path, tuple(tensor["shape"]), dtype, offset)
        for name in expected or ():
            if name not in header:
                raise UserError(f"{path}: has no tensor {name}, though {INDEX} says so.")

    def read(self, name: str) -> np.ndarray:
        """The tensor as the file has it, mapped into memory and not writable."""
        stored = self.tensors[name]
        mapped = np.memmap(stored.file, stored.dtype, "r", stored.offset, stored.shape)
        return mapped.view(np.ndarray)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says about its tensors, and where their bytes start."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


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
