"""`llamapro evaluate` on tasks and on several models: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from models import disturbed, english, expand_to, save, write_with_tokenizer

from llamapro_jax import cli
from llamapro_jax.evaluation import assessment
from llamapro_jax.evaluation.published import AVERAGES, BENCHMARKS, INSTRUCT, MODELS, PRO, published
from llamapro_jax.evaluation.results_table import side_by_side, tasks_table
from llamapro_jax.evaluation.scoring import loglikelihoods
from llamapro_jax.evaluation.suite import load_suite
from llamapro_jax.expansion import Insertion
from llamapro_jax.model import api
from llamapro_jax.model.api import OpenedModel, load

PAPER = Path(__file__).resolve().parent.parent / "configs" / "evaluate_llama_pro.yaml"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the base grown and disturbed, a text and a task of four questions."""
    path = tmp_path_factory.mktemp("verb")
    base = write_with_tokenizer(path / "base", num_hidden_layers=2)
    grown = expand_to(base, path / "grown", (Insertion(1, 1),))
    save(disturbed(load(str(grown))), path / "model")
    (path / "prose.txt").write_text(english(1, 60))
    questions = [
        {"question": english(i, 4).strip(), "choices": ["cat", "green trees"], "answer": i % 2}
        for i in range(4)
    ]
    (path / "arc.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        status = cli.main(["evaluate", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def line_of(printed: str, *cells: str) -> list[str]:
    """The first line of a printed table whose cells begin with these."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines()]
    return next(line for line in lines if line[: len(cells)] == list(cells))


# ------------------------------------------------------------------- one model, several models


def test_tasks_are_measured_on_and_off_and_side_by_side(
    files: Path, run: Run, tmp_path: Path
) -> None:
    task = ["--task", f"arc={files / 'arc.jsonl'}", "--shots", 1, "--batch-size", 4]
    out = tmp_path / "one.json"
    status, printed, _ = run(files / "model", *task, "--json", out)
    assert status == 0
    alone = json.loads(out.read_text())
    assert alone["results"] == [] and alone["limit"] is None
    rows = {(row["model"], row["metric"]): row for row in alone["tasks"]}
    assert list(rows) == [
        *(("new blocks on", "acc"), ("new blocks on", "acc_norm")),
        *(("new blocks off", "acc"), ("new blocks off", "acc_norm")),
    ]
    on, off = rows["new blocks on", "acc_norm"], rows["new blocks off", "acc_norm"]
    assert (on["count"], on["shots"], on["strength"], off["strength"]) == (3, 1, 1, 0)
    shown = line_of(printed, "arc", "new blocks on", "1", "acc_norm")
    assert float(shown[4]) == pytest.approx(100 * on["value"], abs=0.01)
    # The paper's figures stand beside several models, and in a suite.
    assert "paper" not in printed and len(shown) == 7

    out = tmp_path / "two.json"
    text = ["--text", f"stack-python={files / 'prose.txt'}", "--sequence-length", 32]
    compared = [files / "base", "--compare", files / "model", files / "base"]
    status, printed, _ = run(*compared, *task, *text, "--json", out)
    assert status == 0
    base, model = json.loads(out.read_text())["models"]
    assert (base["model"], model["model"]) == (str(files / "base"), str(files / "model"))
    values = {one["metric"]: one["value"] for one in base["tasks"]}
    assert values["acc_norm"] == off["value"]
    assert [row["value"] for row in model["tasks"]] == [
        rows["new blocks on", metric]["value"] for metric in ("acc", "acc_norm")
    ]
    shown = line_of(printed, "arc", "acc_norm", "1")
    assert [float(shown[3]), float(shown[4])] == pytest.approx(
        [100 * off["value"], 100 * on["value"]], abs=0.01
    )
    assert shown[5:] == ["53.07", "54.10", "52.30"]
    perplexity = line_of(printed, "stack-python", "perplexity")
    assert perplexity[3] != perplexity[4] and perplexity[5:] == ["9.4600", "5.2500", "-"]


def test_one_model_at_a_time_is_in_memory(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    read = OpenedModel.load

    def load_and_count(model: OpenedModel) -> api.Model:
        loaded = read(model)
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return loaded

    monkeypatch.setattr(OpenedModel, "load", load_and_count)
    models = [files / "model"] * 2 + [f"{files / 'model'}/", files / "grown"]
    task = ["--task", f"a={files / 'arc.jsonl'}", "--limit", 1]
    assert run("--compare", *models, *task)[0] == 0
    assert len(held) == 3 and max(held) - min(held) < 10_000


# ------------------------------------------------------------------- tasks of lm_eval


def test_tasks_of_lm_eval_are_called_for_each_setting(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checked, asked = [], []

    def run_harness(model: Any, tasks: Any, **options: Any) -> dict[str, dict[str, float]]:
        asked.append((tuple(tasks), options))
        share = 0.5 if options["new_blocks"] else 0.25
        strict = {"exact_match,strict-match": share, "exact_match_stderr,strict-match": 0.125}
        return {"gsm8k": {**strict, "word_perplexity": 12.5}}

    def run_suite(model: Any, suite: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((tuple(task.name for task in suite.tasks), options))
        row = {"task": "own", "shots": 2, "metric": "acc", "value": None, "stderr": None}
        return [{**row, "published": {"Other": 12.0}}]

    monkeypatch.setattr(assessment, "check_harness", lambda *a: checked.append(a))
    monkeypatch.setattr(assessment, "check_suite", lambda *a: checked.append(a))
    monkeypatch.setattr(assessment, "run_harness", run_harness)
    monkeypatch.setattr(assessment, "run_suite", run_suite)
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: [{name: own, metric: acc, shots: 2}]")
    out = tmp_path / "out.json"
    options = ["--shots", 3, "--limit", 7, "--batch-size", 5, "--allow-code-execution"]
    status, printed, error = run(
        *(files / "model", "--lm-eval", "gsm8k", "--include-path", tmp_path, *options),
        *("--suite", suite, "--json", out),
    )
    assert status == 0, error
    assert checked == [(["gsm8k"], str(tmp_path), True), (load_suite(suite), True)]
    common = {"limit": 7, "batch_size": 5, "allow_code": True}
    own = {"include_path": str(tmp_path), "shots": 3}
    assert asked == [
        call
        for on in (True, False)
        for call in (
            (("gsm8k",), {**common, **own, "new_blocks": on}),
            (("own",), {**common, "new_blocks": on}),
        )
    ]
    rows = json.loads(out.read_text())["tasks"]
    assert [(row["task"], row["metric"], row["value"], row["stderr"]) for row in rows] == [
        ("gsm8k", "exact_match,strict-match", 0.5, 0.125),
        ("gsm8k", "word_perplexity", 12.5, None),
        ("gsm8k", "exact_match,strict-match", 0.25, 0.125),
        ("gsm8k", "word_perplexity", 12.5, None),
        *[("own", "acc", None, None)] * 2,
    ]
    strict = line_of(printed, "gsm8k", "new blocks off", "3", "exact_match,strict-match")
    assert strict[4:6] == ["25.00", "12.50"] and "17.89" not in strict
    assert line_of(printed, "gsm8k", "new blocks on", "3", "word_perplexity")[4] == "12.50"
    assert line_of(printed, "own", "new blocks on")[-1] == "12.00"


@pytest.mark.slow
def test_a_local_task_has_the_figures_that_lm_eval_gives_it(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through both ways, questions and examples from the same lines: the same ids are scored."""
    pytest.importorskip("lm_eval")
    where = files / "tasks"
    where.mkdir()
    metrics = "".join(
        f"\n  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}"
        for metric in ("acc", "acc_norm")
    )
    data, examples = files / "arc.jsonl", where / "examples.jsonl"
    lines = data.read_text().splitlines()
    examples.write_text("\n".join(lines[:2]))
    (where / "same.yaml").write_text(
        f"task: same\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {data}, dev: {examples}}}}}\n"
        "test_split: test\nfewshot_split: dev\nfewshot_config: {sampler: first_n}\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\n'
        f"doc_to_target: answer\nmetric_list:{metrics}\n"
    )
    asked: dict[str, list[Any]] = {"tasks": [], "harness_model": []}
    for name, requests in asked.items():

        def record(model: Any, pairs: Any, kept: list[Any] = requests, **options: Any) -> Any:
            kept.append(sorted((tuple(a), tuple(b)) for a, b in pairs))
            return loglikelihoods(model, pairs, **options)

        monkeypatch.setattr(f"llamapro_jax.evaluation.{name}.loglikelihoods", record)
    out = files / "same.json"
    task = ["--task", f"ours={data}", "--shots-from", f"ours={examples}", "--shots", 2]
    harness = ["--lm-eval", "same", "--include-path", where]
    status, _, error = run(files / "model", *task, *harness, "--json", out)
    assert status == 0, error
    assert len(asked["tasks"]) == 2 and asked["tasks"] == asked["harness_model"]
    rows = json.loads(out.read_text())["tasks"]
    ours, theirs = (
        {(r["model"], r["metric"]): (r["value"], r["stderr"]) for r in rows if r["task"] == name}
        for name in ("ours", "same")
    )
    assert len(ours) == 4 and ours.keys() == theirs.keys()
    for key, figures in ours.items():
        assert figures == pytest.approx(theirs[key])


# ------------------------------------------------------------------- what is published


def test_the_papers_figures_average_to_its_averages() -> None:
    for i, average in enumerate(AVERAGES):
        values = [one.values[i] for one in BENCHMARKS]
        assert None not in values and len(values) == 9
        assert sum(values) / 9 == pytest.approx(average, abs=0.005)
    assert published("ARC-Challenge", "acc_norm")[PRO] == 54.10
    assert published("arc", "acc") == {} == published("mine", "acc")
    assert INSTRUCT not in published("lambada", "perplexity")


def test_the_suite_of_the_paper_has_the_same_figures_and_examples() -> None:
    ours = {name: one for one in BENCHMARKS for name in one.names}
    for task in load_suite(PAPER).tasks:
        one = ours[task.name]
        assert (task.metric, task.shots) == (one.metric, one.shots)
        assert task.published is not None
        assert [task.published[model] for model in MODELS] == list(one.values)


def figure(task: str, metric: str, value: float | None, **more: Any) -> dict[str, Any]:
    about = {"model": "m", "strength": None, "shots": 5, "stderr": None, "count": None}
    return {"task": task, "metric": metric, "value": value, **about, **more}


def test_the_average_is_over_what_every_model_has() -> None:
    first = [figure("mmlu", "acc", 0.5), figure("winogrande", "acc", 0.75), figure("x", "acc", 1.0)]
    second = [figure("mmlu", "acc", 0.25), figure("winogrande", "acc", None)]
    text = {"text": "lambada", "perplexity": 4.0, "bits_per_byte": float("inf")}
    table = side_by_side({"a": ([text], first), "b": ([], second)})
    rows = {(row[0], row[1]): row[2:] for row in table["rows"]}
    assert table["columns"][:5] == ["", "metric", "shots", "a", "b"]
    assert rows["mmlu", "acc"] == [5, 50, 25, 46.87, 47.88, 52.57]
    assert rows["x", "acc"] == [5, 100, None, None, None, None]
    assert rows["lambada", "perplexity"] == [None, 4, None, 3.39, 3.46, None]
    assert rows["lambada", "bits_per_byte"][1] is None
    assert rows["average of 2", ""][:3] == [None, 62.5, None]
    assert rows["average of 2", ""][3] == pytest.approx((46.87 + 74.03) / 2)
    alone = side_by_side({"a": ([], first[:1])})
    assert len(alone["rows"]) == 1


def test_columns_that_nothing_fills_are_left_out() -> None:
    table = tasks_table([figure("x", "acc", 0.5, shots=None)])
    assert table == {
        "columns": ["task", "model", "metric", "value"],
        "rows": [["x", "m", "acc", 50]],
    }


# ------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model; name one"),
        (["MODEL"], "nothing to measure; give --text, --task, --lm-eval or --suite"),
        (["MODEL", "--task", "arc.jsonl"], "--task arc.jsonl: must be NAME=PATH"),
        (["MODEL", "--task", "a=absent.jsonl"], "absent.jsonl: no such file"),
        (["MODEL", "--task", "a=TASK", "a=TASK"], "'a' is given twice"),
        (["MODEL", "--task", "a=TASK", "--shots-from", "b=TASK", "--shots", "1"], "no --task is"),
        (["MODEL", "--task", "a=TASK", "--shots-from", "a=TASK"], "say with --shots how many"),
        (["MODEL", "--task", "a=TASK", "--shots", "9"], "has 4 questions, fewer than the 9"),
        (["MODEL", "--task", "a=TASK", "--limit", "0"], "limit is 0"),
        (["MODEL", "--text", "a=TEXT", "--shots", "1"], "--shots is of --task and --lm-eval"),
        (["MODEL", "--task", "a=TASK", "--include-path", "x"], "--include-path is of --lm-eval"),
        (["MODEL", "--text", "a=TEXT", "--max-tokens", "5"], "--max-tokens is of --task"),
        (["MODEL", "--task", "a=TASK", "--max-rows", "5"], "--max-rows is of --text"),
        (["MODEL", "--task", "a=TASK", "--sequence-length", "32"], "--sequence-length is of --t"),
        (["MODEL", "--task", "a=TASK", "--batch-size", "0"], "batch_size is 0"),
        (["MODEL", "--suite", "absent.yaml"], "absent.yaml"),
        (["--compare", "MODEL", "--task", "a=TASK", "--strength", "0.5"], "--strength is of one"),
        (["--compare", "MODEL", "--task", "a=TASK", "--base", "x"], "--base is of one model"),
        (["--compare", "MODEL", "ABSENT", "--task", "a=TASK"], "ABSENT"),
    ],
)
def test_bad_arguments_are_refused_before_weights_are_read(
    arguments: list[str], message: str, files: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_params", None)
    places = {"MODEL": files / "model", "TASK": files / "arc.jsonl", "TEXT": files / "prose.txt"}
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    status, _, error = run(*arguments)
    assert status == 2 and message in error
