"""Going on from a checkpoint: the newest step that is whole, on all processes the same.

Steps are read without Orbax, which restores flipped bits, other dtypes and missing leaves without a
word, and whose processes wait for each other when one fails: paths, shapes and dtypes are compared
before, checksums after, and a step that does not pass is set aside for the one before it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from llamapro_jax.checkpoint import Report
from llamapro_jax.checkpoint_files import (
    ARRAY_METADATA,
    COMMIT_FILE,
    ITEMS,
    OPTIMIZER,
    TRAINABLE,
    Damaged,
    Directory,
    committed_steps,
    read_leaf,
    read_meta,
    set_aside,
    steps_set_aside,
    steps_without_commit,
    stored_arrays,
    wrong_checksum,
)
from llamapro_jax.checksum import checksums
from llamapro_jax.errors import UserError
from llamapro_jax.exit_codes import CHECKPOINT_LOST
from llamapro_jax.launch.processes import SEEN_WITHIN, first_given, from_first
from llamapro_jax.local_copies import bring, brought
from llamapro_jax.remote import as_path
from llamapro_jax.training.state import leaf_path, leaves_by_path


class CheckpointLost(UserError):
    """A run had checkpoints, and none of them can be trusted."""

    status = CHECKPOINT_LOST


@dataclass(frozen=True)
class Restored:
    """A step as it was saved."""

    step: int
    trainable: Any
    optimizer: Any
    meta: Mapping[str, Any]


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, as `restore_newest` takes them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def check_not_lost(directory: str | Directory) -> None:
    """Raises CheckpointLost when steps were set aside or lost their commit files, and none is left.

    To be asked before `Checkpoints` is made, which removes what has no commit file.
    """
    directory = as_path(directory)
    uncommitted = steps_without_commit(directory)
    if uncommitted:
        files = ", ".join(f"{step}/{COMMIT_FILE}" for step in uncommitted)
        raise CheckpointLost(
            f"{directory}: the steps {', '.join(map(str, uncommitted))} are whole, but without "
            f"their commit files, as after a copy that left them out. Put back {files} (they may "
            "be empty: every array is compared with its checksum when it is read), or remove this "
            "directory to begin anew."
        )
    aside = steps_set_aside(directory)
    if aside and not committed_steps(directory):
        raise CheckpointLost(
            f"{directory}: no checkpoint is left that can be trusted; set aside: "
            f"{', '.join(aside)}. Put back a copy of one under its number, or remove this "
            "directory to begin anew."
        )


def restore_newest(
    directory: str | Directory,
    trainable: Any,
    optimizer: Any,
    aside: Report = lambda step, reason: None,
) -> Restored | None:
    """The newest step that passes its checks; None where no step was ever saved.

    All processes of a run call this together, and get the same step. trainable, optimizer: trees
    of `jax.ShapeDtypeStruct` with shardings, as they are to come back. aside: told, on every
    process, of each step that did not pass: it is renamed, and nothing of it was used.

    Raises UserError when a step is whole, but another run's, and CheckpointLost when none is left.
    """
    directory = as_path(directory).absolute()
    wanted = {TRAINABLE: trainable, OPTIMIZER: optimizer}
    while True:
        steps = from_first(lambda: committed_steps(directory))
        if not steps:
            from_first(lambda: check_not_lost(directory))
            return None
        restored, problem = _restore(directory / str(steps[-1]), wanted)
        if problem is None:
            return restored
        del restored
        from_first(partial(set_aside, directory, steps[-1]))
        aside(steps[-1], problem)


def _restore(step: Directory, wanted: Mapping[str, Any]) -> tuple[Restored | None, str | None]:
    """The step, or what is wrong with it. No process goes on before all could read their parts."""
    trees, meta, problem = {}, {}, None
    _wait_until_seen(step / COMMIT_FILE)
    try:
        meta = read_meta(step)
        for item in ITEMS:
            _compare(step / item, meta["leaves"][item], leaves_by_path(wanted[item]))
        with brought(step, ARRAY_METADATA) as here:
            trees = {
                item: _read(step, here, item, meta["leaves"][item], wanted[item]) for item in ITEMS
            }
    except Damaged as error:
        problem = error.reason
    problem = first_given(problem)
    if problem is None:
        found = {item: checksums(trees[item]) for item in ITEMS}
        wrong = [
            wrong_checksum(item, leaf)
            for item in ITEMS
            for leaf, saved in meta["leaves"][item].items()
            if found[item][leaf] != saved["checksum"]
        ]
        problem = first_given(wrong[0] if wrong else None)
    if problem is not None:
        return None, problem
    for item in ITEMS:
        _check_placed(trees[item], wanted[item])
    return Restored(meta["step"], trees[TRAINABLE], trees[OPTIMIZER], meta), None


def _wait_until_seen(file: Directory) -> None:
    """Network file systems show a new file after some seconds."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not file.is_file():
        if time.monotonic() > deadline:
            raise UserError(
                f"{file}: process 0 sees it and this process does not; the run's directory must be "
                "on a file system that all hosts share."
            )
        time.sleep(0.2)


def _compare(where: Directory, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Nothing is cast, padded or left out where these differ."""
    for path in sorted(set(saved) | set(wanted)):
        if path not in saved:
            raise UserError(f"{where}: has no {path}, which this run trains; it is another run's.")
        if path not in wanted:
            raise UserError(f"{where}: has {path}, which this run lacks; it is another run's.")
        new = {"shape": list(wanted[path].shape), "dtype": wanted[path].dtype.name}
        for what, value in new.items():
            if saved[path][what] != value:
                raise UserError(
                    f"{where}: {path} has {what} {saved[path][what]}, this run's has {value}; it "
                    "is another run's."
                )


def _read(
    step: Directory, here: Directory, item: str, saved: Mapping[str, Any], wanted: Any
) -> Any:
    """The tree, of which each process reads what its devices need.

    here: the step itself, or where its files come to that TensorStore does not read there.
    """
    arrays = stored_arrays(here, item, saved)

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(
                (piece.start or 0, size if piece.stop is None else piece.stop)
                for piece, size in zip(index, leaf.shape, strict=True)
            )
            if bounds not in parts:  # devices with the same part share one reading
                name = leaf_path(path)
                files = (f"{item}/{name}/{file}" for file in arrays.files(name, bounds or None))
                bring(step, here, files)
                parts[bounds] = read_leaf(arrays, name, None, bounds or None)
            return parts[bounds]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree_util.tree_map_with_path(one, wanted)


def _check_placed(tree: Any, wanted: Any) -> None:
    for path, leaf in leaves_by_path(wanted).items():
        found = leaves_by_path(tree)[path]
        if (found.shape, found.dtype, found.sharding) != (leaf.shape, leaf.dtype, leaf.sharding):
            raise AssertionError(f"{path} came back as {found.sharding}, not {leaf.sharding}")
