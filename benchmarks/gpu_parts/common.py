"""What the parts share: the task that they are given, the results they write, and how they time."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamapro_jax.architecture import described
from llamapro_jax.config import ArchitectureConfig, OptimizerConfig
from llamapro_jax.expansion import ExpansionPlan, spread
from llamapro_jax.files import atomic_write
from llamapro_jax.model.config import ModelConfig

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0)
GIB = 2**30


@dataclass(frozen=True)
class Task:
    """rows, length: of a batch, which is one update. seconds: when to have ended, about.

    tiny: a small model, on any device. quick: the likeliest setting alone. setting: time this one
    again, and try no other.
    """

    result: str
    rows: int
    length: int
    seconds: float
    tiny: bool
    quick: bool
    setting: dict[str, Any] | None = None

    @staticmethod
    def read(path: str) -> Task:
        return Task(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


class Results:
    """What a part found, on disk after each finding: nothing is lost when its time is over."""

    def __init__(self, task: Task) -> None:
        self._path = Path(task.result)
        self._end = time.monotonic() + task.seconds
        self.values: dict[str, Any] = {"candidates": []}

    def put(self, **values: Any) -> None:
        self.values.update(values)
        atomic_write(self._path, json.dumps(self.values).encode())

    def add(self, row: dict[str, Any]) -> None:
        """A setting that was tried: `setting`, and either `problem` or its figures."""
        self.put(candidates=[*self.values["candidates"], row])
        print(f"  {describe(row)}", flush=True)

    def best(self) -> dict[str, Any] | None:
        """The fastest setting so far."""
        return fastest(self.values["candidates"])

    def time_for(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._end

    def time_for_another(self) -> bool:
        """Whether there is time for one more setting like the slowest so far."""
        used = [row["total_seconds"] for row in self.values["candidates"] if "seconds" in row]
        return self.time_for(1.2 * max(used, default=0.0))


def fastest(candidates: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of rows that compare: those that ran, on rows of one document each."""
    ran = [row for row in candidates if "seconds" in row and not row["setting"].get("packed")]
    return min(ran, key=lambda row: statistics.median(row["seconds"]), default=None)


def describe(row: dict[str, Any]) -> str:
    setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
    if "problem" in row:
        return f"{setting}: {row['problem']}"
    memory = f", {row['memory_gib']:.1f} GiB" if row["memory_gib"] else ""
    return (
        f"{setting}: {statistics.median(row['seconds']):.3f} s a step{memory}, loss "
        f"{row['loss']:.3f}, ready after {row['ready_seconds']:.0f} s"
    )


def architecture(tiny: bool) -> tuple[ModelConfig, ExpansionPlan]:
    """LLaMA2-7B with 8 new blocks; tiny: its likeness with 4 + 2 small blocks."""
    if not tiny:
        return described(ArchitectureConfig("llama2_7b", 8))
    config, _ = described(ArchitectureConfig("llama2_7b", 0))
    plan = ExpansionPlan(4).expand(spread(4, 2))
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
    heads = {"num_heads": 4, "num_kv_heads": 4}
    return replace(config, num_blocks=plan.num_blocks, **small, **heads), plan


def time_steps(
    take: Callable[[], None], wait: Callable[[], Any], steps: int, times: int
) -> list[float]:
    """Seconds of a step, `times` times the mean of so many that are queued one after the other."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        for _ in range(steps):
            take()
        wait()
        seconds.append((time.perf_counter() - began) / steps)
    return seconds


def task_of_process() -> Task:
    """The task that `gpu.py` gave this process."""
    return Task.read(sys.argv[1])


def require_gpu(task: Task, has_gpu: bool) -> None:
    """Ends the process unless its model has a device to run on."""
    if not (has_gpu or task.tiny):
        sys.exit("error: there is no GPU here; --tiny runs on any device")
