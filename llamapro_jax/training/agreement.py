"""What all processes of a run must have alike: settings, code, base, batches, and copies of arrays.

A host with another checkout, another copy of the data or a flipped bit in its copy of a norm
computes something else, and nothing fails: the sums over all devices mix it into the weights of
all. So the processes compare, at the start what cannot change later, and every
`training.compare_every` steps what can. In a single process there is nothing to compare.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import llamapro_jax
from llamapro_jax.checksum import checksum, host_checksum
from llamapro_jax.config import RunConfig
from llamapro_jax.data.rows import DTYPES
from llamapro_jax.errors import UserError
from llamapro_jax.launch.processes import count, from_all, from_first
from llamapro_jax.model.weights import tensors
from llamapro_jax.sources import HFSource, Source, read_part
from llamapro_jax.training.setup import Setup
from llamapro_jax.training.state import TrainState, leaves_by_path
from llamapro_jax.typed_yaml import plain_leaves

# What decides which numbers come out, beside our own code.
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes",
    "transformers", "tokenizers", "array_record", "tensorflow-datasets",
)  # fmt: skip
# Of how much a message speaks.
_NAMES, _PROCESSES = 3, 8
# Elements along each dimension of a tensor that are compared.
_SAMPLE = 16


# ------------------------------------------------------------------- before the run


def require_same_command(config: RunConfig) -> None:
    """Raises UserError, on all processes, when one has other settings, code or libraries."""
    if count() == 1:
        return
    settings = {path: json.dumps(value) for path, value in plain_leaves(config)}
    require_alike("settings", settings, "Give all of them the same command and CONFIG.")
    require_alike("code", dict(_code()), "Install the same version of everything on all of them.")


def require_same_inputs(setup: Setup) -> None:
    """Raises UserError, on all processes, when one reads another base or other texts.

    Of the base that is what `_base` samples, of each text its fingerprint and the rows of the first
    batch.
    """
    if count() == 1:
        return
    require_alike(
        "base",
        dict(_base(setup.source)),
        f"Put the same model in {setup.config.model} on all of them.",
    )
    data = {
        f"data.{where}": f"{len(rows)} rows, fingerprint {rows.digest[:12]}"
        for where, rows in setup.data.rows.items()
    }
    data |= _rows(setup, setup.resume_step or 0)
    require_alike("data", data, "Put the same prepared texts where all of them read.")


def require_alike(what: str, mine: Mapping[str, str], mend: str) -> None:
    """Raises UserError, on all processes, unless all of them give the same.

    All processes call this in the same order. The message names the first differences to what
    process 0 has, and the processes and hosts that have them.
    """
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(from_all(digest))) == 1:
        return
    host = socket.gethostname()
    first, first_host = from_first(lambda: [dict(mine), host])
    names = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    told = from_all([host, len(names), [[name, mine.get(name)] for name in names[:_NAMES]]])
    lines = []
    for index, (where, differences, shown) in enumerate(told):
        for name, value in shown:
            lines.append(
                f"  {name} is {_shown(value)} on process {index} ({where}), and "
                f"{_shown(first.get(name))} on process 0 ({first_host})"
            )
        if differences > len(shown):
            lines.append(f"  and {differences - len(shown)} more on process {index} ({where})")
    shown_lines = lines[: _NAMES * _PROCESSES]
    if len(lines) > len(shown_lines):
        shown_lines.append("  and more on other processes")
    raise UserError(
        f"the processes of this run do not have the same {what}:\n"
        + "\n".join(shown_lines)
        + f"\n{mend}"
    )


def _shown(value: str | None) -> str:
    return "absent" if value is None else value


def _code() -> Iterator[tuple[str, str]]:
    """The hash of each source file of this package, and the versions of what it calls."""
    root = Path(llamapro_jax.__file__).parent
    for file in sorted(root.rglob("*.py")):
        yield f"{root.name}/{file.relative_to(root).as_posix()}", _short(file.read_bytes())
    yield "Python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    yield "platform", f"{jax.default_backend()} {_platform_version()}"


def _platform_version() -> str:
    from jax.extend import backend

    return " ".join(backend.get_backend().platform_version.split())


def _base(source: Source) -> Iterator[tuple[str, str]]:
    """What tells one model from another without reading it.

    Its digest where one is recorded, and hashes of all vectors and, of files that are mapped into
    memory, of a small part of every matrix. Other formats read a matrix whole.
    """
    if not isinstance(source, HFSource):
        yield "digest", source.fingerprint().digest[:12]
    for tensor in tensors(source.config):
        shape = tensor.weight.shape(source.config)
        if len(shape) > 1 and not isinstance(source, HFSource):
            continue
        bounds, at = [], zlib.crc32(tensor.name.encode())
        for size in shape:
            width = size if len(shape) == 1 else min(size, _SAMPLE)
            start = at % (size - width + 1)
            bounds.append((start, start + width))
        part = np.ascontiguousarray(read_part(source, tensor, bounds))
        yield tensor.name, f"{source.dtype(tensor).name} {_short(part.tobytes())}"


def _rows(setup: Setup, step: int) -> dict[str, str]:
    """The hash of each row of the global batch that follows `step` steps, as it is read here."""
    mixture = setup.data.mixture
    batch, places = mixture.rows(step, 0, mixture.batch_size), mixture.places(step)
    return {
        f"row {b} of the batch of step {step + 1} ({name}, row {row})": _short(
            b"".join(batch[array][b].tobytes() for array in DTYPES)
        )
        for b, (name, row) in enumerate(places)
    }


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


# ------------------------------------------------------------------- while it runs


class Comparison:
    """Compares, over all devices, the step, the batch and the copies of every array of the state.

    An array, or a part of one, that lies on several devices must have the same bits on all of them.
    Each device takes the checksums of its own parts; one program, which all run at the same step,
    says whether some differ. That reads the state once, in the devices' memory.

    every: steps after which one is `due`; None: never. One process has nothing to compare.
    """

    def __init__(self, setup: Setup, every: int | None) -> None:
        self._setup = setup
        self._several = setup.mesh.is_multi_process
        self._every = every if self._several else None
        self._compare: Any = None
        self._alike: int | None = None

    def due(self, step: int) -> bool:
        """step: number of steps taken."""
        return self._every is not None and step % self._every == 0

    def batch(self, step: int) -> int:
        """A number, below 2^32, of the global batch that follows `step` steps, when its step is one
        after which to compare, else 0. It is read whole, which is why the loader's thread asks."""
        if not self.due(step + 1):
            return 0
        return int(_short("".join(_rows(self._setup, step).values()).encode())[:8], 16)

    def __call__(self, step: int, state: TrainState, frozen: Any, batch: int = 0) -> None:
        """Raises UserError, on all processes, when something differs after `step` steps."""
        if not self._several:
            return
        leaves = leaves_by_path({"state": state, "frozen": frozen})
        if self._compare is None:
            specs = [leaf.sharding.spec for leaf in leaves.values()]
            self._compare = jax.jit(partial(_differ, self._setup.mesh, specs))
        sharding = NamedSharding(self._setup.mesh, PartitionSpec(self._setup.mesh.axis_names))
        numbers = jax.make_array_from_callback(
            (self._setup.mesh.size, 2), sharding, lambda _: np.array([[step, batch]], np.uint32)
        )
        differ = jax.device_get(self._compare(list(leaves.values()), numbers))
        if not differ.any():
            self._alike = step
            return
        of_numbers, of_leaves = differ[:2], differ[2:]
        require_alike("step", {"the number of steps taken": str(step)}, self._mend())
        if of_numbers[1]:
            data = "Put the same prepared texts where all of them read. "
            require_alike("data", _rows(self._setup, step - 1), data + self._mend())
        self._raise_of_copies(
            step,
            {path: leaf for (path, leaf), no in zip(leaves.items(), of_leaves, strict=True) if no},
        )

    def _mend(self) -> str:
        since = "at the start" if self._alike is None else f"after step {self._alike}"
        return (
            f"They were last seen to agree {since}; remove later steps from "
            f"{self._setup.directory}/checkpoints before the run goes on."
        )

    def _raise_of_copies(self, step: int, leaves: Mapping[str, jax.Array]) -> None:
        shown = dict(list(leaves.items())[:_NAMES])
        told = from_all(
            [socket.gethostname(), {path: _parts(leaf) for path, leaf in shown.items()}]
        )
        lines = []
        for path in shown:
            parts = sorted({part for _, of in told for part in of[path]})
            for part in parts:
                found = [
                    (index, host, value)
                    for index, (host, of) in enumerate(told)
                    for value in of[path].get(part, [])
                ]
                if len({value for *_, value in found}) > 1:
                    lines.append(
                        f"  {path}{part}: "
                        + "; ".join(
                            f"{value} on process {index} ({host})"
                            for index, host, value in found[:_PROCESSES]
                        )
                    )
        if len(leaves) > len(shown):
            lines.append(f"  and {len(leaves) - len(shown)} more arrays")
        raise UserError(
            f"the processes of this run do not have the same copies of what each must have after "
            f"step {step}, checksums:\n" + "\n".join(lines) + "\nA device or its memory is faulty, "
            f"most likely of the process that stands alone. {self._mend()}"
        )


def _differ(
    mesh: Mesh, specs: list[PartitionSpec], leaves: list[jax.Array], numbers: jax.Array
) -> jax.Array:
    """Booleans: for each of the numbers [devices, n], then for each leaf, whether copies differ."""

    def local(parts: list[jax.Array], number: jax.Array) -> jax.Array:
        # Which sums are to be alike along which axes: those that the leaf does not lie over.
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, spec in enumerate(specs):
            over = {axis for entry in spec for axis in _axes(entry)}
            copies = tuple(a for a in mesh.axis_names if a not in over and mesh.shape[a] > 1)
            if copies:
                groups.setdefault(copies, []).append(i)
        found = jnp.zeros(len(specs), bool)
        for copies, members in groups.items():
            sums = jnp.stack([checksum(parts[i]) for i in members])
            found = found.at[jnp.array(members)].set(_several(sums, copies))
        differ = jnp.concatenate([_several(number[0], mesh.axis_names), found])
        return lax.pmax(differ.astype(jnp.int32), mesh.axis_names) > 0

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, PartitionSpec(mesh.axis_names)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(leaves, numbers)


def _several(values: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Of uint32 [n]: whether the devices along the axes have different ones."""
    largest = lax.pmax(jnp.concatenate([values, ~values]), axes)
    return largest[: len(values)] != ~largest[len(values) :]


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _parts(leaf: jax.Array) -> dict[str, list[str]]:
    """The checksums of what this process has of an array, by the part that it is of it."""
    found: dict[str, list[str]] = {}
    for shard in leaf.addressable_shards:
        bounds = [piece.indices(n)[:2] for piece, n in zip(shard.index, leaf.shape, strict=True)]
        whole = all(bound == (0, n) for bound, n in zip(bounds, leaf.shape, strict=True))
        part = "" if whole else "[" + ", ".join(f"{a}:{b}" for a, b in bounds) + "]"
        value = f"{host_checksum(np.asarray(shard.data)):08x}"
        if value not in found.setdefault(part, []):
            found[part].append(value)
    return found
