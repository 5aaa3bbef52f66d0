"""Batches ready before they are asked for."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `make(step)` for steps [start, stop), made ahead in a background thread.

    At most `depth` results wait; one that raises re-raises where the consumer reaches that step.
    Use it in a `with` block, or call `close()`: it drops what waits and ends the thread.

        with Prefetcher(mixture.batch, start=step, stop=steps) as batches:
            for batch in batches: ...
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1")
        self._make = make
        self._next = start
        self._stop = stop
        # One thread: results are made in order, and reading is faster than any training step.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._waiting: collections.deque[Future[T]] = collections.deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        if self._next < self._stop:
            self._waiting.append(self._pool.submit(self._make, self._next))
            self._next += 1

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._waiting:
            self.close()
            raise StopIteration
        future = self._waiting.popleft()
        try:
            result = future.result()
        except BaseException:
            self.close()
            raise
        self._submit()
        return result

    def close(self) -> None:
        """Ends the thread after the result it is making, and drops the rest. May be repeated."""
        self._next = self._stop
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
