"""`profile:` of a configuration: a trace of some training steps, written by `jax.profiler`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from llamapro_jax.config import ProfileConfig
from llamapro_jax.launch.processes import is_first

PROFILE = "profile"
STEP_NAME = "train"
"""What a step is called in a trace."""

_PORT = 8791


class Profile:
    """Takes the steps of a run, and traces those that its configuration names.

    Only process 0 traces: all run the same program, and those of one host would overwrite each
    other's file. done: steps that were taken before. say: takes a line for the log.
    named: what the log calls `directory`, where that is a temporary one.
    """

    def __init__(
        self,
        config: ProfileConfig,
        directory: Path,
        done: int,
        say: Callable[[str], None],
        named: object = None,
    ) -> None:
        # The first step after a start also brings the program to the device.
        self._first = config.first_step if done < config.first_step else done + 2
        self._last = self._first + config.steps - 1
        self._wanted = config.steps > 0 and is_first()
        self._directory = directory / PROFILE
        self._named = f"{named or directory}/{PROFILE}"
        self._say = say
        self._began: int | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The run ended, or was stopped, before the last step that was to be traced.
        if self._began is not None:
            self._stop("the end")

    def take(self, step: int, before: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, which is step number `step` (from 1).

        before: results of the step before, which may be under way.
        """
        if self._wanted and step == self._first:
            jax.block_until_ready(before)
            jax.profiler.start_trace(self._directory)
            self._began = step
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=step):
            results = function(*arguments)
        if self._began is not None and step == self._last:
            jax.block_until_ready(results)
            self._stop(f"step {step}")
        return results

    def _stop(self, until: str) -> None:
        jax.profiler.stop_trace()
        began, self._began = self._began, None
        self._say(f"traced step {began} to {until}; to look at it (llamapro_jax[profile]):")
        self._say(f"  xprof --port {_PORT} {shlex.quote(self._named)}")
