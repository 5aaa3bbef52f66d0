"""How far the preparation of a data set is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from llamapro_jax.data.preparation.shards import Seen
from llamapro_jax.data.readers.documents import Bad

_SECONDS_BETWEEN_LINES = 30
_BAD_RECORDS_SHOWN = 5


class Display:
    """A context manager. total_bytes: of the source; shares and times follow from its bytes."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label = label
        self._total = max(1, total_bytes)
        self._seen = Seen()
        self._before = Seen()
        self._shown_bad = 0
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=10),
                TaskProgressColumn(),
                # Of 80 columns they take two lines, rather than cut off the name and the share.
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=False)),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(f"preparing {label}", total=self._total, figures="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error is None:
            self._line(100)

    def done_before(self, seen: Seen) -> None:
        """What an earlier run has done counts for the share, not for the rate."""
        self._before.add(seen)
        self._seen.add(seen)

    def add(self, seen: Seen) -> None:
        self._seen.add(seen)
        for bad in seen.bad_records:
            self._show_bad(bad)
        share = min(99, 100 * self._seen.bytes // self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._seen.bytes, figures=self._figures())
        elif time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._line(share)

    def _show_bad(self, bad: Bad) -> None:
        self._shown_bad += 1
        if self._shown_bad <= _BAD_RECORDS_SHOWN:
            self._print(f"{self._label}: left out {bad.where}: {bad.why}")
        elif self._shown_bad == _BAD_RECORDS_SHOWN + 1:
            self._print(f"{self._label}: left out more, which are counted")

    def _line(self, share: int) -> None:
        self._shown = time.monotonic()
        self._print(f"preparing {self._label}: {share} %, {self._figures(left=share < 100)}")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _figures(self, left: bool = True) -> str:
        seen, seconds = self._seen, max(1e-9, time.monotonic() - self._began)
        figures = f"{seen.documents:,} documents, {seen.tokens:,} tokens"
        if made := seen.tokens - self._before.tokens:  # none, where all was made before
            figures += f", {made / seconds:,.0f} tokens/s"
        if seen.bad:
            figures += f", {seen.bad:,} bad"
        done = seen.bytes - self._before.bytes
        if left and done > 0:
            figures += f", {_duration((self._total - seen.bytes) * seconds / done)} left"
        return figures


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
