"""Tasks of lm-evaluation-harness with data on disk, and the small model that they are asked of.

    from harness_tasks import fixtures

    model, lm, only_local_tasks = fixtures()
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from models import english, write_with_tokenizer

from llamapro_jax.evaluation import harness
from llamapro_jax.evaluation.harness_model import HarnessModel
from llamapro_jax.model.api import Model, load

LENGTH = 64

CHOICE = """\
output_type: multiple_choice
test_split: test
training_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ANSWER = """\
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


def write_task(
    directory: Path, name: str, settings: str, documents: Iterable[dict[str, Any]]
) -> Path:
    """A task whose data is a JSONL file beside it. Returns the directory."""
    directory.mkdir(exist_ok=True)
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (directory / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n{settings}"
    )
    return directory


def questions(count: int = 6) -> list[dict[str, Any]]:
    choices = ["cat", "green trees near water", "birds sang"]
    return [
        {"question": english(i, 6).strip(), "choices": choices, "answer": i % 3}
        for i in range(count)
    ]


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def log_p(model: Model, context: list[int], answer: list[int]) -> float:
    """By the whole forward pass, in float64 after the logits."""
    row = (context + answer)[:-1]
    # Padding after a token does not change its scores; one length compiles once.
    scores = np.asarray(model.logits([row + [0] * (LENGTH - len(row))]), np.float64)[0]
    after = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    places = range(len(context) - 1, len(context) + len(answer) - 1)
    return float(sum(after[at, token] for at, token in zip(places, answer, strict=True)))


def fixtures() -> tuple[Any, Any, Any]:
    """The fixtures `model`, `lm` and `only_local_tasks` (of all tests) of a module."""

    @pytest.fixture(scope="module")
    def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
        directory = tmp_path_factory.mktemp("model")
        return load(str(write_with_tokenizer(directory, num_hidden_layers=1)))

    @pytest.fixture(scope="module")
    def lm(model: Model) -> HarnessModel:
        return HarnessModel(model, batch_size=4)

    @pytest.fixture(autouse=True)
    def only_local_tasks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """The harness's own 14,000 tasks take seconds to index."""
        if "slow" not in request.keywords:
            local = lambda path: TaskManager(include_path=path, include_defaults=False)  # noqa: E731
            monkeypatch.setattr(harness, "_all_tasks", local)

    return model, lm, only_local_tasks
