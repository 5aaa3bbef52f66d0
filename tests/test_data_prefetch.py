from __future__ import annotations

import threading
import time

import pytest

from llamapro_jax.data.prefetch import Prefetcher


def prefetch_threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (5, 7), (3, 3), (4, 2)])
def test_every_step_once_in_order(start: int, stop: int) -> None:
    with Prefetcher(lambda step: step * 10, start, stop, depth=3) as results:
        assert list(results) == [step * 10 for step in range(start, stop)]
        assert list(results) == []
    assert prefetch_threads() == 0


def test_results_are_ready_ahead_and_no_more_than_depth() -> None:
    made: list[int] = []
    with Prefetcher(lambda step: made.append(step), 0, 100, depth=4) as results:
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]
        next(results)
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == [0, 1, 2, 3, 4]
    assert prefetch_threads() == 0


def test_an_error_reaches_the_consumer_at_its_step() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise KeyError("row 2")
        return step

    results = Prefetcher(make, 0, 10, depth=5)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="row 2"):
        next(results)
    assert prefetch_threads() == 0
    with pytest.raises(StopIteration):
        next(results)


def test_close_drops_what_waits_and_may_be_repeated() -> None:
    made: list[int] = []

    def make(step: int) -> None:
        made.append(step)
        time.sleep(0.05)

    results = Prefetcher(make, 0, 100, depth=50)
    results.close()
    results.close()
    assert len(made) <= 2
    assert prefetch_threads() == 0
    with pytest.raises(StopIteration):
        next(results)


def test_the_consumers_error_ends_the_thread() -> None:
    with pytest.raises(ZeroDivisionError), Prefetcher(lambda step: step, 0, 100) as results:
        next(results)
        raise ZeroDivisionError
    assert prefetch_threads() == 0


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetcher(lambda step: step, 0, 1, depth=0)
