"""Questions from JSONL files in lm-evaluation-harness's field names: `docs/evaluation.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.evaluation.comparison import Setting
from llamapro_jax.evaluation.scoring import generate_until, loglikelihoods
from llamapro_jax.evaluation.tasks.choices import Question, accuracies, is_choice, question
from llamapro_jax.evaluation.tasks.generation import (
    MAX_TOKENS,
    UNTIL,
    Problem,
    exact_matches,
    problem,
)
from llamapro_jax.evaluation.tasks.records import read_records
from llamapro_jax.hf.tokenizer import Tokenizer
from llamapro_jax.model.api import OpenedModel

BETWEEN_EXAMPLES = "\n\n"


@dataclass(frozen=True)
class Task:
    """A file of questions, all of one kind, and the examples that stand before each."""

    name: str
    items: Sequence[Question] | Sequence[Problem]
    examples: Mapping[str, Sequence[Question | Problem]]
    shots: int = 0

    def before(self, item: Question | Problem) -> str:
        """What stands before the item's own context."""
        shown = [example.shown + BETWEEN_EXAMPLES for example in self.examples.get(item.group, ())]
        return item.introduction + "".join(shown)


def read_task(
    name: str,
    path: str | Path,
    *,
    shots: int = 0,
    shots_from: str | Path | None = None,
    limit: int | None = None,
) -> Task:
    """The task at `path`.

    shots: so many examples stand before each question, the first ones of `shots_from`, or of `path`
    itself, where they are not asked then; of MMLU's subjects, the first ones of the same subject.
    limit: the first so many questions.

    Raises:
      UserError: a file or a line that cannot be read, lines of two kinds, fewer examples than
        `shots`, no question left, a value out of range.
    """
    if shots < 0:
        raise UserError(f"shots is {shots}; it must be 0 or more.")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1.")
    items = _read(path)
    examples: dict[str, Sequence[Any]] = {}
    if shots:
        source = items if shots_from is None else _read(shots_from, like=items[0])
        place = path if shots_from is None else shots_from
        for group in dict.fromkeys(item.group for item in items):
            examples[group] = [item for item in source if item.group == group][:shots]
            if len(examples[group]) < shots:
                of_group = f" about {group!r}" if group else ""
                raise UserError(
                    f"{place}: has {len(examples[group])} questions{of_group}, fewer than the "
                    f"{shots} of --shots."
                )
        if shots_from is None:
            used = {example.where for group in examples.values() for example in group}
            items = [item for item in items if item.where not in used]
    if not items:
        raise UserError(
            f"{path}: all its questions are examples of --shots; take fewer, or take them from "
            f"another file with --shots-from {name}=PATH."
        )
    return Task(name, items[:limit], examples, shots)


def _read(path: str | Path, like: Question | Problem | None = None) -> list[Any]:
    records = read_records(path)
    choice = is_choice(records[0]) if like is None else isinstance(like, Question)
    if not choice and not records[0].has("question", "answer"):
        raise UserError(
            f"{records[0].where}: has no field 'choices' or 'endings', nor both 'question' and "
            f"'answer'; it has {records[0].names}."
        )
    first = records[0].where if like is None else like.where
    for record in records:
        other = record.has("question", "answer") if choice else True
        if other and is_choice(record) != choice:
            kinds = ("multiple choice", "a problem whose answer ends in a number")
            this, that = kinds if not choice else kinds[::-1]
            raise UserError(
                f"{record.where}: is {this}, and {first} is {that}; a task is of one kind, so "
                "write each into a file of its own."
            )
    return [(question if choice else problem)(record) for record in records]


# ------------------------------------------------------------------- ids


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts, as lm-evaluation-harness has them: the begin token first, and special
    tokens in the text read as such."""
    return tokenizer.encode_batch(texts, allow_special=True)


def encode_pairs(
    tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """The ids of contexts and their continuations. The two are encoded as one text, and spaces at
    the end of the context belong to the continuation, as in lm-evaluation-harness."""
    contexts, wholes = [], []
    for context, continuation in pairs:
        contexts.append(context.rstrip())
        wholes.append(context + continuation)
    encoded = []
    ids = zip(encode(tokenizer, wholes), encode(tokenizer, contexts), strict=True)
    for whole, before in ids:
        if len(whole) <= len(before):
            # The continuation became one token with the end of the context: both are scored,
            # from where the ids differ.
            both = enumerate(zip(whole, before, strict=False))
            before = whole[: next((i for i, (a, b) in both if a != b), len(whole) - 1)]
        encoded.append((before, whole[len(before) :]))
    return encoded


@dataclass(frozen=True)
class Encoded:
    """A task in the ids of one tokenizer. requests: for each question its choices, or prompts."""

    task: Task
    requests: Sequence[Sequence[tuple[list[int], list[int]]]]
    prompts: Sequence[list[int]]
    max_tokens: int


def encode_task(model: OpenedModel, task: Task, max_tokens: int = MAX_TOKENS) -> Encoded:
    """The questions of `task` as ids of the model's tokenizer, for `measure_task`.

    max_tokens: most tokens of an answer that is written. Raises UserError for a model without a
    tokenizer or with another's, and for texts that its positions do not hold.
    """
    tokenizer, longest = model.require_tokenizer(), model.config.max_position_embeddings
    if isinstance(task.items[0], Problem):
        if not 1 <= max_tokens < longest:
            raise UserError(
                f"max_tokens is {max_tokens}; it must be from 1 to {longest - 1}, for the model "
                f"has {longest} positions for prompt and answer."
            )
        prompts = encode(tokenizer, [task.before(item) + item.context for item in task.items])
        model.check_tokens([[i for ids in prompts for i in ids]])
        return Encoded(task, [], prompts, max_tokens)
    pairs = encode_pairs(
        tokenizer,
        (
            (task.before(item) + context, continuation)
            for item in task.items
            for context, continuation in zip(item.contexts, item.continuations, strict=True)
        ),
    )
    model.check_tokens([[i for pair in pairs for ids in pair for i in ids]])
    ends = accumulate((len(item.contexts) for item in task.items), initial=0)
    requests = [pairs[start:end] for start, end in pairwise(ends)]
    for item, of_question in zip(task.items, requests, strict=True):
        most = max(len(ids) for _, ids in of_question)
        if most > longest:
            raise UserError(
                f"{item.where}: a choice has {most} tokens, more than the model's {longest} "
                "positions; remove the line."
            )
    return Encoded(task, requests, [], max_tokens)


# ------------------------------------------------------------------- the evaluation


def measure_task(
    setting: Setting, encoded: Encoded, batch_size: int = 8, progress: bool = False
) -> list[dict[str, Any]]:
    """A dict for each metric: task, model (the setting), strength, shots, metric, value (0 to 1),
    stderr (None for a single question) and count."""
    task = encoded.task
    model, new_blocks = setting.at_strength()
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "new_blocks": new_blocks,
        "progress": f"{task.name}, {setting.label}" if progress else None,
    }
    if encoded.prompts:
        texts = generate_until(
            model, encoded.prompts, max_tokens=encoded.max_tokens, until=UNTIL, **options
        )
        scores = exact_matches(task.items, texts)
    else:
        flat = [pair for of_question in encoded.requests for pair in of_question]
        log_p = [value for value, _ in loglikelihoods(model, flat, **options)]
        ends = accumulate(map(len, encoded.requests), initial=0)
        scores = accuracies(task.items, [log_p[a:b] for a, b in pairwise(ends)])
    return [
        {
            "task": task.name,
            "model": setting.label,
            "strength": setting.strength,
            "shots": task.shots,
            "metric": metric,
            "value": math.fsum(values) / len(values),
            "stderr": standard_error(values),
            "count": len(values),
        }
        for metric, values in scores.items()
    ]


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample's standard deviation; None for a single value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
