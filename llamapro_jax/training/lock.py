"""One process at a time trains in a run directory."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO

from llamapro_jax.errors import UserError
from llamapro_jax.remote import RemotePath

LOCK_FILE = ".lock"


class RunLock:
    """A context manager that lets go of the lock; the kernel does when the process dies."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def take(self, directory: Path) -> None:
        """Takes the lock of a run. It moves along when the directory is renamed.

        Raises UserError when another process has it.
        """
        if isinstance(directory, RemotePath):
            return  # A store has no locks.
        file = (directory / LOCK_FILE).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise taken(directory) from None
        except OSError:
            pass  # A file system without locks: the run goes on unguarded.
        self._file = file

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def taken(run: Path) -> UserError:
    return UserError(
        f"{run}: another process trains here; wait until it ends or stop it, or name another "
        "output."
    )
