"""All that `llamapro evaluate` measures of one model: texts, local tasks, tasks of lm_eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamapro_jax.evaluation import tasks as local
from llamapro_jax.evaluation.comparison import (
    Comparison,
    Setting,
    check_base,
    check_strengths,
    compare,
    recorded_original,
)
from llamapro_jax.evaluation.harness import check_harness, check_suite, run_harness, run_suite
from llamapro_jax.evaluation.suite import SuiteConfig
from llamapro_jax.evaluation.texts import Text, measure, read_texts
from llamapro_jax.model.api import OpenedModel


@dataclass(frozen=True)
class Request:
    """What to measure, of whichever model.

    texts: name -> path. tasks: local ones, read. lm_eval: names of lm-evaluation-harness's tasks,
    with include_path, shots and limit as `harness.run_harness` takes them. suite: a table of them.
    sequence_length and max_rows are of texts, max_tokens of local generated answers.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    tasks: Sequence[local.Task] = ()
    lm_eval: Sequence[str] = ()
    suite: SuiteConfig | None = None
    include_path: str | None = None
    shots: int | None = None
    limit: int | None = None
    allow_code: bool = False
    sequence_length: int | None = None
    max_rows: int | None = None
    max_tokens: int = local.MAX_TOKENS
    batch_size: int = 8

    def check_harness(self) -> None:
        """Raises UserError for tasks of lm_eval that cannot run."""
        if self.lm_eval:
            check_harness(self.lm_eval, self.include_path, self.allow_code)
        if self.suite is not None:
            check_suite(self.suite, self.allow_code)


@dataclass(frozen=True)
class Prepared:
    """One model and what it is asked, in its tokenizer's ids. Its parameters are not read yet."""

    model: OpenedModel
    request: Request
    texts: Sequence[Text]
    tasks: Sequence[local.Encoded]


@dataclass
class Results:
    """texts: as `texts.evaluate` returns them. tasks: a dict for each task, setting and metric,
    as `tasks.measure_task` has it; those of a suite have `published` too."""

    texts: list[dict[str, Any]]
    tasks: list[dict[str, Any]]


def prepare(model: OpenedModel, request: Request) -> Prepared:
    """Everything that can be wrong with model and request is found here, as a UserError."""
    texts = read_texts(
        model,
        request.texts,
        sequence_length=request.sequence_length,
        batch_size=request.batch_size,
        max_rows=request.max_rows,
    )
    encoded = [local.encode_task(model, task, request.max_tokens) for task in request.tasks]
    return Prepared(model, request, texts, encoded)


def assess(
    model: OpenedModel,
    request: Request,
    *,
    strengths: Sequence[float] | None = None,
    base: OpenedModel | None = None,
) -> Results:
    """Measures a model with its new blocks on and off, at the strengths between, and its base.

    strengths and base are those of `texts.evaluate`. Raises UserError as `prepare` does, before
    any parameter is read.
    """
    check_strengths(model, strengths)
    if base is not None:
        check_base(model, base)
    prepared = prepare(model, request)
    base = base or recorded_original(model)
    comparison = compare(model.load(), strengths, None if base is None else base.load())
    return _measured(comparison, prepared)


def assess_alone(prepared: Prepared) -> Results:
    """Measures a model as it is, beside nothing: a column of a table of several."""
    return _measured(Comparison((Setting("model", prepared.model.load()),), None), prepared)


def _measured(comparison: Comparison, prepared: Prepared) -> Results:
    request = prepared.request
    texts = measure(comparison, prepared.texts, request.batch_size, progress=True)
    rows = []
    for setting in comparison.settings:
        for task in prepared.tasks:
            rows += local.measure_task(setting, task, request.batch_size, progress=True)
        rows += _of_lm_eval(setting, request)
    names = list(dict.fromkeys(row["task"] for row in rows))
    return Results(texts, sorted(rows, key=lambda row: names.index(row["task"])))


def _of_lm_eval(setting: Setting, request: Request) -> list[dict[str, Any]]:
    if not request.lm_eval and request.suite is None:
        return []
    model, new_blocks = setting.at_strength()
    options: dict[str, Any] = {
        "limit": request.limit,
        "batch_size": request.batch_size,
        "allow_code": request.allow_code,
        "new_blocks": new_blocks,
    }
    about = {"model": setting.label, "strength": setting.strength, "count": None}
    rows: list[dict[str, Any]] = []
    if request.lm_eval:
        results = run_harness(
            model,
            request.lm_eval,
            include_path=request.include_path,
            shots=request.shots,
            **options,
        )
        for task, figures in results.items():
            for metric, value in figures.items():
                if "_stderr" not in metric:
                    row = {"task": task, "shots": request.shots, "metric": metric, "value": value}
                    rows.append({**row, **about, "stderr": figures.get(_stderr_of(metric))})
    if request.suite is not None:
        rows += [{**row, **about} for row in run_suite(model, request.suite, **options)]
    return rows


def _stderr_of(metric: str) -> str:
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"
