"""The processes of one go of a run: started, listened to, stopped and let go on, and ended."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_parts.material import DEVICES
from llamapro_jax import exit_codes
from llamapro_jax.launch.local import environment
from llamapro_jax.launch.surroundings import free_port

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).resolve().parent / "driver.py"

# Seconds. When a process has ended, the launcher gives the others so long to end as well; when it
# was killed, less: schedulers end the others then.
GRACE, GRACE_KILLED = 60.0, 10.0
# So long the processes are never silent, on a machine that does other work as well.
PATIENCE = 300.0
_TICK = 0.002
# How a line begins that jax writes with JAX_LOG_COMPILES; of most functions they are not kept.
_COMPILES = "WARNING:jax._src"
# Below this many bytes are the log and everything small; the files of large arrays are above.
SMALL_FILES = 30_000


class Ended(Exception):
    """All processes have ended while something else was waited for."""


class Hangs(Exception):
    """What was waited for did not come, and nothing was said for PATIENCE seconds."""


@dataclass(frozen=True)
class Line:
    """A line that process `process` wrote, and when it was read (seconds, monotonic)."""

    process: int
    text: str
    time: float


class _Process:
    """One process and what it has written."""

    def __init__(self, number: int, command: Sequence[str], env: dict[str, str]) -> None:
        self.number = number
        self._popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._popen.stdout is not None
        self._out = self._popen.stdout.fileno()
        os.set_blocking(self._out, False)
        self._rest = b""
        self.ended_at: float | None = None

    @property
    def pid(self) -> int:
        return self._popen.pid

    def status(self) -> int | None:
        status = self._popen.poll()
        if status is not None and self.ended_at is None:
            self.ended_at = time.monotonic()
        return status

    def signal(self, number: signal.Signals) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(number)

    def read(self) -> Iterator[str]:
        """The whole lines that came since."""
        with suppress(BlockingIOError):
            while data := os.read(self._out, 1 << 16):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)

    def stands(self) -> bool:
        """Whether all its threads are stopped, or it has ended."""
        with suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                if (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZX":
                    return False
        return True

    def close(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        assert self._popen.stdout is not None
        self._popen.stdout.close()


class Group:
    """A context manager; what is left of the processes is killed.

    layout: number of processes, which share DEVICES devices. arguments: of `llamapro`. driver: of
    `driver.py`, empty: the command itself. prefix: what the command is run by. log: a file that
    gets all lines.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        layout: int,
        log: Path,
        driver: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        self.layout, self.lines = layout, list[Line]()
        self.began = self._heard = time.monotonic()
        self._log = log.open("w", encoding="utf-8")
        main = [str(DRIVER), *driver, "--"] if driver else ["-m", "llamapro_jax.cli"]
        command = [*prefix, sys.executable, *main, *arguments]
        base = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            # jax says when it begins to compile what, and when it has.
            "JAX_LOG_COMPILES": "1",
        }
        port = free_port()
        self.processes = [
            _Process(number, command, environment(number, layout, DEVICES // layout, port, base))
            for number in range(layout)
        ]

    # ----------------------------------------------------------------- listening

    def pump(self) -> bool:
        """Reads what the processes wrote since. Returns whether one of them lives."""
        lives = False
        for process in self.processes:
            lives = process.status() is None or lives
            for text in process.read():
                self._heard = time.monotonic()
                if _COMPILES not in text or "jit(step)" in text:
                    self.lines.append(Line(process.number, text, time.monotonic()))
                self._log.write(f"[{process.number}] {time.monotonic() - self.began:.2f} {text}\n")
        return lives

    def said(self, *parts: str, process: int | None = None) -> Line | None:
        """The first line that has one of these parts."""
        for line in self.lines:
            if process in (None, line.process) and any(part in line.text for part in parts):
                return line
        return None

    def times_said(self, part: str) -> int:
        return sum(part in line.text for line in self.lines)

    def lines_of(self, process: int) -> list[Line]:
        return [line for line in self.lines if line.process == process]

    def until(self, holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Returns when it holds. Raises Ended when that can be no more, and Hangs."""
        began = time.monotonic()
        while True:
            lives = self.pump()
            if holds():
                return
            if not lives:
                raise Ended
            if time.monotonic() > max(began, self._heard) + seconds:
                raise Hangs
            time.sleep(_TICK)

    # ----------------------------------------------------------------- disturbing

    def freeze(self) -> None:
        """Returns when all are stopped, and all they wrote is read."""
        for process in self.processes:
            process.signal(signal.SIGSTOP)
        self.until(lambda: all(process.stands() for process in self.processes))
        self.pump()

    def thaw(self, but: Sequence[int] = ()) -> None:
        for process in self.processes:
            if process.number not in but:
                process.signal(signal.SIGCONT)

    def signal(self, process: int, number: signal.Signals) -> None:
        self.processes[process].signal(number)

    def limit_files(self, of: Sequence[int]) -> None:
        """Of these processes a file larger than SMALL_FILES is more than the system takes."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
                soft = SMALL_FILES if process.number in of else hard
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))

    # ----------------------------------------------------------------- ending

    def wait(self, grace: float = GRACE) -> list[int]:
        """The statuses, when all have ended; those that outlive another by `grace` are killed.

        Raises Hangs.
        """
        began = time.monotonic()
        while self.pump():
            ended = [p.ended_at for p in self.processes if p.ended_at is not None]
            if ended and time.monotonic() - min(ended) > grace:
                for process in self.processes:
                    process.signal(signal.SIGKILL)
            if time.monotonic() > max(began, self._heard) + PATIENCE:
                raise Hangs
            time.sleep(_TICK * 5)
        self.pump()
        return [process.status() or 0 for process in self.processes]

    def status(self) -> int:
        """What a launcher sees: the status of the process that failed first."""
        failed = [(p.ended_at or 0.0, p.status() or 0) for p in self.processes if p.status()]
        return min(failed)[1] if failed else 0

    def last(self, lines: int = 12) -> str:
        """What the processes said in the end, for a message."""
        texts = [f"[{line.process}] {line.text[:300]}" for line in self.lines]
        quiet = [text for text in texts if _COMPILES not in text]
        return "\n".join(quiet[-lines:])

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.close()
        self._log.close()


def starts_again(status: int) -> bool:
    """Whether a launcher starts the same command again, see docs/reliability.md."""
    died = status < 0 or (status > 128 and status != exit_codes.INTERRUPTED)
    return status in (exit_codes.PREEMPTED, exit_codes.STALLED) or died
