"""Checkpoints of a run: what trains, the optimizer's state and the step, kept by Orbax.

```
checkpoints/<step>/trainable   a directory a leaf ("new.1.q"), one chunk a block
                   optimizer   likewise
                   meta        JSON: step, model_digest, checksums, ...
                   commit_success.txt   written last; a step without it does not exist
```
The one module that knows of Orbax's `CheckpointManager`. A save runs in the background while
training goes on. Orbax restores flipped bits, other dtypes and missing leaves without a word, so
that paths, shapes and dtypes are compared before a restore, and checksums after it.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llamapro_jax.checksum import checksums
from llamapro_jax.errors import UserError
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.launch.processes import is_first
from llamapro_jax.training.state import leaf_path

TRAINABLE, OPTIMIZER, META = "trainable", "optimizer", "meta"
COMMIT_FILE = "commit_success.txt"

# A block of a stack is a chunk of its own, so that one can be read without the others. Orbax
# warns of chunks below 1 MiB, which many files make slow.
_SMALLEST_CHUNK = 2**20

# What Orbax says about every save without OCDBT, which is what this module asks for.
_EXPECTED_WARNING = "Skipping merge of OCDBT checkpoints"


def committed_steps(directory: str | Path) -> list[int]:
    """The steps in `checkpoints/` that were saved to their end, in order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [entry for entry in directory.iterdir() if entry.name.isdecimal()]
    return sorted(int(entry.name) for entry in found if (entry / COMMIT_FILE).is_file())


class Checkpoints:
    """Saves and restores steps in `directory`, the newest `keep` of them. A context manager.

    What an earlier process left half-saved is removed first. All processes of a run make one, in
    the same directory, and call `save` and `restore` together: each writes and reads its parts.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        self.directory = Path(directory).absolute()
        if is_first():
            _remove_uncommitted(self.directory)
        logging.getLogger("absl").addFilter(_not_expected)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            # With renames alone, an empty directory of a step counts as the latest one.
            atomicity_options=ocp.options.AtomicityOptions(
                mode=ocp.options.AtomicityMode.COMMIT_FILE
            ),
        )
        handlers = {
            # Without OCDBT each leaf is a zarr directory that other readers open row by row.
            TRAINABLE: ocp.PyTreeCheckpointHandler(use_ocdbt=False),
            OPTIMIZER: ocp.PyTreeCheckpointHandler(use_ocdbt=False),
            META: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def latest(self) -> int | None:
        """The newest step that was saved to its end."""
        return max(committed_steps(self.directory), default=None)

    def save(self, step: int, trainable: Any, optimizer: Any, meta: Mapping[str, Any]) -> None:
        """Begins to save; the arrays may be used up (donated) as soon as this returns.

        Raises UserError when this or the save before it cannot be written.
        """
        sums = {TRAINABLE: checksums(trainable), OPTIMIZER: checksums(optimizer)}
        arguments = ocp.args.Composite(
            trainable=ocp.args.PyTreeSave(trainable, save_args=_save_args(trainable)),
            optimizer=ocp.args.PyTreeSave(optimizer, save_args=_save_args(optimizer)),
            meta=ocp.args.JsonSave({**meta, "step": step, "checksums": sums}),
        )
        with self._writing():
            self._manager.save(step, args=arguments)

    def wait(self) -> None:
        """Returns when every save is on disk. Raises UserError when one cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # else the exception under way says more
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types
            latest = self.latest()
            again = "starts anew" if latest is None else f"goes on from step {latest}"
            raise UserError(
                f"{self.directory}: a checkpoint could not be written ({_first_line(error)}). "
                f"Make room or mend the disk; the same command then {again}."
            ) from error

    def restore(self, step: int, trainable: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(trainable, optimizer, meta) of a step.

        trainable, optimizer: trees of arrays or of `jax.ShapeDtypeStruct` with shardings, as they
        are to come back. Raises UserError that names the step's directory and the leaf when the
        checkpoint is of something else or is damaged.
        """
        directory = self.directory / str(step)
        wanted = {TRAINABLE: abstract(trainable), OPTIMIZER: abstract(optimizer)}
        with _reading(directory):
            stored = {item: self._stored(step, item) for item in wanted}
        for item, tree in wanted.items():
            _compare(directory / item, stored[item], _leaves(tree))
        with _reading(directory):
            arguments = {
                item: ocp.args.PyTreeRestore(
                    tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
                )
                for item, tree in wanted.items()
            }
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonRestore())
            )
            meta = dict(restored[META])
            sums = {item: dict(meta["checksums"][item]) for item in wanted}
        for item, tree in wanted.items():
            _check_restored(directory / item, restored[item], tree, sums[item])
        return restored[TRAINABLE], restored[OPTIMIZER], meta

    def _stored(self, step: int, item: str) -> dict[str, Any]:
        tree = self._manager.item_metadata(step)[item].tree
        return _leaves(tree)


def _not_expected(record: logging.LogRecord) -> bool:
    return _EXPECTED_WARNING not in record.getMessage()


def _remove_uncommitted(directory: Path) -> None:
    """Orbax passes over a step without its commit file, but leaves it lying."""
    if directory.is_dir():
        for entry in directory.iterdir():
            if entry.name.isdecimal() and not (entry / COMMIT_FILE).is_file():
                shutil.rmtree(entry)


def _save_args(tree: Any) -> Any:
    def one(leaf: jax.Array) -> ocp.SaveArgs:
        if leaf.ndim < 3 or leaf.nbytes <= _SMALLEST_CHUNK:
            return ocp.SaveArgs()
        block_bytes = math.prod(leaf.shape[2:]) * leaf.dtype.itemsize
        return ocp.SaveArgs(chunk_byte_size=max(block_bytes, _SMALLEST_CHUNK), shard_axes=(0, 1))

    return jax.tree.map(one, tree)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, as `Checkpoints.restore` takes them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _leaves(tree: Any) -> dict[str, Any]:
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damage shows as KeyError, AttributeError, JSONDecodeError, ...
        reason = _unreadable_leaf(directory) or _first_line(error)
        raise UserError(_damaged(directory, reason)) from None


def _unreadable_leaf(directory: Path) -> str | None:
    """The first leaf that cannot be read, since Orbax does not say which one it was."""
    for item in (TRAINABLE, OPTIMIZER):
        arrays = StackedArrays(directory / item)
        for leaf in sorted(file.parent.name for file in (directory / item).glob("*/.zarray")):
            try:
                arrays.read(leaf)
            except Exception as error:
                return f"{item} {leaf}: {_first_line(error)}"
    return None


def _damaged(directory: Path, reason: str) -> str:
    return (
        f"{directory}: the checkpoint is damaged ({reason}). Remove this directory; training then "
        "goes on from the step saved before it, or starts anew when there is none."
    )


def _compare(where: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Orbax would cast, pad or leave a placeholder where these differ."""
    for path in sorted(set(stored) | set(wanted)):
        if path not in stored:
            raise UserError(f"{where}: has no {path}, which this run trains; it is another run's.")
        if path not in wanted:
            raise UserError(f"{where}: has {path}, which this run lacks; it is another run's.")
        for what in ("shape", "dtype"):
            old, new = getattr(stored[path], what), getattr(wanted[path], what)
            if old != new:
                raise UserError(
                    f"{where}: {path} has {what} {old}, this run's has {new}; it is another run's."
                )


def _check_restored(where: Path, tree: Any, wanted: Any, sums: Mapping[str, int]) -> None:
    restored, asked = _leaves(tree), _leaves(wanted)
    for path, leaf in asked.items():
        got = restored.get(path)
        if not isinstance(got, jax.Array) or (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
            raise UserError(_damaged(where.parent, f"{where.name} {path} did not come back whole"))
        if got.sharding != leaf.sharding:
            raise AssertionError(f"{path} came back as {got.sharding}, not {leaf.sharding}")
    found = checksums(tree)
    for path, value in found.items():
        if sums.get(path) != value:
            raise UserError(
                _damaged(where.parent, f"the checksum of {where.name} {path} is not that saved")
            )
