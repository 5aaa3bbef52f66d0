"""Tables of what was measured: one model's tasks, and several models side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llamapro_jax.evaluation.published import published

Table = dict[str, list[Any]]

# lm_eval's metrics that are not shares from 0 to 1.
_NO_SHARES = {"bits_per_byte", "bleu", "chrf", "ter", "mcc", "brier_score"}


def in_percent(metric: str) -> bool:
    """Whether a metric is a share, which tables give in percent."""
    name = metric.partition(",")[0]
    return not name.endswith("perplexity") and name not in _NO_SHARES


def _shown(value: float | None, metric: str) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return 100 * value if in_percent(metric) else value


def _published(row: Mapping[str, Any]) -> Mapping[str, float]:
    """The figures of a suite, where it has them, else those that the paper has for the name."""
    return row.get("published") or published(row["task"], row["metric"])


def tasks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One model's tasks: a line for each setting and metric.

    Of a suite also what it has of published figures: those are of the same questions.
    """
    known = list(dict.fromkeys(model for row in rows for model in row.get("published") or {}))
    columns = ["task", "model", "shots", "metric", "value", "±", "questions"]
    lines = [
        [
            *(row["task"], row["model"], row["shots"], row["metric"]),
            *(_shown(row[key], row["metric"]) for key in ("value", "stderr")),
            row["count"],
            *((row.get("published") or {}).get(model) for model in known),
        ]
        for row in rows
    ]
    # A column that no line fills is left out: lm_eval does not say how many questions it asked.
    kept = [
        i
        for i, _ in enumerate(columns + known)
        if i < 2 or any(line[i] is not None for line in lines)
    ]
    heads = columns + [f"{model} (paper)" for model in known]
    return {
        "columns": [heads[i] for i in kept],
        "rows": [[line[i] for i in kept] for line in lines],
    }


def side_by_side(
    models: Mapping[str, tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]],
) -> Table:
    """Several models: a line for each figure, a column for each model and each published one.

    models: name -> (texts, tasks), the rows of `assessment.Results`. Shares are in percent. Where
    two or more lines have published figures, the last line averages those that all have.
    """
    lines: dict[tuple[str, str, Any], dict[str, float | None]] = {}
    papers: dict[tuple[str, str, Any], Mapping[str, float]] = {}
    for model, (texts, tasks) in models.items():
        for row in texts:
            for figure in ("perplexity", "bits_per_byte"):
                key = (row["text"], figure, None)
                lines.setdefault(key, {})[model] = _shown(row[figure], figure)
                papers[key] = published(row["text"], figure)
        for row in tasks:
            key = (row["task"], row["metric"], row["shots"])
            lines.setdefault(key, {})[model] = _shown(row["value"], row["metric"])
            papers[key] = _published(row)
    known = list(dict.fromkeys(name for paper in papers.values() for name in paper))
    rows = [
        [*key, *(line.get(model) for model in models), *(papers[key].get(name) for name in known)]
        for key, line in lines.items()
    ]
    averaged = [row[3:] for row in rows if in_percent(row[1]) and papers[(row[0], row[1], row[2])]]
    if len(averaged) > 1:
        columns = zip(*averaged, strict=True)
        means = [None if None in column else sum(column) / len(column) for column in columns]
        rows.append([f"average of {len(averaged)}", "", None, *means])
    heads = ["", "metric", "shots", *models, *(f"{name} (paper)" for name in known)]
    return {"columns": heads, "rows": rows}
