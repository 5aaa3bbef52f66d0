"""Multiple choice: questions from records in lm-evaluation-harness's field names, and accuracy.

Prompts and choices are made as the harness's own tasks make them (arc, hellaswag, mmlu, openbookqa,
piqa, winogrande), so that figures can be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.evaluation.tasks.records import Record, checked_text

GOLD_FIELDS = ("gold", "answer", "label", "answerKey")
CHOICE_FIELDS = ("choices", "endings")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One question. Choice i is `continuations[i]` after `contexts[i]`.

    lengths: the characters of each choice, by which the normalised accuracy divides; None where the
    choices stand in the contexts, so that all have one continuation. group: of which subject it is;
    examples come from the same one. introduction: what stands before the examples.
    """

    where: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    lengths: tuple[int, ...] | None
    group: str = ""
    introduction: str = ""

    @property
    def shown(self) -> str:
        """The question with its right answer, as an example for others."""
        return self.contexts[self.gold] + self.continuations[self.gold]


def is_choice(record: Record) -> bool:
    """Whether a record holds choices."""
    return any(map(record.has, CHOICE_FIELDS)) or _blank(record) or record.has("sol1", "sol2")


def question(record: Record) -> Question:
    """The question of a record. Raises UserError with file and line."""
    if _blank(record):
        return _winogrande(record)
    labels: list[str] | None = None
    if record.has("sol1", "sol2"):
        choices = [record.text("sol1"), record.text("sol2")]
    else:
        name = record.first(CHOICE_FIELDS)
        if isinstance(record.fields[name], dict):
            choices, labels = _labelled(record, name)
        else:
            choices = record.texts(name)
    if len(choices) < 2:
        raise UserError(f"{record.where}: has a single choice; a question needs two or more.")
    gold = _gold(record, len(choices), labels)
    if record.has("endings"):
        choices = [_hellaswag_text(choice) for choice in choices]
    prompt, introduction, group = _prompt(record, choices), "", ""
    if record.has("subject", "question") and not record.has("query"):  # as MMLU asks: by letters
        group = record.text("subject")
        subject = group.replace("_", " ")
        introduction = (
            f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        )
        choices = list(LETTERS[: len(choices)])
    return Question(
        record.where,
        (prompt,) * len(choices),
        tuple(" " + choice for choice in choices),
        gold,
        tuple(map(len, choices)),
        group,
        introduction,
    )


def _blank(record: Record) -> bool:
    return record.has("sentence", "option1", "option2")


def _winogrande(record: Record) -> Question:
    """A sentence with a blank: the rest is as likely as what fills the blank makes it."""
    before, blank, after = record.text("sentence").partition("_")
    if not blank or not after.strip():
        raise UserError(f"{record.where}: 'sentence' has no blank `_` with text after it.")
    options = (record.text("option1"), record.text("option2"))
    gold = _index(record, "answer")
    if gold not in (1, 2):
        raise UserError(f"{record.where}: 'answer' is {record.fields['answer']!r}; it is 1 or 2.")
    contexts = tuple(before + option for option in options)
    return Question(record.where, contexts, (" " + after.strip(),) * 2, gold - 1, None)


def _labelled(record: Record, name: str) -> tuple[list[str], list[str]]:
    """ARC's choices: {"text": [...], "label": [...]}."""
    value = record.fields[name]
    texts, labels = value.get("text"), value.get("label")
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise UserError(
            f"{record.where}: {name!r} must be a list of texts, or have 'text' and 'label', two "
            "lists of one length."
        )
    return [checked_text(record, f"{name}.text", text) for text in texts], list(map(str, labels))


def _prompt(record: Record, choices: Sequence[str]) -> str:
    if record.has("query"):
        return record.text("query")
    if record.has("endings"):
        return _hellaswag_text(_hellaswag_prompt(record))
    if record.has("goal"):
        return f"Question: {record.text('goal')}\nAnswer:"
    if record.has("question_stem"):
        return record.text("question_stem")
    record.first(("query", "question", "question_stem", "goal"))
    asked = record.text("question")
    if record.has("subject"):
        listed = "".join(f"{LETTERS[i]}. {choice}\n" for i, choice in enumerate(choices))
        return f"{asked.strip()}\n{listed}Answer:"
    for name in ("context", "ctx"):
        if record.fields.get(name):
            return f"{record.text(name).lstrip()}\nQuestion: {asked}\nAnswer:"
    return f"Question: {asked}\nAnswer:"


def _hellaswag_prompt(record: Record) -> str:
    if record.has("ctx_a", "ctx_b"):
        # The second part is empty in some of the data set's own lines.
        last = record.fields["ctx_b"]
        context = f"{record.text('ctx_a')} {last.capitalize() if isinstance(last, str) else ''}"
    else:
        context = record.text("ctx", "context", "question")
    activity = record.fields.get("activity_label")
    return f"{activity}: {context}" if activity else context


def _hellaswag_text(text: str) -> str:
    """Without the marks that WikiHow's pages left in the data; as the harness does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _gold(record: Record, choices: int, labels: Sequence[str] | None) -> int:
    """The index of the right choice: by its label where choices have some, else by index from 0,
    or by letter."""
    name = record.first(GOLD_FIELDS)
    value = record.fields[name]
    if labels is not None:
        if str(value).strip() not in labels:
            raise UserError(
                f"{record.where}: {name!r} is {value!r}; the labels of the choices are "
                f"{', '.join(labels)}."
            )
        return labels.index(str(value).strip())
    index = _index(record, name)
    if not 0 <= index < choices:
        raise UserError(
            f"{record.where}: {name!r} is {value!r}; there are {choices} choices, 0 to "
            f"{choices - 1} or A to {LETTERS[choices - 1]}."
        )
    return index


def _index(record: Record, name: str) -> int:
    """A number, a number as text, or a letter (A is 0)."""
    value: Any = record.fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        stripped = value.strip()
        if re.fullmatch(r"-?[0-9]+", stripped):
            return int(stripped)
        if len(stripped) == 1 and stripped.upper() in LETTERS:
            return LETTERS.index(stripped.upper())
    raise UserError(
        f"{record.where}: {name!r} is {value!r}; it must be the number of the right choice, or its "
        "letter."
    )


def accuracies(
    questions: Sequence[Question], log_p: Sequence[Sequence[float]]
) -> dict[str, list[float]]:
    """acc and acc_norm of each question, 1 or 0; the best choice is the first of equals.

    acc: the largest log-likelihood. acc_norm: the largest log-likelihood a character, which is
    lm-evaluation-harness's normalisation; left out where the choices stand in the contexts.
    """
    scores: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for one, values in zip(questions, log_p, strict=True):
        scores["acc"].append(float(np.argmax(values) == one.gold))
        if one.lengths is not None:
            best = np.argmax(np.asarray(values) / np.asarray(one.lengths, np.float64))
            scores["acc_norm"].append(float(best == one.gold))
    return {metric: values for metric, values in scores.items() if len(values) == len(questions)}
