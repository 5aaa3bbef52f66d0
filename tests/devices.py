"""Several devices for a test: a process of its own, whose CPU is so many of them.

jax counts its devices once, when it starts; the process of the tests has one.

    from devices import Devices, fixture

    devices = fixture(8)


    def sums(scale: float) -> np.ndarray:  # runs there: on 8 devices
        ...


    def test_sums(devices: Devices) -> None:
        assert devices(sums, 2.0).shape == (8,)
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")


class Devices:
    """Calls functions, one after the other, in a fresh process that has `count` CPU devices.

    A function is one of a module, and what it takes and returns can be pickled: numpy arrays, not
    jax's. What it raises is raised here. Use as a context manager, or through `fixture`.
    """

    def __init__(self, count: int) -> None:
        self._pool = concurrent.futures.ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),  # a fork would share jax's threads
            initializer=_begin,
            initargs=(count,),
        )

    def __call__(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        return self._pool.submit(function, *args, **options).result()

    def __enter__(self) -> Devices:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)


def fixture(count: int) -> Any:
    """A fixture of `Devices` that the tests of a module share."""

    @pytest.fixture(scope="module")
    def devices() -> Iterator[Devices]:
        with Devices(count) as process:
            yield process

    return devices


def _begin(count: int) -> None:
    """The environment of the process, before anything in it imports jax."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(count)
