"""A run's report: one HTML page that needs nothing else, with curves drawn as inline SVG."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from llamapro_jax.checkpoint_files import Directory, committed_steps
from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_write, read_json
from llamapro_jax.local_copies import fetched
from llamapro_jax.metrics import Record, human, read_metrics
from llamapro_jax.remote import RemotePath, as_path

Point = tuple[float, float]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 28, 12, 40  # margins of the plot, for ticks and labels
MOST_POINTS = 400  # of a line; a screen shows no more
COLOURS = 8

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1b1b1a; --soft: #5c5b57;
  --rule: #e2e1dc; --good: #0a6b3d; --bad: #b3261e; --s0: #2563b8; --s1: #c2540a; --s2: #157a55;
  --s3: #a3287f; --s4: #7a6200; --s5: #5b43b5; --s6: #0e7490; --s7: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --paper: #171716; --ink: #ecebe6; --soft: #a5a39b;
  --rule: #373631; --good: #5fd39a; --bad: #ff8a80; --s0: #7fb2ff; --s1: #ff9f5a; --s2: #58cf9f;
  --s3: #f08fd2; --s4: #d9bf4a; --s5: #b3a2ff; --s6: #5cc7e0; --s7: #b5b5b5; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 76rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 46rem; } .soft { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.5rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .8rem .3rem 0; text-align: left;
  vertical-align: top; } th { color: var(--soft); font-weight: 500; }
td.number, th.number { text-align: right; padding: .3rem 0 .3rem 1.2rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { overflow-x: auto; font-size: .85rem; } summary { cursor: pointer; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 13px; }
svg .rule { stroke: var(--rule); } svg .zero { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .hit { fill: transparent; } svg .hit:hover { fill: var(--ink); fill-opacity: .35; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; font-size: .9rem; }
.key { display: inline-block; width: 1.2rem; height: .2rem; margin-right: .4rem;
  vertical-align: middle; }
""" + "".join(
    f".c{i} {{ stroke: var(--s{i}); }} .d{i} {{ fill: var(--s{i}); }} "
    f".k{i} {{ background: var(--s{i}); }}\n"
    for i in range(COLOURS)
)


# ------------------------------------------------------------------- what the numbers say


@dataclasses.dataclass(frozen=True)
class LearningRow:
    """Perplexities of one held-out text over a run; None where it was not measured."""

    name: str
    base: float | None
    best: float
    best_step: int
    last: float
    last_step: int

    @property
    def change(self) -> float | None:
        """Last against base, in percent: below 0 is learning, above is forgetting."""
        return None if self.base is None else 100 * (self.last / self.base - 1)


def perplexities(records: Iterable[Record]) -> dict[str, list[tuple[int, float]]]:
    """For each held-out text, in order of appearance, its `(step, perplexity)`."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record["kind"] == "eval" and record.get("loss") is not None:
            value = record.get("perplexity")
            value = math.exp(min(record["loss"], 700)) if value is None else value
            curves.setdefault(str(record.get("name", "text")), []).append((record["step"], value))
    return curves


def learning_table(records: Iterable[Record]) -> list[LearningRow]:
    """What each held-out text gained or lost. `base` is the evaluation at step 0."""
    rows = []
    for name, curve in perplexities(records).items():
        best_step, best = min(curve, key=lambda point: point[1])
        last_step, last = curve[-1]
        rows.append(LearningRow(name, dict(curve).get(0), best, best_step, last, last_step))
    return rows


# ------------------------------------------------------------------- charts


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart; `markers` draws its points."""

    name: str
    points: Sequence[Point]
    markers: bool = False


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points that keep the lowest and highest of each stretch, so spikes stay."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    kept: list[Point] = []
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about so many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.6 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 if step > 1e-9 else i * step for i in range(first, last + 1)]


def _range(values: Sequence[float], include_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if include_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low if include_zero and low == 0 else low - pad, high + pad


def chart(
    title: str,
    series: Sequence[Series],
    text: Callable[[float], str] = lambda value: f"{value:.4g}",
    include_zero: bool = False,
) -> str:
    """A titled line chart over steps as HTML; empty when no series has a point."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    steps = [x for s in series for x, _ in s.points]
    x_low, x_high = min(steps), max(steps)
    x_high = x_high if x_high > x_low else x_low + 1
    y_low, y_high = _range([y for s in series for _, y in s.points], include_zero)

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in ticks(y_low, y_high):
        _, y = place((x_low, value))
        kind = "zero" if include_zero and value == 0 else "rule"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(text(value))}</text>'
        )
    for value in (v for v in ticks(x_low, x_high) if v == int(v)):
        x, _ = place((value, y_low))
        parts.append(
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:,.0f}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    for i, one in enumerate(series):
        parts.append(_line(one, i % COLOURS, place, text))
    parts.append("</svg>")
    return (
        f'<figure style="margin:0"><h3>{escape(title)}</h3>{_legend(series)}'
        f"{''.join(parts)}</figure>\n"
    )


def _line(
    series: Series, colour: int, place: Callable[[Point], Point], text: Callable[[float], str]
) -> str:
    points = thin(series.points)
    placed = [place(point) for point in points]
    path = " ".join(f"{x},{y}" for x, y in placed)
    parts = [f'<polyline class="line c{colour}" points="{path}"/>']
    for (step, value), (x, y) in zip(points, placed, strict=True):
        if series.markers:
            parts.append(f'<circle class="d{colour}" cx="{x}" cy="{y}" r="3"/>')
        title = escape(f"{series.name}, step {step:,.0f}: {text(value)}")
        parts.append(f'<circle class="hit" cx="{x}" cy="{y}" r="7"><title>{title}</title></circle>')
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    keys = (
        f'<span><span class="key k{i % COLOURS}"></span>{escape(s.name)}</span>'
        for i, s in enumerate(series)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


# ------------------------------------------------------------------- the page


def _table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table. A cell that is a `_Html` is taken as it is, anything else is escaped."""
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows) and all(len(r) > i and _is_numeric(r[i]) for r in rows)
        for i in range(len(columns))
    ]

    def cells(tag: str, values: Sequence[Any]) -> str:
        text = ""
        for i, value in enumerate(values):
            number = ' class="number"' if i < len(numeric) and numeric[i] else ""
            text += f"<{tag}{number}>{_cell(value)}</{tag}>"
        return f"<tr>{text}</tr>\n"

    head = f"<thead>{cells('th', columns)}</thead>" if columns else ""
    body = "".join(cells("td", row) for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>\n'


class _Html(str):
    """Markup made here, its contents escaped."""


def _is_numeric(value: Any) -> bool:
    return value is None or isinstance(value, int | float | _Html)


def _cell(value: Any) -> str:
    if isinstance(value, _Html):
        return value
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _learning_section(records: Sequence[Record]) -> str:
    rows = learning_table(records)
    if not rows:
        return "<p>No held-out text was evaluated: <code>data.eval</code> names them.</p>"
    cells = []
    for row in rows:
        change = None
        if row.change is not None:
            kind = "good" if row.change < 0 else "bad" if row.change > 0 else "soft"
            change = _Html(f'<span class="{kind}">{row.change:+.1f} %</span>')
        cells.append((row.name, row.base, row.best, row.best_step, row.last, row.last_step, change))
    head = ("held-out text", "base (step 0)", "best", "at step", "last", "at step", "change")
    absolute, relative = [], []
    for name, curve in perplexities(records).items():
        absolute.append(Series(name, [(s, math.log(p)) for s, p in curve], markers=True))
        if base := dict(curve).get(0):
            change_of = [(step, 100 * (value / base - 1)) for step, value in curve]
            relative.append(Series(name, change_of, markers=True))
    return (
        "<p>Perplexity of each held-out text. Below 0 % is learning, above is forgetting. At step "
        "0 freshly inserted blocks change nothing, so that column is the model before them.</p>"
        + _table(head, cells)
        + '<div class="charts" style="margin-top:1.5rem">'
        + chart(
            "Forgetting curve: change of perplexity, %",
            relative,
            lambda value: f"{value:+.4g} %" if value else "0 %",
            include_zero=True,
        )
        + chart("Held-out loss, nats a token", absolute)
        + "</div>"
    )


def _training_section(records: Sequence[Record]) -> str:
    train = [record for record in records if record["kind"] == "train"]

    def curve(name: str) -> list[Point]:
        return [(r["step"], r[name]) for r in train if r.get(name) is not None]

    charts = [
        chart("Training loss, nats a token", [Series("loss", curve("loss"))]),
        chart("Learning rate", [Series("learning rate", curve("learning_rate"))], "{:.3g}".format,
              include_zero=True),
        chart("Gradient norm of what trains", [Series("gradient norm", curve("grad_norm"))],
              include_zero=True),
        chart("Throughput, tokens/s", [Series("tokens/s", curve("tokens_per_second"))], human,
              include_zero=True),
        chart("Useful FLOP/s", [Series("useful FLOP/s", curve("useful_flops_per_second"))], human,
              include_zero=True),
    ]  # fmt: skip
    broken = [r["step"] for r in train if "loss" in r and r["loss"] is None]
    warning = (
        f'<p class="bad">The loss was not finite in {len(broken)} lines of the log, first at step '
        f"{broken[0]:,}.</p>"
        if broken
        else ""
    )
    return f'{warning}<div class="charts">{"".join(charts)}</div>'


def _evaluation_section(evaluation: Mapping[str, Any]) -> str:
    step, rows = evaluation.get("step"), evaluation.get("max_rows")
    parts = (
        escape(str(evaluation.get("title") or "")),
        "" if step is None else f"step {step:,} of the run",
        "" if rows is None else f"at most the first {rows:,} rows of each text",
    )
    said = ", ".join(part for part in parts if part)
    tables = (evaluation, *evaluation.get("more", ()))
    shown = "".join(_table(table["columns"], table["rows"]) for table in tables)
    return f"<p>{said}.</p>{shown}" if said else shown


def _facts(
    config: Mapping[str, Any], model: Mapping[str, Any], records: Sequence[Record]
) -> list[tuple[str, Any]]:
    chosen = (
        ("model", "model"),
        ("trainable", "what trains"),
        ("training.steps", "steps planned"),
        ("data.batch_size", "rows a step"),
        ("data.sequence_length", "tokens a row"),
        ("optimizer.learning_rate", "peak learning rate"),
        ("optimizer.schedule", "schedule"),
        ("compute_dtype", "compute type"),
        ("seed", "seed"),
    )
    flat = dict(_flat(config))
    facts: list[tuple[str, Any]] = []
    for path, label in chosen:
        if path in flat:
            value = flat[path]
            facts.append((label, ", ".join(map(str, value)) if isinstance(value, list) else value))
    facts.append(("steps done", max(record["step"] for record in records)))
    for name, label, unit in (
        ("tokens_per_second", "median tokens/s", ""),
        ("useful_flops_per_second", "median useful FLOP/s", "FLOP/s"),
    ):
        values = [r[name] for r in records if r.get(name) is not None]
        if values:
            facts.append((label, human(statistics.median(values), unit)))
    return facts + list(_flat(model))


def _kept(run: Path, checkpoints: Directory) -> list[tuple[str, Any]]:
    """What a run says of its frozen weights, and of what went wrong, if anything did."""
    file = run / "summary.json"
    if not file.exists():
        # No step is saved before the frozen weights are compared with those of the start.
        steps = committed_steps(checkpoints)
        return [("frozen bits changed", f"0 at the save of step {steps[-1]:,}")] if steps else []
    summary = read_json(file)
    bits = summary.get("frozen_bits")
    changed = f"{summary.get('frozen_bits_changed')} of {bits:,}" if bits else "nothing was frozen"
    facts: list[tuple[str, Any]] = [("frozen bits changed", changed)]
    for name in ("updates_skipped", "steps_set_aside", "saves_failed", "metrics_lost"):
        if value := summary.get(name):
            steps_of = ", ".join(map(str, value)) if isinstance(value, list) else value
            facts.append((name.replace("_", " "), steps_of))
    return facts


def _settings(config_text: str) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.yaml of the run: is not YAML ({reason}).") from None
    return config if isinstance(config, dict) else {}


def render(
    title: str,
    records: Sequence[Record],
    config_text: str = "",
    model: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    kept: Sequence[tuple[str, Any]] = (),
) -> str:
    """The page as HTML.

    `records` as `metrics.read_metrics` gives them (at least one), `config_text` the run's YAML,
    `model` any facts about the model (nested mappings become dotted names), `evaluation` a table
    `{"columns": [...], "rows": [[...]]}`, with `title`, `step` and `max_rows` where it has them,
    and further tables in `more`, `kept` what stands below the facts about the run.
    """
    sections = [
        "<h2>Run</h2>" + _table((), [*_facts(_settings(config_text), model or {}, records), *kept]),
        "<h2>Learning and forgetting</h2>" + _learning_section(records),
    ]
    if evaluation is not None:
        sections.append("<h2>Evaluation</h2>" + _evaluation_section(evaluation))
    sections.append("<h2>Training</h2>" + _training_section(records))
    if config_text:
        sections.append(
            f"<h2>Configuration</h2><details><summary>all settings</summary>"
            f"<pre>{escape(config_text)}</pre></details>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{chr(10).join(sections)}\n</body></html>\n"
    )


def write_report(
    run: str | Path, out: str | Path | None = None, model: Mapping[str, Any] | None = None
) -> Path | RemotePath:
    """Writes the report of a run directory, by default to `RUN/report.html`; returns its path.

    Reads `metrics.jsonl`, and if they are there `config.yaml`, `model.json` (unless `model` is
    given), `evaluation.json` and `summary.json`. Raises UserError when the run or its metrics are
    missing or empty.
    """
    place, run = as_path(run), fetched(run, without=("checkpoints", "data", "tensorboard"))
    if not run.is_dir():
        raise UserError(f"{run}: is not a directory; name the directory of a training run.")
    records = read_metrics(run)
    if not records:
        raise UserError(f"{run / 'metrics.jsonl'}: is empty; the run has logged nothing yet.")
    config = run / "config.yaml"
    model_file, evaluation_file = run / "model.json", run / "evaluation.json"
    if model is None and model_file.exists():
        model = read_json(model_file)
    evaluation = read_json(evaluation_file) if evaluation_file.exists() else None
    if evaluation is not None and not _is_table(evaluation):
        raise UserError(
            f'{evaluation_file}: must be {{"columns": [...], "rows": [[...], ...]}}; '
            "evaluate the run again or remove the file."
        )
    page = render(
        run.resolve().name,
        records,
        config.read_text(encoding="utf-8") if config.exists() else "",
        model,
        evaluation,
        _kept(run, place / "checkpoints"),
    )
    out = place / "report.html" if out is None else Path(out)
    if out.is_dir():
        raise UserError(f"{out}: is a directory; name the file to write, such as report.html.")
    atomic_write(out, page)
    return out


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("columns"), list)
        and isinstance(value.get("rows"), list)
        and all(isinstance(row, list) for row in value["rows"])
        and all(isinstance(value.get(key), int | None) for key in ("step", "max_rows"))
        and isinstance(value.get("more", []), list)
        and all(map(_is_table, value.get("more", [])))
    )
