"""Suites: tables of tasks with the figures that were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import english

from llamapro_jax import UserError
from llamapro_jax.evaluation import harness
from llamapro_jax.evaluation.published import published
from llamapro_jax.evaluation.suite import SuiteConfig, SuiteTask, load_suite
from llamapro_jax.model.api import Model

pytest.importorskip("lm_eval")


from harness_tasks import (  # noqa: E402
    CHOICE,
    ROLLING,
    fixtures,
    questions,
    write_task,
)

PAPER = Path(__file__).resolve().parent.parent / "configs" / "evaluate_llama_pro.yaml"

model, lm, only_local_tasks = fixtures()


# ------------------------------------------------------------------- suites


def test_a_suite_gives_a_row_for_each_task(model: Model, tmp_path: Path, caplog: Any) -> None:
    tasks = tmp_path / "tasks"
    write_task(tasks, "animals", CHOICE, questions())
    write_task(tasks, "whole", ROLLING, [{"text": english(1, 4)}])
    suite = SuiteConfig(
        (
            SuiteTask("whole", "bits_per_byte"),
            SuiteTask("animals", "acc_norm", 1, {"LLaMA 2 7B": 53.0}),
        ),
        str(tasks),
    )
    harness.check_suite(suite)
    options = {"include_path": tasks, "batch_size": 4}
    rows = harness.run_suite(model, suite, batch_size=4)
    whole = harness.run_harness(model, ["whole"], **options)["whole"]
    animals = harness.run_harness(model, ["animals"], shots=1, **options)["animals"]
    assert rows == [
        {
            "task": "whole",
            "shots": None,
            "metric": "bits_per_byte",
            "value": whole["bits_per_byte"],
            "stderr": None,
            "published": {},
        },
        {
            "task": "animals",
            "shots": 1,
            "metric": "acc_norm",
            "value": animals["acc_norm"],
            "stderr": animals["acc_norm_stderr"],
            "published": {"LLaMA 2 7B": 53.0},
        },
    ]
    (row,) = harness.run_suite(model, SuiteConfig((SuiteTask("whole", "acc"),), str(tasks)))
    assert row["value"] is None and "whole: has no acc, but word_perplexity" in caplog.text


def test_a_suite_with_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "include_path: nowhere\ntasks:\n  - {name: a, metric: acc, shots: -1}\n"
        "  - {name: a, metric: acc, published: {us: 101}}\n"
    )
    with pytest.raises(UserError) as error:
        load_suite(path)
    for message in (
        "suite.yaml:1: include_path: 'nowhere' is not a directory",
        "suite.yaml:3: tasks.0.shots: is -1",
        "suite.yaml:4: tasks.1.published.us: is 101.0",
        "suite.yaml:4: tasks.1.name: 'a' is given twice",
    ):
        assert message in str(error.value)
    path.write_text("tasks: []\n")
    with pytest.raises(UserError, match="tasks: is empty"):
        load_suite(path)


def test_the_suite_of_the_paper() -> None:
    suite = load_suite(PAPER)
    shots = {task.name: task.shots for task in suite.tasks}
    assert shots == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "humaneval": 0,
        "mbpp": 3,
    }
    for task in suite.tasks:
        figures = dict(task.published or {})
        assert published(task.name, task.metric).items() <= figures.items()
        assert len(figures) == (3 if task.name == "mbpp" else 5)


@pytest.mark.slow
def test_the_tasks_of_the_paper_are_in_the_harness() -> None:
    suite = load_suite(PAPER)
    names = [task.name for task in suite.tasks]
    manager = harness._manager(names, None)
    unsafe = [name for task in names for name in harness._unsafe(manager, task)]
    assert unsafe == ["humaneval", "mbpp"]
    with pytest.raises(UserError, match="humaneval, mbpp: executes the code"):
        harness.check_suite(suite)
    with pytest.raises(UserError, match="arc_challenge: its data cannot be read"):
        harness.check_harness(["arc_challenge"])
    with pytest.raises(UserError, match="Did you mean 'hellaswag'"):
        harness.check_harness(["helaswag"])
    for task in suite.tasks:
        config = manager.task_index[task.name].cfg
        metrics = [one["metric"] for one in config.get("metric_list", [])]
        metrics += [one["metric"] for one in config.get("aggregate_metric_list", [])]
        filters = [one["name"] for one in config.get("filter_list", [])] or ["none"]
        metric, _, filtered = task.metric.partition(",")
        # A metric that is a function goes by the name of the function, or by what it returns.
        assert metric in metrics or any(str(m).startswith("/") for m in metrics)
        assert (filtered or "none") in filters
