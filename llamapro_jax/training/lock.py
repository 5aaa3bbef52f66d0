"""A lock that the kernel keeps: exact and at once, but only as far as the file system shares it."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import BinaryIO

LOCK_FILE = ".lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """The lock of a run's directory. The kernel lets go of it when the process dies."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        # The kernel and the file of it, alike for all processes that the lock keeps apart. None
        # before it was tried, and where there are no locks.
        self.place: str | None = None

    @property
    def held(self) -> bool:
        """Whether this process has it, so that no other one with the same place can."""
        return self._file is not None and self.place is not None

    def take(self, directory: Path) -> bool:
        """False when another process has it. It moves along when the directory is renamed.

        True as well where the file system has no locks.
        """
        if self._file is not None:
            return True
        file = (directory / LOCK_FILE).open("ab")
        status = os.fstat(file.fileno())
        self.place = f"{_kernel()} {status.st_dev} {status.st_ino}"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            self.place = None
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _kernel() -> str:
    """Names the running kernel: containers of a machine share it, and a restart makes another."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()
