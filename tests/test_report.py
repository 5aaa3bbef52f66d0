from __future__ import annotations

import argparse
import json
import math
import re
from html.parser import HTMLParser

import pytest

from llamapro_jax.errors import UserError
from llamapro_jax.metrics import MetricsWriter
from llamapro_jax.report import Series, chart, learning_table, render, thin, ticks, write_report
from llamapro_jax.verbs import report as verb

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data
        if self.open[-1:] == ["title"] and "svg" in self.open:
            self.titles.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def write_run(directory, texts=("prose", "code"), steps=40):
    with MetricsWriter(directory) as writer:
        for step in range(steps + 1):
            if step:
                writer.write("train", step, loss=5 - step / 20, learning_rate=1e-4, grad_norm=1.0,
                             tokens_per_second=2000.0, useful_flops_per_second=3e9)  # fmt: skip
            if step % 10 == 0:
                for name, perplexity in zip(texts, (20 + step / 10, 100 - step), strict=True):
                    writer.write("eval", step, name=name, loss=math.log(perplexity),
                                 perplexity=float(perplexity))  # fmt: skip


def test_the_table_says_what_was_learned_and_forgotten(tmp_path):
    write_run(tmp_path / "run")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert ["prose", "20", "20", "0", "24", "40", "+20.0 %"] in page.cells
    assert ["code", "100", "60", "40", "60", "40", "-40.0 %"] in page.cells
    assert ["steps done", "40"] in page.cells
    assert ["median tokens/s", "2k"] in page.cells
    assert ["median useful FLOP/s", "3 GFLOP/s"] in page.cells


def test_the_best_step_is_kept_when_a_text_gets_worse_again():
    records = [
        {"kind": "eval", "step": s, "name": "a", "loss": math.log(p)}
        for s, p in ((10, 8.0), (20, 4.0), (30, 5.0))
    ]
    records.append({"kind": "eval", "step": 40, "name": "a", "loss": None, "perplexity": None})
    (row,) = learning_table(records)
    assert (row.best_step, row.last_step, row.base, row.change) == (20, 30, None, None)
    assert row.best == pytest.approx(4) and row.last == pytest.approx(5)


def test_every_curve_is_drawn_with_its_numbers_on_hover(tmp_path):
    write_run(tmp_path)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    labels = {attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"}
    assert labels == {
        "Forgetting curve: change of perplexity, %", "Held-out loss, nats a token",
        "Training loss, nats a token", "Learning rate", "Gradient norm of what trains",
        "Throughput, tokens/s", "Useful FLOP/s",
    }  # fmt: skip
    assert page.count("polyline") == 5 + 2 * 2
    markers = [a for t, a in page.tags if t == "circle" and a["class"].startswith("d")]
    assert len(markers) == 2 * 2 * 5
    assert "prose, step 40: +20 %" in page.titles and "code, step 0: 0 %" in page.titles
    assert "loss, step 20: 4" in page.titles
    for attrs in (a for t, a in page.tags if t == "polyline"):
        for point in attrs["points"].split():
            x, y = map(float, point.split(","))
            assert 64 <= x <= 720 - 28 and 12 <= y <= 300 - 40


def test_the_page_needs_nothing_from_outside_and_escapes_what_it_shows(tmp_path):
    evil = "<script>alert('x')</script> & \"co\""
    write_run(tmp_path, texts=(evil, "b"))
    (tmp_path / "config.yaml").write_text(f"model: {json.dumps(evil)}\nseed: 3\n")
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"columns": ["model", evil], "rows": [[evil, 1.25], ["x", None]]})
    )
    text = write_report(tmp_path, model={evil: evil}).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and page.text.count("<script>alert('x')</script>") > 8
    assert ["model", evil] in page.cells and [evil, evil] in page.cells
    assert [evil, "1.25"] in page.cells and ["x", "–"] in page.cells
    names = {name for _, attrs in page.tags for name in attrs}
    assert not names & {"src", "href", "onclick", "onload"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text


def test_an_evaluation_says_of_which_step_and_of_how_much(tmp_path):
    write_run(tmp_path)
    table = {"columns": ["text", "model"], "rows": [["a", "b"]]}
    for about, said in (
        ({}, None),
        ({"title": "<runs> in float32", "step": 1200, "max_rows": 64},
         "<runs> in float32, step 1,200 of the run, at most the first 64 rows of each text."),
        ({"title": "runs", "step": 20, "max_rows": None}, "runs, step 20 of the run."),
    ):  # fmt: skip
        (tmp_path / "evaluation.json").write_text(json.dumps({**about, **table}))
        page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
        assert ["a", "b"] in page.cells
        assert said in page.text if said else "of the run" not in page.text
    more = {"columns": ["task"], "rows": [["arc"]]}
    (tmp_path / "evaluation.json").write_text(json.dumps({**table, "more": [more]}))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert ["a", "b"] in page.cells and ["arc"] in page.cells
    (tmp_path / "evaluation.json").write_text(json.dumps({**table, "more": [{"columns": []}]}))
    with pytest.raises(UserError, match="evaluation.json: must be"):
        write_report(tmp_path)


def test_summary_has_config_and_model_facts(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "model: a/b\ntrainable: [new, norms]\ntraining: {steps: 40}\noptimizer: {b1: 0.9}\n"
    )
    (tmp_path / "model.json").write_text('{"blocks": {"base": 32, "new": 8}, "total": 8357482496}')
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    for row in (
        ["model", "a/b"], ["what trains", "new, norms"], ["steps planned", "40"],
        ["blocks.base", "32"], ["blocks.new", "8"], ["total", "8,357,482,496"],
    ):  # fmt: skip
        assert row in page.cells
    assert "optimizer: {b1: 0.9}" in page.text


def test_the_page_says_how_many_frozen_bits_changed_and_what_went_wrong(tmp_path):
    write_run(tmp_path)
    (tmp_path / "checkpoints/20").mkdir(parents=True)
    (tmp_path / "checkpoints/20/commit_success.txt").touch()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert ["frozen bits changed", "0 at the save of step 20"] in page.cells
    summary = {"frozen_bits": 123456, "frozen_bits_changed": 0, "saves_failed": [3, 9],
               "updates_skipped": 0, "steps_set_aside": [], "metrics_lost": 2}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert ["frozen bits changed", "0 of 123,456"] in page.cells
    assert ["saves failed", "3, 9"] in page.cells and ["metrics lost", "2"] in page.cells
    assert "set aside" not in page.text and "skipped" not in page.text
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "frozen_bits": 0}))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert ["frozen bits changed", "nothing was frozen"] in page.cells


def test_a_run_that_diverged_says_so():
    records = [{"kind": "train", "step": s, "loss": 1.0 if s < 3 else None} for s in range(1, 6)]
    page = Page(render("run", records))
    assert "not finite in 3 lines of the log, first at step 3" in page.text
    assert "No held-out text was evaluated" in page.text


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: is not a directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics.jsonl: is empty"):
        write_report(tmp_path)
    write_run(tmp_path)
    with pytest.raises(UserError, match="is a directory; name the file"):
        write_report(tmp_path, tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config.yaml of the run: is not YAML"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").unlink()
    for content in (
        "[]", '{"columns": ["a"]}', '{"columns": [], "rows": [1]}',
        '{"columns": [], "rows": [], "step": "3"}',
    ):  # fmt: skip
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(UserError, match=r"evaluation.json: must be"):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_verb_writes_where_it_is_told(tmp_path, capsys):
    write_run(tmp_path / "run")
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    verb.run(parser.parse_args([str(tmp_path / "run")]))
    verb.run(parser.parse_args([str(tmp_path / "run"), "--out", str(tmp_path / "new" / "a.html")]))
    assert (tmp_path / "new" / "a.html").read_text() == (tmp_path / "run/report.html").read_text()
    assert "a.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-3, 12, [-2, 0, 2, 4, 6, 8, 10, 12]),
        (0.0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (2.31, 2.33, [2.31, 2.315, 2.32, 2.325, 2.33]),
        (0, 15900, list(range(0, 15900, 2000))),
    ],
)
def test_ticks_are_round_numbers_in_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_long_line_keeps_its_spikes():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7777] = (7777.0, 99.0)
    points[3333] = (3333.0, -5.0)
    kept = thin(points)
    assert len(kept) <= 400 and {points[7777], points[3333]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:400]) == points[:400]


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-7])
def test_one_point_and_flat_lines_are_drawn(value):
    for points in ([(0, value)], [(0, value), (9, value)]):
        assert "nan" not in chart("t", [Series("s", points)])
        assert chart("t", [Series("s", points)], include_zero=True).count("<polyline") == 1
    assert chart("t", [Series("s", [])]) == ""
