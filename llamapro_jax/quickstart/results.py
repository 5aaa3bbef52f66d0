"""What the quickstart shows: the table, the sentence that follows from it, and the checks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.data.chat import ChatTemplate
from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json
from llamapro_jax.generate import stream_tokens
from llamapro_jax.metrics import read_metrics
from llamapro_jax.model.api import load
from llamapro_jax.model.weights import Tensor, tensors
from llamapro_jax.proof import compare_logits
from llamapro_jax.quickstart.settings import DOMAINS, Places
from llamapro_jax.sources import Source, open_source
from llamapro_jax.training.run_directory import SUMMARY_FILE
from llamapro_jax.views import Until

COLUMNS = ("model", "prose perplexity", "code perplexity", "trainable parameters", "seconds")
LEAST_FALL = 0.15
ASKED = 20
LONGEST_ANSWER = 48
MOST_RISE_WITH_REPLAY = 0.5

BASE, FULL, PRO, REPLAY = "base", "full fine-tuning", "LLaMA Pro", "LLaMA Pro with replay"
HALF, OFF = "LLaMA Pro at strength 0.5", "LLaMA Pro at strength 0"


@dataclass(frozen=True)
class Row:
    """One model of the table. trainable, seconds: None where nothing more was trained.

    seconds: in training steps, without compilation and evaluation.
    """

    model: str
    prose: float
    code: float
    trainable: int | None
    seconds: float | None

    @property
    def held_out(self) -> tuple[float, float]:
        return self.prose, self.code

    def cells(self) -> list[Any]:
        return [self.model, self.prose, self.code, self.trainable, self.seconds]


@dataclass(frozen=True)
class Check:
    what: str
    found: str
    passed: bool


def perplexities(evaluation: Mapping[str, Any], strength: float | None) -> dict[str, float]:
    """Text -> perplexity, of the setting with this strength in the JSON that `evaluate` wrote.

    strength None: the model of a run without new blocks.
    """
    found = {
        result["text"]: result["perplexity"]
        for result in evaluation["results"]
        if result["strength"] == strength and result["model"] != BASE
    }
    if set(found) != set(DOMAINS) or None in found.values():
        raise UserError(f"{evaluation['model']}: its evaluation has no finite perplexities.")
    return found


def table(places: Places) -> list[Row]:
    """The rows, from what the runs and evaluations wrote."""
    names = ("pro", "replay", "full")
    evaluations = {name: read_json(places.evaluation(name)) for name in names}
    summaries = {name: read_json(places.run(name) / SUMMARY_FILE) for name in ("base", *names)}
    base_figures = {
        result["text"]: result["perplexity"]
        for result in evaluations["full"]["results"]
        if result["model"] == BASE
    }

    def row(model: str, run: str, strength: float | None, trained: bool = True) -> Row:
        figures = base_figures if run == "base" else perplexities(evaluations[run], strength)
        summary = summaries[run]
        return Row(
            model,
            *(figures[domain] for domain in DOMAINS),
            summary["parameters"]["trainable"] if trained else None,
            round(step_seconds(places.run(run)), 1) if trained else None,
        )

    return [
        row(BASE, "base", None),
        row(FULL, "full", None),
        row(PRO, "pro", 1.0),
        row(REPLAY, "replay", 1.0),
        row(HALF, "pro", 0.5, trained=False),
        row(OFF, "pro", 0.0, trained=False),
    ]


def step_seconds(run: Path) -> float:
    """Seconds spent in the steps of a run, from the rates in its log.

    What one run compiles another finds compiled, so that the whole time would not compare.
    """
    records = [record for record in read_metrics(run) if record["kind"] == "train"]
    before = [0, *(record["tokens"] for record in records)]
    return sum(
        (record["tokens"] - done) / record["tokens_per_second"]
        for record, done in zip(records, before, strict=False)
    )


def changes(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Model -> relative change against the base of its prose and its code perplexity."""
    base = rows[0]
    return {row.model: (row.prose / base.prose - 1, row.code / base.code - 1) for row in rows}


def sentence(rows: Sequence[Row]) -> str:
    """What the table shows, favourable or not."""
    change = changes(rows)

    def said(model: str) -> str:
        prose, code = change[model]
        return f"code {percent(code)} and prose {percent(prose)}"

    more, less = _order(change[PRO][1], change[FULL][1]), _order(change[PRO][0], change[FULL][0])
    learned = {1: "learned more", 0: "learned as much", -1: "learned less"}[more]
    forgot = {1: "forgot less", 0: "forgot as much", -1: "forgot more"}[less]
    joint = "but" if more * less < 0 else "and"
    replay, half = change[REPLAY], change[HALF]
    kept = [
        f"replay took prose to {percent(replay[0])} (code {percent(replay[1])})",
        f"strength 0.5 to {percent(half[0])} (code {percent(half[1])})",
    ]
    return (
        f"Against the base, the new blocks alone brought {said(PRO)}, full fine-tuning {said(FULL)}"
        f": here LLaMA Pro {learned} {joint} {forgot} than full fine-tuning; {' and '.join(kept)}; "
        "at strength 0 it is the base."
    )


def _order(ours: float, theirs: float) -> int:
    """1 when our change is the better (lower) one, -1 when theirs is, 0 when they are the same.

    Changes of perplexity within half a percent of the base's are called the same.
    """
    return 0 if abs(ours - theirs) < 0.005 else 1 if ours < theirs else -1


def percent(change: float) -> str:
    return f"{100 * change:+.1f} %"


def checks(rows: Sequence[Row], places: Places, tokens_BT: np.ndarray) -> list[Check]:
    """The promises of a quickstart. tokens_BT: held-out ids [B, T] for comparing logits."""
    change = changes(rows)
    fall, rise, rise_with_replay = -change[PRO][1], change[PRO][0], change[REPLAY][0]
    return [
        Check(
            f"code perplexity falls by at least {LEAST_FALL:.0%}",
            percent(-fall),
            fall >= LEAST_FALL,
        ),
        Check(
            "with replay prose perplexity rises at most half as much",
            f"{percent(rise_with_replay)} against {percent(rise)}",
            rise_with_replay <= MOST_RISE_WITH_REPLAY * max(rise, 0.0),
        ),
        off_is_base(places, tokens_BT),
        off_measures_as_base(rows),
        frozen_bits(places),
        reloaded(places, tokens_BT),
        answers(places),
    ]


def off_measures_as_base(rows: Sequence[Row]) -> Check:
    """What `evaluate` found at strength 0, beside what it found of the base loaded on its own."""
    base, off = (next(row for row in rows if row.model == model) for model in (BASE, OFF))
    wrong = sum(ours != theirs for ours, theirs in zip(off.held_out, base.held_out, strict=True))
    return Check(
        "evaluated at strength 0 it has the base's perplexities, to the last digit",
        f"{wrong} of {len(DOMAINS)} differ",
        wrong == 0,
    )


def off_is_base(places: Places, tokens_BT: np.ndarray) -> Check:
    """The base's tensors as a run gives them, beside the base: every float32 logit, every bit."""
    base = open_source(str(places.model("base")))
    wrong = total = 0
    for name in ("pro", "replay"):
        off = Until(open_source(str(places.run(name)), masters=True), 0)
        count, different, _ = compare_logits(base, off, tokens_BT)
        total, wrong = total + count, wrong + different
    return Check(
        "with the new blocks off the model is the base to the bit",
        f"{wrong:,} of {total:,} logits differ",
        wrong == 0,
    )


def frozen_bits(places: Places) -> Check:
    """Frozen weights while training, and the export beside the checkpoint it all began from."""
    summaries = [read_json(places.run(name) / SUMMARY_FILE) for name in ("pro", "replay")]
    changed = sum(summary["frozen_bits_changed"] for summary in summaries)
    frozen = sum(summary["frozen_bits"] for summary in summaries)
    original = open_source(str(places.model("llama")))
    exported = Until(open_source(str(places.model("exported"))), 0)
    bits = 0
    for tensor in tensors(original.config):
        count, different = differing_bits(original, exported, tensor)
        bits, changed = bits + count, changed + different
    return Check(
        "no frozen bit changed",
        f"{changed:,} of {frozen:,} in the two runs and of {bits:,} in the export",
        changed == 0,
    )


def differing_bits(first: Source, second: Source, tensor: Tensor) -> tuple[int, int]:
    """(bits, bits that differ) of one tensor of two models."""
    one, other = (np.frombuffer(m.read(tensor).tobytes(), np.uint8) for m in (first, second))
    if one.size != other.size:
        return 8 * one.size, 8 * one.size
    return 8 * one.size, int(np.bitwise_count(one ^ other).sum())


def reloaded(places: Places, tokens_BT: np.ndarray) -> Check:
    run = open_source(str(places.run("pro")), masters=True)
    export = open_source(str(places.model("exported")))
    count, different, _ = compare_logits(run, export, tokens_BT)
    return Check(
        "the export, loaded again, computes what the run computes",
        f"{different:,} of {count:,} logits differ",
        different == 0,
    )


def answers(places: Places) -> Check:
    """Questions that it was not trained on, to the tuned model as it was exported."""
    model = load(places.model("instruct"))
    template = ChatTemplate.of_tokenizer(model.require_tokenizer())
    with places.text("chat_heldout").open(encoding="utf-8") as lines:
        questions = [json.loads(line)["messages"][0] for line in islice(lines, ASKED)]
    ended = 0
    for question in questions:
        prompt = template.prompt([question])
        ids = list(stream_tokens(model, prompt, max_tokens=LONGEST_ANSWER))
        answer = model.require_tokenizer().decode(ids)
        ended += len(ids) < LONGEST_ANSWER and answer.strip() != "" and "<|" not in answer
    return Check(
        "instruction-tuned, it answers questions and stops at the end token",
        f"{ended} of {len(questions)}",
        ended == len(questions),
    )


def as_json(rows: Sequence[Row], said: str, found: Sequence[Check]) -> dict[str, Any]:
    return {
        "columns": list(COLUMNS),
        "rows": [row.cells() for row in rows],
        "sentence": said,
        "checks": [vars(check) for check in found],
    }
