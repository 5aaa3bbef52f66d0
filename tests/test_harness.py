"""Tasks of lm-evaluation-harness on our models, from data on disk, and its own command."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import english

from llamapro_jax import UserError
from llamapro_jax.evaluation import harness
from llamapro_jax.model.api import Model

pytest.importorskip("lm_eval")

from harness_tasks import (  # noqa: E402
    ANSWER,
    CHOICE,
    LENGTH,
    ROLLING,
    fixtures,
    instances,
    log_p,
    questions,
    write_task,
)
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from llamapro_jax.evaluation.harness_model import HarnessModel  # noqa: E402

model, lm, only_local_tasks = fixtures()


# ------------------------------------------------------------------- tasks with local data


def test_multiple_choice_without_a_network(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    called: list[Any] = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *a: called.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: called.append(a))
    # Nothing may be tried, not only fail.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    documents = questions()
    tasks = write_task(tmp_path / "tasks", "animals", CHOICE, documents)
    before = os.environ.get("DISABLE_MULTIPROC"), random.getstate()
    results = harness.run_harness(model, ["animals"], include_path=tasks, batch_size=4)
    assert not called
    assert (os.environ.get("DISABLE_MULTIPROC"), random.getstate()) == before

    right, right_norm = 0, 0
    tokenizer = model.require_tokenizer()
    for document in documents:
        context = tokenizer.encode(document["question"])
        values = []
        for choice in document["choices"]:
            whole = tokenizer.encode(f"{document['question']} {choice}")
            values.append(log_p(model, context, whole[len(context) :]))
        lengths = [len(choice) for choice in document["choices"]]
        right += int(np.argmax(values)) == document["answer"]
        right_norm += int(np.argmax(np.divide(values, lengths))) == document["answer"]
    figures = results["animals"]
    assert figures["acc"] == right / len(documents)
    assert figures["acc_norm"] == right_norm / len(documents)
    assert set(figures) == {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}


def test_examples_in_the_prompt_and_a_limit(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_task(tmp_path / "tasks", "shown", CHOICE, questions())
    seen: list[str] = []

    def record(self: HarnessModel, requests: list[Instance]) -> list[tuple[float, bool]]:
        seen.extend(request.args[0] for request in requests)
        return [(0.0, True) for _ in requests]

    monkeypatch.setattr(HarnessModel, "loglikelihood", record)
    options = {"include_path": tasks, "limit": 2}
    harness.run_harness(model, ["shown"], shots=2, **options)
    assert len(seen) == 2 * 3 and all(prompt.count("\n\n") == 2 for prompt in seen)
    seen.clear()
    harness.run_harness(model, ["shown"], **options)
    assert all("\n\n" not in prompt for prompt in seen)
    # A task that says 0 keeps it, as under lm_eval.
    (tasks / "shown.yaml").write_text((tasks / "shown.yaml").read_text() + "num_fewshot: 0\n")
    seen.clear()
    harness.run_harness(model, ["shown"], shots=2, **options)
    assert all("\n\n" not in prompt for prompt in seen)


def test_generated_answers(model: Model, tmp_path: Path) -> None:
    prompts = [english(i, 5).strip() for i in range(4)]
    answers = [model.generate(prompt, max_tokens=6) for prompt in prompts]
    documents = [
        {"question": prompt, "answer": answer if i else "another"}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    tasks = write_task(tmp_path / "tasks", "goes_on", ANSWER, documents)
    results = harness.run_harness(model, ["goes_on"], include_path=tasks, batch_size=4)
    assert results["goes_on"]["exact_match"] == 0.75


def rolling_by_hand(model: Model, text: str) -> float:
    """Each token once; those of the last window after all the tokens that fit."""
    tokenizer = model.require_tokenizer()
    tokens, total = tokenizer.encode(text, bos=False), 0.0
    for start in range(0, len(tokens), LENGTH):
        end = min(start + LENGTH, len(tokens))
        row = [tokenizer.bos_id, *tokens][max(end - LENGTH, 0) : end + 1]
        scored = end - start
        total += log_p(model, row[:-scored], row[-scored:])
    return total


def test_texts_longer_than_the_model(model: Model, tmp_path: Path) -> None:
    texts = [english(1, 4).strip(), english(2, 150).strip()]
    assert len(model.require_tokenizer().encode(texts[1])) > 2 * LENGTH
    documents = [{"text": text} for text in texts]
    tasks = write_task(tmp_path / "tasks", "whole", ROLLING, documents)
    figures = harness.run_harness(model, ["whole"], include_path=tasks, batch_size=4)["whole"]
    total = sum(rolling_by_hand(model, text) for text in texts)
    size, words = (sum(map(count, texts)) for count in (len, lambda t: len(t.split())))
    assert figures["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert math.log(figures["word_perplexity"]) == pytest.approx(-total / words, rel=1e-5)


def test_a_text_without_words_has_nothing_to_predict(lm: HarnessModel) -> None:
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0.0]


def test_groups_and_tags(model: Model, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    for name in ("one", "two"):
        write_task(tasks, name, CHOICE + "tag: pair\n", questions(2))
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [one, two]\n"
        "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    (tasks / "loose.yaml").write_text("group: loose\ntask: [one, two]\n")
    options = {"include_path": tasks, "batch_size": 4}
    single = harness.run_harness(model, ["one"], **options)["one"]
    grouped = harness.run_harness(model, ["both"], **options)
    assert list(grouped) == ["both"] and grouped["both"]["acc"] == single["acc"]
    assert harness.run_harness(model, ["pair"], **options) == {"one": single, "two": single}
    assert harness.run_harness(model, ["loose"], **options) == {"one": single, "two": single}
    with pytest.raises(UserError, match="both: its task one is asked for twice"):
        harness.check_harness(["one", "both"], tasks)
    by_path = harness.run_harness(model, [str(tasks / "two.yaml")], batch_size=4)
    assert by_path == {"two": single}


# ------------------------------------------------------------------- under lm_eval's own command


def test_the_registered_name(model: Model) -> None:
    arguments = f"pretrained={model.source.path},max_length=32,dtype=bfloat16"
    # As the command does, which names a device that is not there.
    given = {"batch_size": "2", "max_batch_size": None, "device": "cuda:0"}
    made = get_model("llamapro").create_from_arg_string(arguments, given)
    assert isinstance(made, HarnessModel)
    assert (made.max_length, made.batch_size, made.model.dtype) == (32, 2, "bfloat16")
    assert made.eot_token_id == 2 and made.prefix_token_id == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtpye": "bfloat16"}, "'dtpye' is no option of this model. Did you mean 'dtype'"),
        ({"batch_size": "auto"}, "batch_size is 'auto'; it must be a number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 65}, "max_length is 65; this model takes 1 to 64"),
        ({"dtype": "float32"}, "dtype: the model is loaded already"),
    ],
)
def test_options_that_cannot_be(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HarnessModel(model, **options)


# Without the harness's own tasks, whose index takes longer than all the rest.
COMMAND = """
from lm_eval.tasks._index import TaskIndex
from llamapro_jax.evaluation import harness
build = TaskIndex.build
own = lambda paths: [path for path in paths if path.parent.name != "lm_eval"]
TaskIndex.build = staticmethod(lambda paths: build(own(paths)))
harness.main()
"""


@pytest.mark.slow
def test_the_command_of_lm_eval(model: Model, tmp_path: Path) -> None:
    tasks = write_task(tmp_path / "tasks", "animals", CHOICE, questions())
    expected = harness.run_harness(model, ["animals"], include_path=tasks)["animals"]
    command = [sys.executable, "-c", COMMAND, "--model", "llamapro", "--tasks", "animals"]
    command += ["--model_args", f"pretrained={model.source.path}"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["animals"]
    assert {key: found[f"{key},none"] for key in expected} == pytest.approx(expected)


def test_the_command_ends_with_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("no model there")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    with pytest.raises(SystemExit) as stop:
        harness.main()
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no model there\n"


# ------------------------------------------------------------------- what can be wrong


def test_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'llamapro_jax\[eval\]'"):
        harness.check_harness(["arc_challenge"])


def broken_yaml(tasks: Path) -> None:
    (tasks / "broken.yaml").write_text("task: [broken\n")


def no_data(tasks: Path) -> None:
    (tasks / "gone.jsonl").unlink()


def on_the_hub(tasks: Path) -> None:
    (tasks / "gone.yaml").write_text(f"task: gone\ndataset_path: no/such\n{CHOICE}")


def no_package(tasks: Path) -> None:
    (tasks / "needs.py").write_text("import not_installed\n")
    text = (tasks / "gone.yaml").read_text()
    (tasks / "gone.yaml").write_text(text + "process_results: !function needs.anything\n")


def bad_filter(tasks: Path) -> None:
    (tasks / "gone.yaml").write_text((tasks / "gone.yaml").read_text() + "filter_list: [{name: a}]")


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (None, [], "no task to evaluate on"),
        (None, ["gome"], "gome: is no task of lm-evaluation-harness.*Did you mean 'gone'"),
        (broken_yaml, ["broken"], r"broken.yaml: cannot be read \(ParserError"),
        (no_data, ["gone"], "gone: its data cannot be read.*dataset_kwargs.data_files"),
        (on_the_hub, ["gone"], "gone: its data cannot be read.*no/such.*allow the network"),
        (no_package, ["gone"], "gone: needs a package that is not here.*'not_installed'"),
        (bad_filter, ["gone"], r"gone: cannot be made \(KeyError: 'filter'"),
    ],
)
def test_tasks_that_cannot_be_run(
    change: Callable[[Path], None] | None, names: list[str], message: str, tmp_path: Path
) -> None:
    tasks = write_task(tmp_path / "tasks", "gone", CHOICE, questions(2))
    if change is not None:
        change(tasks)
    with pytest.raises(UserError, match=message):
        harness.check_harness(names, tasks)


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tasks: is not a directory"):
        harness.check_harness(["a"], tmp_path / "tasks")


@pytest.mark.parametrize("asked", ["runs", "some", "all", "within", "as_written"])
def test_code_is_executed_only_when_allowed(asked: str, tmp_path: Path) -> None:
    tasks = write_task(
        tmp_path / "tasks", "runs", ANSWER + "unsafe_code: true\ntag: some\n", [{"question": "a"}]
    )
    # Were it read, its Python would run: it must be refused before that.
    text = (tasks / "runs.yaml").read_text()
    (tasks / "mark.py").write_text("raise SystemExit('the task was read')\n")
    (tasks / "runs.yaml").write_text(text + "process_results: !function mark.anything\n")
    (tasks / "all.yaml").write_text("group: all\ntask: [{task: runs, num_fewshot: 1}]\n")
    (tasks / "within.yaml").write_text("group: within\ntask: [{group: inner, task: [runs]}]\n")
    name = str(tasks / "runs.yaml") if asked == "as_written" else asked
    with pytest.raises(UserError, match="executes the code.*--allow-code-execution"):
        harness.check_harness([name], tasks)
    with pytest.raises(SystemExit, match="the task was read"):
        harness.check_harness([name], tasks, allow_code=True)


@pytest.mark.parametrize("options", [{"shots": -1}, {"limit": 0}])
def test_counts_out_of_range(model: Model, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} is"):
        harness.run_harness(model, ["any"], **options)


def test_the_harness_is_not_imported_before_it_is_used() -> None:
    check = (
        "import sys, llamapro_jax.evaluation.harness, llamapro_jax.evaluation.suite;"
        "sys.exit(any(m in sys.modules for m in ('lm_eval', 'jax', 'datasets', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
