"""What a model is, to the byte: name, shape, dtype and SHA-256 of each Hugging Face tensor."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.files import read_json, write_json

FILE = "fingerprint.json"
_BLOCK = re.compile(r"(model\.layers\.)([0-9]{1,9})(\..*)", re.DOTALL)


@dataclass(frozen=True)
class TensorPrint:
    """Of one tensor in the layout of Hugging Face. sha256: of its bytes, in hexadecimal."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


def tensor_print(array: np.ndarray) -> TensorPrint:
    """The print of a tensor in the layout of Hugging Face; bytes are hashed in C order."""
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return TensorPrint(array.shape, array.dtype.name, hashlib.sha256(raw).hexdigest())


@dataclass(frozen=True)
class Fingerprint:
    """Prints of all tensors of a model, by Hugging Face name."""

    tensors: Mapping[str, TensorPrint]

    @property
    def digest(self) -> str:
        """One hash for the model, independent of the order of tensors and of sharding."""
        rows = [[n, list(t.shape), t.dtype, t.sha256] for n, t in sorted(self.tensors.items())]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def until(self, plan: ExpansionPlan, generation: int) -> Fingerprint:
        """The fingerprint of the model that this one was after `generation`."""
        shallow = {deep: i for i, deep in enumerate(plan.depths_until(generation))}
        kept = {}
        for name, value in self.tensors.items():
            block = _BLOCK.fullmatch(name)
            if block is not None:
                if int(block[2]) not in shallow:
                    continue
                name = f"{block[1]}{shallow[int(block[2])]}{block[3]}"
            kept[name] = value
        return Fingerprint(kept)

    def difference(self, other: Fingerprint) -> list[str]:
        """Names of the tensors that are not the same in both, sorted."""
        names = set(self.tensors) | set(other.tensors)
        return sorted(n for n in names if self.tensors.get(n) != other.tensors.get(n))

    def write(self, directory: Path) -> None:
        rows = {
            name: {"shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256}
            for name, t in self.tensors.items()
        }
        write_json(directory / FILE, {"digest": self.digest, "tensors": rows})

    @staticmethod
    def read(directory: Path) -> Fingerprint:
        """What `fingerprint.json` of a model's directory says.

        Raises UserError when the file is malformed or its digest is not that of its rows.
        """
        path = directory / FILE
        values: Any = read_json(path)
        try:
            fingerprint = Fingerprint(
                {
                    name: TensorPrint(tuple(row["shape"]), row["dtype"], row["sha256"])
                    for name, row in values["tensors"].items()
                }
            )
            digest = values["digest"]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: is malformed; convert the model again.") from None
        if fingerprint.digest != digest:
            raise UserError(f"{path}: was changed after it was written; convert the model again.")
        return fingerprint
