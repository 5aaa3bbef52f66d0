"""What a checkpoint is on disk, and whether it is whole: needs no device and no Orbax.

```
checkpoints/<step>/trainable   a directory a leaf ("new.1.q"), one chunk a block
                   optimizer   likewise
                   meta        JSON: step, model_digest, leaves, ..., digest
                   commit_success.txt   written last; a step without it does not exist
            <step>.damaged     set aside: it did not pass its checks
            .deleted-<step>    on its way out
```
`leaves` has shape, dtype and checksum of every leaf of both items, and `digest` is the SHA-256 of
all else in the meta item, so that no bit of a step that is read goes unproved. Orbax's own files
(`_METADATA`, `_sharding`, ...) are not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.checksum import host_checksum
from llamapro_jax.errors import UserError
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.local_copies import brought
from llamapro_jax.remote import (
    RemotePath,
    Unreachable,
    as_path,
    raise_if_unreachable,
    remove,
    sizes,
)

log = logging.getLogger(__name__)

TRAINABLE, OPTIMIZER, META = "trainable", "optimizer", "meta"
ITEMS = (TRAINABLE, OPTIMIZER)
COMMIT_FILE = "commit_success.txt"
# Of the files of a step, what says how an array lies in the others (zarr).
ARRAY_METADATA = "*/.zarray"

_META_FILE = Path(META) / "metadata"
# Requests to a store.
_AT_ONCE = 16
_SET_ASIDE = re.compile(r"\d+\.damaged(-\d+)?")
# What a dead process leaves: of Orbax (which names its own so in some modes) and of ours.
_LEFTOVER = re.compile(r"\.deleted-.*|.*\.orbax-checkpoint-tmp.*")

# Of a library's message so many characters are shown, from both ends.
_LINE = 240

# Of a run: local, or a remote one, whose methods that are used here are the same.
Directory = Path | RemotePath


class Damaged(UserError):
    """A step is not what was saved. `reason`: of which file, without the step's directory."""

    def __init__(self, step: Directory, reason: str) -> None:
        super().__init__(
            f"{step}: the checkpoint is damaged ({reason}). Put back a copy of it; when its run "
            "goes on, it is set aside for the one before."
        )
        self.reason = reason


def committed_steps(directory: str | Directory) -> list[int]:
    """The steps in `checkpoints/` that were saved to their end, in order."""
    directory = as_path(directory)
    if not directory.is_dir():
        return []
    found = [entry for entry in directory.iterdir() if entry.name.isdecimal()]
    return sorted(int(entry.name) for entry in found if (entry / COMMIT_FILE).is_file())


# ------------------------------------------------------------------- what does not count


def steps_without_commit(directory: Directory) -> list[int]:
    """The steps that are whole but for the commit file, where no step has one and several lack it.

    A save that was killed leaves one such step, and beside steps that were committed. Several and
    nothing else is what a copy leaves that passed the commit files over.
    """
    if not directory.is_dir() or committed_steps(directory):
        return []
    numbers = sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())
    if len(numbers) < 2:
        return []
    whole = [step for step in numbers if missing_file(directory / str(step)) is None]
    return whole if len(whole) > 1 else []


def steps_set_aside(directory: Directory) -> list[str]:
    """The names of the steps that were set aside and are still there."""
    if not directory.is_dir():
        return []
    return sorted(entry.name for entry in directory.iterdir() if _SET_ASIDE.fullmatch(entry.name))


def set_aside(directory: Directory, step: int) -> str:
    """Renames a step, so that it counts no more but is not lost. Returns its new name."""
    name, number = f"{step}.damaged", 1
    while (directory / name).exists():
        number += 1
        name = f"{step}.damaged-{number}"
    damaged = directory / str(step)
    if isinstance(damaged, RemotePath):
        _move(damaged, directory / name)
    else:
        damaged.rename(directory / name)
    return name


def _move(step: RemotePath, target: RemotePath) -> None:
    """A rename in three acts, of which the second decides: killed before it, the step still is
    one and is set aside again; after it, what is left of it is a leftover."""
    names = list(step.files())
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(lambda name: (step / name).copy(target / name), names))
    (step / COMMIT_FILE).unlink(missing_ok=True)
    remove_step(step)


def remove_step(step: Directory) -> None:
    """What cannot be removed stays, as a leftover, for the next start."""
    if isinstance(step, Path):
        shutil.rmtree(step, ignore_errors=True)
        return
    with suppress(Unreachable):
        (step / COMMIT_FILE).unlink(missing_ok=True)  # first: what is half removed is no step
        step.rmtree()


def remove_leftovers(directory: Directory) -> list[str]:
    """Removes what saves and deletions left that did not come to their end. Returns the names.

    What cannot be removed stays, with a warning: on NFS, files that a dying process has open.
    """
    removed = []
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        dead = entry.name.isdecimal() and not (entry / COMMIT_FILE).is_file()
        if entry.is_dir() and (dead or _LEFTOVER.fullmatch(entry.name)):
            try:
                remove(_out_of_the_way(entry))
            except OSError as error:
                log.warning("%s: is left of a save and cannot be removed (%s)", entry, error)
            else:
                removed.append(entry.name)
    return removed


def _out_of_the_way(entry: Directory) -> Directory:
    """Under another name, where that is one act, so that the step can be saved anew."""
    if isinstance(entry, Path) and entry.name.isdecimal():
        with suppress(OSError):
            return entry.rename(entry.with_name(f".deleted-{entry.name}"))
    return entry


# ------------------------------------------------------------------- the meta item


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as it comes back from JSON, with its digest."""
    plain = json.loads(json.dumps(dict(meta)))
    return {**plain, "digest": _digest(plain)}


def _digest(meta: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(step: Directory) -> dict[str, Any]:
    """The meta item of a step. Raises Damaged unless it is what was saved."""
    try:
        meta = json.loads((step / _META_FILE).read_bytes())
    except (OSError, ValueError, MemoryError) as error:
        raise_if_unreachable(step / _META_FILE, error)
        raise Damaged(step, f"{_META_FILE}: {first_line(error)}") from None
    if isinstance(meta, dict) and "checksums" in meta and "digest" not in meta:
        raise UserError(
            f"{step}: was saved by an earlier version of llamapro_jax, whose checkpoints this one "
            "does not read; go on with that version, or name another output."
        )
    if not isinstance(meta, dict) or meta.get("digest") != _digest(meta):
        raise Damaged(step, f"{_META_FILE}: its digest is not that saved")
    if str(meta["step"]) != step.name.partition(".")[0]:
        raise Damaged(step, f"{_META_FILE}: is that of step {meta['step']}")
    return meta


# ------------------------------------------------------------------- the arrays


def stored_arrays(step: Directory, item: str, leaves: Mapping[str, Any]) -> StackedArrays:
    """Reads the leaves of an item. Raises Damaged unless all have the shape and dtype saved."""
    arrays = StackedArrays(step / item)
    if isinstance(step, RemotePath):
        with suppress(UserError):  # which is met again below, with its leaf
            arrays.open(leaves)
    for leaf, saved in leaves.items():
        try:
            found = {"shape": list(arrays.shape(leaf)), "dtype": arrays.dtype(leaf).name}
        except Exception as error:  # whatever TensorStore makes of a damaged file
            raise_if_unreachable(arrays.directory / leaf, error)
            raise _unreadable(arrays, leaf, error) from None
        for what, value in found.items():
            if value != saved[what]:
                reason = f"{item} {leaf}: has {what} {value}, was saved with {saved[what]}"
                raise Damaged(step, reason)
    return arrays


def read_leaf(arrays: StackedArrays, leaf: str, *place: Any) -> Any:
    """As `StackedArrays.read`, raising Damaged."""
    try:
        return arrays.read(leaf, *place)
    except Exception as error:
        raise_if_unreachable(arrays.directory / leaf, error)
        raise _unreadable(arrays, leaf, error) from None


def _unreadable(arrays: StackedArrays, leaf: str, error: Exception) -> Damaged:
    item = arrays.directory
    text = str(error).removeprefix(f"{item / leaf}: ").removesuffix("; the checkpoint is damaged.")
    return Damaged(item.parent, f"{item.name} {leaf}: {first_line(text or error)}")


def missing_file(step: Directory) -> str | None:
    """What a step lacks, as far as it shows without reading the arrays; None: nothing."""
    try:
        described = read_meta(step)["leaves"]
        with brought(step, ARRAY_METADATA) as here:
            for item, leaves in described.items():
                arrays = stored_arrays(here, item, leaves)
                names = [name.split("/") for name, size in sizes(step / item).items() if size]
                chunks = Counter(leaf for leaf, *file in names if file and file[0][0] != ".")
                for leaf in leaves:
                    found, wanted = chunks[leaf], arrays.chunks(leaf)
                    if found != wanted:
                        return f"{item} {leaf}: has {found} of {wanted} files"
    except Damaged as error:
        return error.reason
    return None


def verify_step(step: Directory) -> list[str]:
    """What is wrong with a step, having read all of it: a line a leaf, none when it is whole."""
    try:
        leaves = read_meta(step)["leaves"]
    except Damaged as error:
        return [error.reason]
    problems = []
    for item, saved in leaves.items():
        for leaf, description in saved.items():
            try:
                arrays = stored_arrays(step, item, {leaf: description})
                if _leaf_checksum(arrays, leaf) != description["checksum"]:
                    problems.append(wrong_checksum(item, leaf))
            except Damaged as error:
                problems.append(error.reason)
    return problems


def _leaf_checksum(arrays: StackedArrays, leaf: str) -> int:
    """With one row of a stack in memory at a time."""
    shape = arrays.shape(leaf)
    if len(shape) < 3:
        return host_checksum(read_leaf(arrays, leaf))
    size, total = math.prod(shape[2:]), 0
    for number, row in enumerate(np.ndindex(shape[:2])):
        total += host_checksum(read_leaf(arrays, leaf, row), number * size)
    return total % 2**32


class ProvedArrays:
    """The arrays of an item of a step, as `StackedArrays` reads them.

    A leaf is compared with its checksum before the first reading of any part of it. Raises Damaged.
    """

    def __init__(self, step: Directory, item: str) -> None:
        self.directory = step / item
        self._step, self._item = step, item
        self._leaves = read_meta(step)["leaves"][item]
        self._arrays = stored_arrays(step, item, self._leaves)
        self._proved: set[str] = set()

    def shape(self, leaf: str) -> tuple[int, ...] | None:
        """None where the step has no such leaf."""
        return self._arrays.shape(leaf) if leaf in self._leaves else None

    def read(self, leaf: str, *place: Any) -> np.ndarray:
        if leaf not in self._proved:
            if _leaf_checksum(self._arrays, leaf) != self._leaves[leaf]["checksum"]:
                raise Damaged(self._step, wrong_checksum(self._item, leaf))
            self._proved.add(leaf)
        return read_leaf(self._arrays, leaf, *place)


def wrong_checksum(item: str, leaf: str) -> str:
    return f"{item} {leaf}: its checksum is not that saved"


def first_line(error: BaseException | str) -> str:
    """What is wrong, in a line: TensorStore puts paths before it and its own settings behind."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    line = re.sub(r" \[(tensorstore_spec|source locations)=.*", "", line)
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]} ... {line[-_LINE // 2 :]}"
