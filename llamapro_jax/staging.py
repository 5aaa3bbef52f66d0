"""Steps on their way to a store that Orbax does not write to, such as `s3://`.

On each process Orbax writes what is that process' into a directory of its host, as if it had all to
itself, and this module copies it from there: of process 0 everything, of the others their chunks,
which no other process has. When all have done so, and not before, process 0 writes the commit file.
A save that is killed therefore leaves in the store what one to `gs://` does: a step without it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from llamapro_jax.checkpoint_files import COMMIT_FILE
from llamapro_jax.launch.processes import is_first
from llamapro_jax.local_copies import scratch, upload
from llamapro_jax.remote import RemotePath, sizes

# Of zarr: the place of a chunk among the others.
_CHUNK = re.compile(r".*/[0-9.]+")
# That one process waits for another's upload, which goes on in the background.
_PATIENCE_MS = 2 * 3600 * 1000


class Barrier(Protocol):
    def __call__(self, *, key: str, timeout_ms: int) -> None: ...


class Staging:
    """directory: where Orbax writes the steps of `store`. It lasts until `close`."""

    def __init__(self, store: RemotePath) -> None:
        self._store = store
        self._open = ExitStack()
        self.directory = self._open.enter_context(scratch())

    def upload(self, step: int, barrier: Barrier, permitted: Callable[[], None]) -> None:
        """Copies a step to the store. All processes call this when Orbax has written it to its end.

        permitted: asked on the first process before the step is committed.
        """
        here, there = self.directory / str(step), self._store / str(step)
        names = [name for name in sizes(here) if is_first() or _CHUNK.fullmatch(name)]
        upload(here, there, [name for name in names if name != COMMIT_FILE])
        shutil.rmtree(here)
        barrier(key="uploaded", timeout_ms=_PATIENCE_MS)
        if is_first():
            permitted()
            (there / COMMIT_FILE).write_text("")
        barrier(key="committed", timeout_ms=_PATIENCE_MS)

    def clear(self) -> None:
        """What a save that failed left."""
        for left in self.directory.iterdir():
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        self._open.close()


def bytes_here(leaf: Any) -> int:
    """Of an array: how many this process writes."""
    return sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
