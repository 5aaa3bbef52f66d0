"""Progress of whatever is a sequence of batches: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from llamapro_jax.metrics import duration

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30


def tracked(items: Sequence[T], name: str) -> Iterator[T]:
    """The items, and on standard error how far they are."""
    if not sys.stderr.isatty():
        yield from _with_lines(items, name)
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=name, console=Console(stderr=True), transient=True)


def _with_lines(items: Sequence[T], name: str) -> Iterator[T]:
    began = shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            left = duration((now - began) / done * (len(items) - done))
            line = f"{name}: {done} of {len(items)} batches, {left} left"
            print(line, file=sys.stderr, flush=True)
        yield item
