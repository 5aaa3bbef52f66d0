"""Numbered steps that are done once: each with its command, its result, and a log of its output.

What is done is recorded in `quickstart.json`, so that the same command again goes on where an
interrupted one stopped and keeps what is finished.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json, write_json
from llamapro_jax.metrics import duration

RECORD = "quickstart.json"
FORMAT = "llamapro_jax quickstart"
INDENT = "       "

# What a step gives: lines that say its result.
Action = Callable[[], Sequence[str]]


class Log(io.TextIOBase):
    """Standard output of a verb, kept in a file; on a terminal its last line is shown as well."""

    def __init__(self, path: Path, terminal: TextIO) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._terminal = terminal if terminal.isatty() else None
        self.lines: list[str] = []
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._file.write(text)
        self._file.flush()
        *lines, self._rest = (self._rest + text).split("\n")
        self.lines += [line for line in lines if line.strip()]
        if self._terminal is not None and lines and self.lines:
            width = shutil.get_terminal_size().columns - len(INDENT) - 1
            self._terminal.write(f"\r\x1b[K{INDENT}{self.lines[-1][:width]}")
            self._terminal.flush()
        return len(text)

    def close(self) -> None:
        if self._terminal is not None and not self._file.closed:
            self._terminal.write("\r\x1b[K")
            self._terminal.flush()
        self._file.close()
        super().close()


class Walk:
    """The steps of one quickstart in `out`.

    identity: what decides the results. Raises UserError when `out` holds anything else than a
    quickstart of the same identity.
    """

    def __init__(self, out: Path, identity: dict[str, Any], steps: int) -> None:
        self.out, self._steps, self._number = out, steps, 0
        self._path = out / RECORD
        if self._path.is_file():
            self._record = read_json(self._path)
            self._check(identity)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: holds something else than a quickstart; name another --out.")
        else:
            self._record = {"format": FORMAT, "identity": identity, "done": {}}
            self._save()
        self.kept = 0
        self.last_lines: list[str] = []

    def _check(self, identity: dict[str, Any]) -> None:
        if not isinstance(self._record, dict) or self._record.get("format") != FORMAT:
            raise UserError(f"{self._path}: is not the record of a quickstart; name another --out.")
        before = self._record["identity"]
        changed = [
            f"{name}: {before.get(name)} -> {identity.get(name)}"
            for name in sorted(before.keys() | identity.keys())
            if before.get(name) != identity.get(name)
        ]
        if changed:
            raise UserError(
                f"{self.out}: holds a quickstart with other settings ({'; '.join(changed)}). Name "
                f"another --out, or remove {self.out}."
            )

    def _save(self) -> None:
        write_json(self._path, self._record)

    def step(
        self, name: str, title: str, shown: str, outputs: Sequence[Path], action: Action
    ) -> None:
        """Does a step, or says that it is done.

        shown: the command as typed. outputs: what it writes; a finished step whose outputs are
        there is kept.
        """
        self._number += 1
        print(f"\n[{self._number:2}/{self._steps}] {title}")
        print(f"{INDENT}$ {shown}", flush=True)
        done = self._record["done"].get(name)
        if done is not None and all(path.exists() for path in outputs):
            self.kept += 1
            self._show(done["lines"], "kept: done before")
            return
        began = time.monotonic()
        lines = list(action())
        seconds = time.monotonic() - began
        self._record["done"][name] = {"lines": lines, "seconds": round(seconds, 2)}
        self._save()
        self._show(lines, duration(seconds))

    def verb(
        self, name: str, title: str, words: Sequence[str], outputs: Sequence[Path], result: Action
    ) -> None:
        """A step that is a verb of the command line. `result` gives the lines that are shown."""

        def action() -> Sequence[str]:
            if words[0] != "train":  # which goes on by itself
                self.remove(outputs)
            self.last_lines = self._call(name, words)
            return result()

        self.step(name, title, shlex.join(["llamapro", *words]), outputs, action)

    def last_line(self) -> list[str]:
        """The result of a verb whose last line says it."""
        return self.last_lines[-1:]

    def _call(self, name: str, words: Sequence[str]) -> list[str]:
        from llamapro_jax.cli import build_parser, verb_module

        arguments = build_parser().parse_args(list(words))
        log = Log(self.out / "logs" / f"{self._number:02}-{name}.log", sys.stdout)
        with log, quiet(log):
            status = verb_module(arguments.verb).run(arguments) or 0
        if status in (42, 130):  # stopped by a signal, what was done is saved
            raise KeyboardInterrupt
        if status:
            raise UserError(f"{shlex.join(words)}: ended with status {status}.")
        return log.lines

    def remove(self, outputs: Sequence[Path]) -> None:
        """What an interrupted step may have left, and nothing outside of the output directory."""
        for path in outputs:
            if self.out not in path.parents:
                raise AssertionError(f"{path} is not in {self.out}")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @staticmethod
    def _show(lines: Sequence[str], note: str) -> None:
        for i, line in enumerate(lines):
            print(f"{INDENT}{line}" + (f"  ({note})" if i == len(lines) - 1 else ""), flush=True)


@contextlib.contextmanager
def quiet(log: TextIO) -> Iterator[None]:
    """Standard output, standard error and Python's logging go to `log` alone."""
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        root.handlers[:] = before
