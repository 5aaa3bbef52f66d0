"""A run's log: `metrics.jsonl`, TensorBoard, Weights & Biases, and what the terminal shows.

`metrics.jsonl` is the record, one JSON object a line, with the two kinds

    {"kind": "train", "step": 10, "loss": ..., "learning_rate": ..., "grad_norm": ..., ...}
    {"kind": "eval", "step": 100, "name": "prose", "loss": ..., "perplexity": ..., ...}

`step` counts finished optimizer steps; losses are in nats a token. A number that is not finite is
written as null, since JSON has none. While the file cannot be written, as on a full disk, its lines
wait in memory and training goes on. The other places are copies: when one of them fails, it is
dropped with one warning.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_write

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
WANDB_ID_FILE = "wandb_id"
# A log that a run which goes on found damaged, as it was; a number follows where one lies there.
DAMAGED = ".damaged"

Record = dict[str, Any]
# Kind, step and name of a record.
Key = tuple[str, int, str | None]


# ------------------------------------------------------------------- the file


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a run directory or of a `metrics.jsonl`, in order.

    A last line that was cut off while it was written is left out. Raises UserError when the file
    is absent or another line is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    records, damaged = _parsed(path)
    for number, line in damaged:
        raise UserError(f"{path}:{number}: is not a line of metrics: {line[:60]!r}.")
    return records


def _parsed(path: Path) -> tuple[list[Record], list[tuple[int, bytes]]]:
    """The records, and the damaged lines with their numbers, but for a last one cut off."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the directory of a training run.") from None
    records: list[Record] = []
    damaged = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not (isinstance(record["kind"], str) and isinstance(record["step"], int)):
                raise ValueError
            hash(record.get("name"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if number < len(lines):
                damaged.append((number, line))
            continue
        records.append(record)
    return records, damaged


def _set_aside(path: Path, damaged: list[tuple[int, bytes]]) -> None:
    names = (f"{path.name}{DAMAGED}{number or ''}" for number in itertools.count())
    copy = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    shutil.copyfile(path, copy)
    numbers = ", ".join(str(number) for number, _ in damaged[:5])
    print(
        f"warning: {path}: {len(damaged)} damaged lines are left out ({numbers}); as it was, the "
        f"file is kept as {copy.name}",
        file=sys.stderr,
        flush=True,
    )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A Python scalar from a NumPy or JAX one; null for a number that is not finite."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(record: Mapping[str, Any]) -> Key:
    return record["kind"], record["step"], record.get("name")


class _Lines:
    """A file that lines are added to. Those that cannot be written wait, and are tried again.

    path: exists, and ends with a whole line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("r+b", buffering=0)
        self._end, self._torn = self._file.seek(0, os.SEEK_END), False
        self.waiting: list[bytes] = []

    def add(self, line: str) -> None:
        told = bool(self.waiting)
        self.waiting.append(line.encode())
        error = self.catch_up()
        if error is not None and not told:
            reason = error.strerror or str(error)
            self._say(
                f"cannot be written ({reason}); its lines wait in memory, and training goes on"
            )
        elif error is None and told:
            self._say("is written again, and has all lines")

    def catch_up(self) -> OSError | None:
        """Tries to write what waits. Returns why it could not."""
        data = b"".join(self.waiting)
        try:
            if self._torn:
                self._cut()
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self._torn = True  # a full disk takes a part of a line
            with suppress(OSError):
                self._cut()
            return error
        self._end += len(data)
        self.waiting = []
        return None

    def _cut(self) -> None:
        self._file.truncate(self._end)
        self._file.seek(self._end)
        self._torn = False

    def close(self) -> None:
        if self.catch_up() is not None:
            self._say(f"lacks the last {len(self.waiting)} lines, which could not be written")
        with suppress(OSError):
            self._file.close()

    def _say(self, what: str) -> None:
        print(f"warning: {self._path}: {what}", file=sys.stderr, flush=True)


class MetricsWriter:
    """Appends records to `directory/metrics.jsonl` and copies them to the trackers asked for.

    `resume_step`: the step of the checkpoint that the run goes on from. Later records are removed
    first (in one rename), and a record that is there already is not written again, so that the
    file becomes what an uninterrupted run would have written. A damaged line is left out, and the
    file as it was is kept beside it. None begins an empty file.
    `config`: the run's settings, shown by Weights & Biases. `silent`: of several processes one
    writes; the others only know what is recorded. `lost`: told, when it closes, which lines could
    not be written, if any: what `recorded` takes. Use as a context manager.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        wandb_mode: str = "online",
        config: Mapping[str, Any] | None = None,
        silent: bool = False,
        lost: Callable[[list[Key]], None] = lambda lines: None,
    ):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = self._path = directory / METRICS_FILE
        kept: list[Record] = []
        if resume_step is not None and path.exists():
            records, damaged = _parsed(path)
            kept = [record for record in records if record["step"] <= resume_step]
            if damaged and not silent:
                _set_aside(path, damaged)
        self._written = {_key(record) for record in kept}
        self._trackers: list[_Guarded] = []
        self._file: _Lines | None = None
        self._lost = lost
        if silent:
            return
        atomic_write(path, "".join(map(_line, kept)))
        self._file = _Lines(path)
        if tensorboard:
            first = 0 if resume_step is None else resume_step + 1
            self._trackers.append(_Guarded("TensorBoard", partial(_TensorBoard, directory, first)))
        if wandb_project is not None:
            make = partial(
                _Wandb, directory, wandb_project, wandb_mode, config, resume_step is not None
            )
            self._trackers.append(_Guarded("Weights & Biases", make))

    def recorded(self, kind: str, step: int, name: str | None = None) -> bool:
        """Whether the file has this record, so that it need not be computed again."""
        return (kind, step, name) in self._written

    def records(self) -> list[Record]:
        """All records in order, those too that could not be written yet."""
        waiting = self.waiting()
        return read_metrics(self._path) + waiting

    def waiting(self) -> list[Record]:
        """The records that could not be written yet, after one more try."""
        if self._file is None:
            return []
        self._file.catch_up()
        return [json.loads(line) for line in self._file.waiting]

    def write(self, kind: str, step: int, **values: Any) -> Record:
        """Writes one record. `values` are scalars, `name` says which held-out text.

        Returns the record with plain Python numbers.
        """
        record = {"kind": kind, "step": int(step)}
        record.update((name, _plain(value)) for name, value in values.items())
        if _key(record) in self._written:
            return record
        self._written.add(_key(record))
        if self._file is None:
            return record
        self._file.add(_line(record))
        prefix = f"{kind}/{record['name']}" if "name" in record else kind
        scalars = {
            f"{prefix}/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        for tracker in self._trackers:
            tracker.call("log", scalars, record["step"])
        return record

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            if waiting := self._file.waiting:
                self._lost([_key(json.loads(line)) for line in waiting])
        for tracker in self._trackers:
            tracker.call("close")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------- trackers


class _Guarded:
    """A tracker that is dropped, with one warning, at its first exception."""

    def __init__(self, name: str, make: Callable[[], Any]):
        self._name = name
        self._tracker: Any = None
        self._attempt(lambda: setattr(self, "_tracker", make()))

    def call(self, method: str, *arguments: Any) -> None:
        if self._tracker is not None:
            self._attempt(lambda: getattr(self._tracker, method)(*arguments))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, a tracker never stops training
            self._tracker = None
            reason = f"{type(error).__name__}: {error}"
            print(
                f"warning: {self._name} is off for the rest of this run ({reason}); "
                f"{METRICS_FILE} has everything.",
                file=sys.stderr,
            )


class _TensorBoard:
    def __init__(self, directory: Path, first_step: int):
        writer = importlib.import_module("tensorboardX").SummaryWriter
        # `purge_step` hides what an interrupted run logged at or after this step; the suffix
        # keeps apart two processes that start within one second, which is all the name tells.
        self._writer = writer(
            str(directory / TENSORBOARD_DIRECTORY),
            purge_step=first_step,
            filename_suffix=f".{first_step}",
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(
        self,
        directory: Path,
        project: str,
        mode: str,
        config: Mapping[str, Any] | None,
        resume: bool,
    ):
        wandb = importlib.import_module("wandb")
        id_file = directory / WANDB_ID_FILE
        if not (resume and id_file.exists()):
            atomic_write(id_file, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            mode=mode,
            dir=str(directory),
            name=directory.name,
            config=dict(config or {}),
            id=id_file.read_text().strip(),
            resume="allow",
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


# ------------------------------------------------------------------- the terminal


def human(value: float, unit: str = "") -> str:
    """`12300000` -> `12.3M`, with three significant digits."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:.3g}{' ' if unit else ''}{unit}"


def duration(seconds: float) -> str:
    """`3725` -> `1:02:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def summary(record: Mapping[str, Any]) -> str:
    """A train or eval record in one line of words."""
    parts = []
    formats: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("loss", lambda v: f"loss {v:.4f}"),
        ("perplexity", lambda v: f"perplexity {v:.2f}"),
        ("bits_per_byte", lambda v: f"{v:.3f} bits/byte"),
        ("learning_rate", lambda v: f"lr {v:.2e}"),
        ("grad_norm", lambda v: f"grad norm {v:.3g}"),
        ("tokens_per_second", lambda v: f"{human(v)} tokens/s"),
        ("useful_flops_per_second", lambda v: human(v, "FLOP/s")),
    )
    for name, text in formats:
        if name in record:
            value = record[name]
            parts.append(text(math.nan if value is None else value))
    if record["kind"] == "eval":
        parts.insert(0, f"held-out {record.get('name', 'text')}:")
    return "  ".join(parts)


class ProgressDisplay:
    """A progress bar on a terminal, plain lines elsewhere. Use as a context manager.

    `steps` is the length of the run, `first_step` the number of steps done before this process.
    `silent`: show nothing, since another process does.
    """

    def __init__(
        self,
        steps: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        *,
        silent: bool = False,
    ):
        self._steps = steps
        self._since = (first_step, time.monotonic())
        self._compiled = False
        stream = stream or sys.stdout
        self._console = Console(file=stream, highlight=False, markup=False, quiet=silent)
        self._bar: Progress | None = None
        # `isatty` too: FORCE_COLOR makes rich call a pipe a terminal.
        if self._console.is_interactive and stream.isatty() and not silent:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[summary]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=first_step, summary="")

    def advance(self, step: int) -> None:
        """Moves the bar to `step` finished steps; nothing where lines are printed."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Shows a record: train records in the bar, eval records and plain output as a line."""
        if self._bar is not None and record["kind"] == "train":
            self._bar.update(self._task, completed=record["step"], summary=summary(record))
            return
        line = f"step {record['step']}/{self._steps}  {summary(record)}"
        if self._bar is None and record["kind"] == "train":
            line += self._time_left(record["step"])
        self.message(line)

    def message(self, text: str) -> None:
        """A line of text, above the bar when there is one."""
        self._console.print(text, soft_wrap=True)
        self._console.file.flush()

    def _time_left(self, step: int) -> str:
        first, since = self._since
        if step <= first:
            return ""
        now = time.monotonic()
        left = (now - since) / (step - first) * (self._steps - step)
        if not self._compiled:
            # The first line's time contains the compilation; the rate after it does not.
            self._since, self._compiled = (step, now), True
        return f"  {duration(left)} left"

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
