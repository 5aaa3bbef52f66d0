"""A disk that is full, as far as this process is concerned.

disk = full_disk.fixture()
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from typing import Any

import pytest


class Disk:
    """Files longer than `limit` bytes cannot be written, until `mend`."""

    def __init__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.before[1]))

    def mend(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def fixture() -> Any:
    @pytest.fixture
    def disk() -> Iterator[Disk]:
        handler = signal.getsignal(signal.SIGXFSZ)
        disk = Disk()
        yield disk
        disk.mend()
        signal.signal(signal.SIGXFSZ, handler)

    return disk
