"""Questions that the model answers in its own words, of which the last number is compared: GSM8K.

Prompt, stops, extraction and comparison are those of lm-evaluation-harness's `gsm8k`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamapro_jax.errors import UserError
from llamapro_jax.evaluation.tasks.records import Record

UNTIL = ("Question:", "</s>", "<|im_end|>")
MAX_TOKENS = 256

STRICT = "exact_match,strict-match"
FLEXIBLE = "exact_match,flexible-extract"
_NUMBER_AFTER_MARK = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (r",", r"\$", r"(?s).*#### ", r"\.$")
NOTHING = "[invalid]"


@dataclass(frozen=True)
class Problem:
    """One problem. answer: its solution, which ends in `#### 42`."""

    where: str
    context: str
    answer: str
    group: str = ""
    introduction: str = ""

    @property
    def shown(self) -> str:
        """The problem with its solution, as an example for others."""
        return f"{self.context} {self.answer}"


def problem(record: Record) -> Problem:
    """The problem of a record. Raises UserError with file and line."""
    answer = record.text("answer")
    if not _NUMBER_AFTER_MARK.search(answer):
        raise UserError(
            f"{record.where}: 'answer' does not end in a line such as `#### 42`, and there is no "
            f"field 'choices' or 'endings'; it has {record.names}."
        )
    return Problem(record.where, f"Question: {record.text('question')}\nAnswer:", answer)


def strict_answer(text: str) -> str:
    """The first number after `####`."""
    found = _NUMBER_AFTER_MARK.findall(text)
    return found[0].strip() if found else NOTHING


def flexible_answer(text: str) -> str:
    """The last number of all."""
    found = _NUMBER.findall(text)
    return next(part for part in found[-1] if part).strip() if found else NOTHING


def normalised(answer: str) -> str:
    """What is compared: without separators, dollar signs, the way to the answer, a full stop."""
    for pattern in _IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def exact_matches(problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, list[float]]:
    """For each problem, 1 or 0: strict and flexible."""
    scores: dict[str, list[float]] = {STRICT: [], FLEXIBLE: []}
    for one, text in zip(problems, texts, strict=True):
        right = normalised(one.answer)
        scores[STRICT].append(float(normalised(strict_answer(text)) == right))
        scores[FLEXIBLE].append(float(normalised(flexible_answer(text)) == right))
    return scores
