"""A pod in small: several processes on this machine's CPU, which are one run.

Each starts the entry that all launchers start, with the settings that say who the others are.
Process 0 has the terminal. What another one printed is shown, behind its number, when it failed
in another way. Ctrl-C and SIGTERM are passed on to all; the exit status is that of the process
that failed first.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any

from llamapro_jax.exit_codes import (
    CHECKPOINT_LOST,
    INTERRUPTED,
    PREEMPTED,
    REFUSED,
    TAKEN_OVER,
    TERMINATED,
)
from llamapro_jax.launch import ENTRY
from llamapro_jax.launch.surroundings import ADDRESS, COUNT, INDEX, free_port

EXAMPLE = """\
example, two processes with four devices each:
  python -m llamapro_jax.launch.local --processes 2 --devices 4 -- \\
    train configs/tiny.yaml mesh.fsdp=8 output=runs/pod
"""

# How long, in seconds, the other processes have to end after one failed.
_GRACE = 60
_SHOWN_LINES = 40
# What process 0 has said for all. Not STALLED: the stacks of each process are its own, and those
# of the one that hung may be nowhere else.
_SAID = (REFUSED, PREEMPTED, CHECKPOINT_LOST, TAKEN_OVER, INTERRUPTED, TERMINATED)


def environment(
    index: int, processes: int, devices: int, port: int, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of process `index` of a group that meets at `port` of this machine."""
    kept = [
        flag
        for flag in base.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    changed = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        ADDRESS: f"127.0.0.1:{port}",
        # Not reachable from other machines.
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        COUNT: str(processes),
        INDEX: str(index),
    }
    return {**base, **changed}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llamapro_jax.launch.local",
        usage="%(prog)s [--help] [--dry-run] [--processes N] [--devices N] -- train CONFIG ...",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", metavar="N", type=_positive, default=2, help="default: 2")
    parser.add_argument(
        "--devices", metavar="N", type=_positive, default=1, help="of each process; default: 1"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- train ...", help="as after `llamapro`"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


class _Group:
    """The processes, each in a session of its own, so that a Ctrl-C reaches them once."""

    def __init__(self, command: Sequence[str], processes: int, devices: int) -> None:
        port = free_port()
        self.outputs: list[IO[Any] | None] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._before: dict[int, Any] = {}
        for index in range(processes):
            output = tempfile.TemporaryFile() if index else None
            self.outputs.append(output)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", ENTRY, *command],
                    env=environment(index, processes, devices, port),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output else None,
                    start_new_session=True,
                )
            )

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def __enter__(self) -> _Group:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self.pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for output in filter(None, self.outputs):
            output.close()

    def wait(self) -> int:
        """The status of the process that failed first, 0 when none did."""
        first, deadline = 0, None
        while any(process.poll() is None for process in self.processes):
            failed = [process.returncode for process in self.processes if process.poll()]
            if failed and deadline is None:
                first, deadline = failed[0], time.monotonic() + _GRACE
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return first or next((p.returncode for p in self.processes if p.returncode), 0)

    def show(self) -> None:
        """The last lines of what failed otherwise than process 0."""
        said = self.processes[0].returncode
        for index, output in enumerate(self.outputs):
            status = self.processes[index].returncode
            if output is None or not status or (status == said and status in _SAID):
                continue
            output.seek(0)
            for line in output.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:]:
                print(f"[{index}] {line}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes and waits for them. Returns the exit status."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    command = parsed.command[1:] if parsed.command[:1] == ["--"] else parsed.command
    if not command:
        parser.error("what is to run? For example: -- train configs/tiny.yaml")
    if command[0] != "train":
        parser.error(f"{command[0]}: `train` alone runs on several processes")
    if parsed.dry_run:
        port = free_port()
        for index in range(parsed.processes):
            settings = environment(index, parsed.processes, parsed.devices, port, {})
            given = [f"{name}={value}" for name, value in settings.items()]
            print(shlex.join([*given, sys.executable, "-m", ENTRY, *command[1:]]))
        return 0
    with _Group(command[1:], parsed.processes, parsed.devices) as group:
        status = group.wait()
        group.show()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
