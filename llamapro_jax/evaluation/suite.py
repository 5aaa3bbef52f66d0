"""A table of tasks to evaluate on, as a configuration: `configs/evaluate_llama_pro.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamapro_jax import typed_yaml
from llamapro_jax.typed_yaml import option


@dataclass(frozen=True)
class SuiteTask:
    """One column of the table."""

    name: str = option("A task, group or tag of lm-evaluation-harness, or one in `include_path`.")
    metric: str = option(
        "The figure that stands for it, by lm_eval's name: `acc_norm`, `exact_match,strict-match`."
    )
    shots: int | None = option("Examples in the prompt; null: as many as the task says.", None)
    published: dict[str, float] | None = option("What others report, in percent, by model.", None)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.shots is not None and self.shots < 0:
            yield "shots", f"is {self.shots}; it must be 0 or more."
        for model, value in (self.published or {}).items():
            if not 0 <= value <= 100:
                yield f"published.{model}", f"is {value}; it is a percentage, from 0 to 100."


@dataclass(frozen=True)
class SuiteConfig:
    """The tasks of a table, in its order."""

    tasks: tuple[SuiteTask, ...] = option("The columns.")
    include_path: str | None = option("A directory of your own tasks, `NAME.yaml` each.", None)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.tasks:
            yield "tasks", "is empty; name at least one task."
        seen: set[str] = set()
        for i, task in enumerate(self.tasks):
            if task.name in seen:
                yield f"tasks.{i}.name", f"{task.name!r} is given twice; a task is run once."
            seen.add(task.name)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            yield "include_path", f"{self.include_path!r} is not a directory."


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """The table at `path`. Raises UserError with every problem, each with its line."""
    return typed_yaml.load(SuiteConfig, path, list(overrides))
