"""Checkpoints of a run: what trains, the optimizer's state and the step, written by Orbax.

The one module that knows of Orbax's `CheckpointManager`; `checkpoint_files` says what lies on disk.
A save runs in the background while training goes on. One that fails is reported at once and does
not end the run; two in a row do. `checkpoint_restore` reads what was saved.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llamapro_jax.checkpoint_files import (
    COMMIT_FILE,
    META,
    OPTIMIZER,
    TRAINABLE,
    Directory,
    committed_steps,
    first_line,
    missing_file,
    remove_leftovers,
    remove_step,
    sealed,
)
from llamapro_jax.checksum import checksums
from llamapro_jax.errors import UserError
from llamapro_jax.launch.processes import (
    SEEN_WITHIN,
    call_off,
    count,
    first_given,
    forget,
    from_first,
    is_first,
    meet,
)
from llamapro_jax.remote import RemotePath, Unreachable, as_path, has_arrays
from llamapro_jax.staging import Staging, bytes_here
from llamapro_jax.training.state import leaves_by_path

# A block of a stack is a chunk of its own, so that one can be read without the others. Orbax
# warns of chunks below 1 MiB, which many files make slow.
_SMALLEST_CHUNK = 2**20

# What Orbax says about every save without OCDBT or of each process for itself, which is what this
# module asks for, and about a save that failed, of which this module tells itself.
_EXPECTED = (
    "Global object size logging disabled",
    "Skipping merge of OCDBT checkpoints",
    "Save Finalize thread",
    "in background save thread",
    "_SignalingThread.run() raised an exception",
)

# How many steps there are at least while a run goes on, whatever `training.keep` says: the newest
# may turn out to be damaged.
_ALWAYS_KEPT = 2
_FAILURES_IN_A_ROW = 2

_saves = itertools.count()

# Told a step and the reason.
Report = Callable[[int, str], None]


class Checkpoints:
    """Saves steps in `directory` and keeps the newest `keep` of them. A context manager.

    All processes of a run make one in the same directory, and call its methods together: each
    writes its parts. What earlier processes left half-saved is removed first.

    failed: told the step and the reason, on the first process, as soon as a save has failed; from
    another thread than the caller's when that was in the background. permitted: called on the
    first process before anything is begun, committed or deleted; raises UserError when the
    directory is another run's. What is under way then stays uncommitted, and nothing is touched.
    When it raises OSError, the directory cannot be read, and the save is a failed one.
    before: called there before each save, which fails when it raises Unreachable.
    """

    def __init__(
        self,
        directory: str | Directory,
        keep: int,
        failed: Report = lambda step, reason: None,
        permitted: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = as_path(directory).absolute()
        # The step last saved to its end, by this object, as far as `wait` and `save` have seen.
        self.saved: int | None = None
        self._keep, self._failed = keep, failed
        self._permitted, self._before = permitted, before
        self._under_way: _Save | None = None
        # One that failed, to be removed when the directory can be read; and whether it failed for
        # nothing but that, and may be whole.
        self._failed_step: int | None = None
        self._failures: list[int] = []
        self._deleting: list[threading.Thread] = []
        self._barrier = _Barrier()
        logging.getLogger("absl").addFilter(_not_expected)
        from_first(self._permitted)
        from_first(self._clean)
        self._staging: Staging | None = None
        if isinstance(self.directory, RemotePath) and not has_arrays(self.directory):
            self._staging = Staging(self.directory)
        self._manager = self._new_manager()

    def _clean(self) -> None:
        if removed := remove_leftovers(self.directory):
            names = ", ".join(removed)
            print(f"{self.directory}: removed what no save finished: {names}", flush=True)

    def _new_manager(self) -> ocp.CheckpointManager:
        processes, record = ocp.options.MultiprocessingOptions(), _asking(self._permitted)
        directory: Directory = self.directory
        if self._staging is not None:
            # Each process has a directory of its own, and sees to all that belongs into one.
            processes = ocp.options.MultiprocessingOptions(primary_host=None)
            record = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
            self._staging.clear()
            directory = self._staging.directory
        arrays = partial(
            # Without OCDBT each leaf is a zarr directory that other readers open row by row.
            ocp.PyTreeCheckpointHandler,
            use_ocdbt=False,
            multiprocessing_options=processes,
        )
        options = ocp.CheckpointManagerOptions(
            # Steps are deleted here, when the next one is known to be whole.
            preservation_policy=ocp.checkpoint_managers.LatestN(None),
            # With renames alone, an empty directory of a step counts as the latest one.
            atomicity_options=ocp.options.AtomicityOptions(
                mode=ocp.options.AtomicityMode.COMMIT_FILE
            ),
            # Damage in the steps that are there is no matter of the manager's.
            lightweight_initialize=True,
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._barrier),
            multiprocessing_options=processes,
        )
        handlers = {TRAINABLE: arrays(), OPTIMIZER: arrays(), META: record}
        return ocp.CheckpointManager(str(directory), options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest step that was saved to its end."""
        return max(committed_steps(self.directory), default=None)

    def save(self, step: int, trainable: Any, optimizer: Any, meta: Mapping[str, Any]) -> None:
        """Begins to save; the arrays may be used up (donated) as soon as this returns.

        Waits for the save before it. Raises UserError when that and the one before it failed, or
        that one failed and there is no room for this one.
        """
        self.wait()
        trees = {TRAINABLE: trainable, OPTIMIZER: optimizer}
        reason = self._unreadable() or from_first(lambda: self._no_room(trees))
        if reason is not None:
            self._report(step, reason)
            self._count_failure(step, reason)
            return
        self._clear_up()
        if self.saved == step:  # it was whole after all
            return
        meta = sealed({**meta, "step": step, "leaves": _described(trees)})
        arguments = ocp.args.Composite(
            trainable=ocp.args.PyTreeSave(trainable, save_args=_save_args(trainable)),
            optimizer=ocp.args.PyTreeSave(optimizer, save_args=_save_args(optimizer)),
            meta=ocp.args.JsonSave(meta),
        )
        self._barrier.next_save()
        self._under_way = _Save(step, partial(self._report, step))
        self._under_way.begin(
            lambda: self._manager.save(step, args=arguments, force=True),
            partial(self._to_its_end, step),
        )

    def _to_its_end(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if self._staging is not None:
                self._staging.upload(step, self._barrier, self._permitted)
        except Exception as error:  # or the others would wait for this process
            self._barrier.call_off(error)
            raise

    def wait(self) -> bool:
        """Returns when no save is under way: whether the last one is on disk, if there was one.

        Raises UserError when it failed and the one before it had.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return not self._failures
        directory = self.directory / str(save.step)
        mine = save.end()
        unreadable = self._unreadable()
        broken = first_given(mine)
        reason = broken or unreadable or from_first(lambda: _problem_of(directory))[1]
        if reason is None:
            self.saved, self._failures = save.step, []
            from_first(lambda: self._delete_old(max(self._keep, _ALWAYS_KEPT)))
            return True
        if mine is None:
            self._report(save.step, reason)
        self._failed_step = save.step
        if unreadable is None:
            self._clear_up()
        if self.saved == save.step:  # it is whole all the same
            return True
        self._count_failure(save.step, reason)
        return False

    def _unreadable(self) -> str | None:
        """Why the directory cannot be read, and so nobody knows whose it is. Raises UserError."""

        def ask() -> str | None:
            try:
                self._permitted()
            except OSError as error:
                return first_line(error)
            return None

        return from_first(ask)

    def _clear_up(self) -> None:
        """After a failed save: the directory can be read."""
        if self._failed_step is None:
            return
        step, self._failed_step = self._failed_step, None
        directory = self.directory / str(step)
        known, problem = from_first(lambda: _problem_of(directory))
        if not known:  # it may be whole: before the next save it is asked again
            self._failed_step = step
        elif problem is None:
            self.saved, self._failures = step, []
        else:
            from_first(lambda: remove_step(directory))
        # Orbax does not get over a failed save: the memory of it goes too.
        with suppress(Exception):
            self._manager.close()
        self._manager = self._new_manager()

    def finish(self) -> None:
        """At the end of a run, when its last step is on disk: all but the newest `keep` go."""
        self.wait()
        if self._unreadable() is None:
            from_first(lambda: self._delete_old(self._keep))

    def close(self) -> None:
        """Waits for what is under way. Raises UserError as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._end()

    def _end(self) -> None:
        if self._staging is not None:
            self._staging.close()
        for thread in self._deleting:
            thread.join()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # The other processes may be elsewhere, and not come to a word about the save under way.
        if self._under_way is not None:
            self._under_way.end()
        with suppress(Exception):  # the exception under way says more
            self._manager.close()
        self._end()

    def _no_room(self, trees: Any) -> str | None:
        try:
            self._before()
        except OSError as error:
            return first_line(error)
        leaves = jax.tree.leaves(trees)
        if self._staging is not None:
            directory, needed = self._staging.directory, sum(map(bytes_here, leaves))
        elif isinstance(self.directory, RemotePath):  # a bucket is never full
            return None
        else:
            directory, needed = self.directory, sum(leaf.nbytes for leaf in leaves)
        try:
            free = shutil.disk_usage(directory).free
        except OSError:  # not every file system says; the save itself will
            return None
        if free >= needed:
            return None
        where = "" if self._staging is None else f" in {directory} (XDG_CACHE_HOME)"
        return f"it takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free{where}"

    def _report(self, step: int, reason: str) -> None:
        if not is_first():
            return
        try:
            with suppress(OSError):
                self._permitted()
        except UserError:  # this is why it failed, and the run ends of it
            return
        self._failed(step, reason)

    def _count_failure(self, step: int, reason: str) -> None:
        self._failures.append(step)
        if len(self._failures) < _FAILURES_IN_A_ROW:
            return
        steps = " and ".join(map(str, self._failures))
        latest = from_first(self.latest)
        again = "starts anew" if latest is None else f"goes on from step {latest}"
        raise UserError(
            f"{self.directory}: the checkpoints of steps {steps} could not be written ({reason}). "
            f"Make room or mend the disk; the same command then {again}."
        )

    def _delete_old(self, keep: int) -> None:
        steps: list[int] = []
        with suppress(Unreachable):  # after the next save it is looked again
            steps = committed_steps(self.directory)
        for step in steps[:-keep]:
            old = self.directory / str(step)
            if isinstance(old, Path):
                trash = self.directory / f".deleted-{step}"
                try:
                    old = old.rename(trash)
                except OSError:  # it stays until there is no room for another
                    continue
            thread = threading.Thread(target=remove_step, args=(old,), name="delete")
            thread.start()
            self._deleting.append(thread)
        self._deleting = [thread for thread in self._deleting if thread.is_alive()]


class _Save:
    """A save and the thread that waits for it, so that its failure is known when it happens."""

    def __init__(self, step: int, report: Callable[[str], None]) -> None:
        self.step = step
        self._report = report
        self._reason: str | None = None
        self._thread = threading.Thread(target=lambda: None)

    def begin(self, action: Callable[[], Any], wait: Callable[[], None]) -> None:
        self._attempt(action)
        if self._reason is None:
            self._thread = threading.Thread(target=self._attempt, args=(wait,), name="save")
            self._thread.start()

    def end(self) -> str | None:
        """When it has ended: why it failed, None when it did not, as far as this process knows."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._reason

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise many types
            self._reason = first_line(error)
            self._report(self._reason)


def _asking(permitted: Callable[[], None]) -> ocp.JsonCheckpointHandler:
    """The handler of the step's own record, which asks whether the step may be committed.

    Orbax calls `finalize` on the first process when all is written but the commit file. It knows
    what a handler takes by its exact class, which is why this is none of its own.
    """
    handler = ocp.JsonCheckpointHandler()
    finalize = handler.finalize

    def finalize_if_permitted(directory: Any) -> None:
        permitted()
        finalize(directory)

    handler.finalize = finalize_if_permitted
    return handler


class _Barrier:
    """Where the processes of a save wait for each other, but not for one on which it failed.

    Orbax's own waits for that one until its time is up, which is twenty minutes.
    """

    def __init__(self) -> None:
        self._save = _new_name()
        self._visits: dict[str, int] = {}

    def next_save(self) -> None:
        """All processes call this when the save before has ended on all."""
        if is_first():
            forget(self._save)
        self._save, self._visits = _new_name(), {}

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        # Orbax comes here on its way out of a failure too.
        if (error := sys.exception()) is not None:
            self.call_off(error)
        visit = self._visits[key] = self._visits.get(key, 0) + 1
        meet(f"{self._save}/{key}/{visit}", f"{self._save}/off", timeout_ms / 1000)

    def call_off(self, error: BaseException) -> None:
        call_off(f"{self._save}/off", first_line(error))


def _new_name() -> str:
    return f"llamapro/save/{next(_saves)}"


def _not_expected(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _EXPECTED)


def _problem_of(step: Directory) -> tuple[bool, str | None]:
    """Whether that is known, and why the step is not whole, or why nobody knows."""
    try:
        return True, _not_written(step)
    except OSError as error:
        return False, first_line(error)


def _not_written(step: Directory) -> str | None:
    if not (step / COMMIT_FILE).is_file():
        return "it was not written to its end"
    deadline = time.monotonic() + (SEEN_WITHIN if count() > 1 else 0)
    while (missing := missing_file(step)) is not None and time.monotonic() < deadline:
        time.sleep(0.5)  # what the other hosts wrote shows after some seconds
    return missing


def _save_args(tree: Any) -> Any:
    def one(leaf: jax.Array) -> ocp.SaveArgs:
        if leaf.ndim < 3 or leaf.nbytes <= _SMALLEST_CHUNK:
            return ocp.SaveArgs()
        block_bytes = math.prod(leaf.shape[2:]) * leaf.dtype.itemsize
        return ocp.SaveArgs(chunk_byte_size=max(block_bytes, _SMALLEST_CHUNK), shard_axes=(0, 1))

    return jax.tree.map(one, tree)


def _described(trees: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, dtype and checksum of every leaf, by item and path."""
    sums = {item: checksums(tree) for item, tree in trees.items()}
    return {
        item: {
            path: {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "checksum": sums[item][path],
            }
            for path, leaf in leaves_by_path(tree).items()
        }
        for item, tree in trees.items()
    }
