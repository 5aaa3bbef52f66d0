"""Tasks from JSONL: prompts as lm-evaluation-harness makes them, figures by hand, errors."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import disturbed, expand_to, write_with_tokenizer

from llamapro_jax import UserError
from llamapro_jax.evaluation.comparison import Setting, compare
from llamapro_jax.evaluation.scoring import loglikelihoods
from llamapro_jax.evaluation.tasks import (
    encode,
    encode_pairs,
    encode_task,
    generation,
    measure_task,
    read_task,
    standard_error,
)
from llamapro_jax.evaluation.tasks.choices import Question, accuracies
from llamapro_jax.evaluation.tasks.generation import (
    flexible_answer,
    normalised,
    problem,
    strict_answer,
)
from llamapro_jax.evaluation.tasks.records import Record
from llamapro_jax.model.api import Model, load

ARC = {
    "question": "the cat sat on a",
    "choices": {"text": ["mat", "green tree", "small bird"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
PLAIN = {"query": "small birds sang in", "choices": ["green trees", "the"], "gold": 0}
GSM = {"question": "how many birds?", "answer": "many\nbirds\n#### 1,002"}


def write(path: Path, *records: Any) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("tasks")
    base = write_with_tokenizer(path / "base", max_position_embeddings=128)
    return disturbed(load(str(expand_to(base, path / "grown"))))


# ------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("record", "context", "continuations", "gold"),
    [
        (
            ARC,
            "Question: the cat sat on a\nAnswer:",
            (" mat", " green tree", " small bird"),
            1,
        ),
        (PLAIN, "small birds sang in", (" green trees", " the"), 0),
        ({**PLAIN, "gold": "B"}, "small birds sang in", (" green trees", " the"), 1),
        (
            {"question": "who?", "context": " a cat.", "choices": ["a", "b"], "answer": 1},
            "a cat.\nQuestion: who?\nAnswer:",
            (" a", " b"),
            1,
        ),
        (
            {
                "activity_label": "Removing ice",
                "ctx_a": "A man [title] scrapes.",
                "ctx_b": "he",
                "endings": ["stops.", "goes [step] on.", "c", "d"],
                "label": "3",
            },
            "Removing ice: A man. scrapes. He",
            (" stops.", " goes on.", " c", " d"),
            3,
        ),
        (
            {"ctx": "A man", "endings": ["stops", "goes"], "label": 0},
            "A man",
            (" stops", " goes"),
            0,
        ),
        (
            {
                "question": " Which? ",
                "subject": "abstract_algebra",
                "choices": ["x", "y", "z", "u"],
                "answer": 2,
            },
            "Which?\nA. x\nB. y\nC. z\nD. u\nAnswer:",
            (" A", " B", " C", " D"),
            2,
        ),
        (
            {"goal": "To sit", "sol1": "stand", "sol2": "a mat", "label": 1},
            "Question: To sit\nAnswer:",
            (" stand", " a mat"),
            1,
        ),
        (
            {"question_stem": "The sun", "choices": ARC["choices"], "answerKey": "1"},
            "The sun",
            (" mat", " green tree", " small bird"),
            0,
        ),
    ],
)
def test_questions_are_asked_as_the_harness_asks_them(
    record: dict, context: str, continuations: tuple[str, ...], gold: int, tmp_path: Path
) -> None:
    (one,) = read_task("t", write(tmp_path / "t.jsonl", record)).items
    assert isinstance(one, Question) and one.lengths is not None
    assert set(one.contexts) == {context}
    assert (one.continuations, one.gold) == (continuations, gold)
    assert one.lengths == tuple(len(c) - 1 for c in continuations)


def test_a_sentence_with_a_blank_is_asked_by_what_follows(tmp_path: Path) -> None:
    record = {"sentence": "The cat saw _ there.", "option1": "a bird", "option2": "it"}
    (one,) = read_task("w", write(tmp_path / "w.jsonl", {**record, "answer": "2"})).items
    assert one.contexts == ("The cat saw a bird", "The cat saw it")
    assert one.continuations == (" there.", " there.") and one.gold == 1
    assert one.shown == "The cat saw it there."
    assert list(accuracies([one], [[-2.0, -1.0]])) == ["acc"]  # as in the harness
    with pytest.raises(UserError, match="w.jsonl:1: 'answer' is 0; it is 1 or 2"):
        read_task("w", write(tmp_path / "w.jsonl", {**record, "answer": 0}))


def test_prompts_are_those_of_lm_eval(tmp_path: Path) -> None:
    """Against the harness itself, on its own way from a record to the two texts."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.hellaswag.utils import preprocess
    from lm_eval.tasks.winogrande import preprocess_winogrande as theirs

    record = {"sentence": "The cat saw _ there.", "option1": "a", "option2": "b", "answer": "1"}
    (ours,) = read_task("w", write(tmp_path / "w.jsonl", record)).items
    assert list(ours.contexts) == theirs.doc_to_choice(record)
    assert ours.continuations[0] == " " + theirs.doc_to_target(record)
    assert ours.gold == theirs.doc_to_text(record)
    text = " [header] How to sit [title] Sit [substeps] down.  Rest "
    hellaswag = {"ctx": text, "endings": [text, "b"], "label": 0}
    (ours,) = read_task("h", write(tmp_path / "h.jsonl", hellaswag)).items
    assert ours.contexts[0] == preprocess(text)
    assert ours.continuations[0] == " " + preprocess(text)


@pytest.mark.parametrize(
    ("file", "record"),
    [
        ("arc/arc_easy.yaml", ARC),
        ("openbookqa/openbookqa.yaml", {**ARC, "question_stem": "The sun"}),
        ("piqa/piqa.yaml", {"goal": "To sit", "sol1": "a", "sol2": "b", "label": 1}),
        (
            "mmlu/default/_default_template_yaml",
            {"question": " Q? ", "subject": "law", "choices": ["x", "y", "z", "u"], "answer": 2},
        ),
        ("gsm8k/gsm8k.yaml", GSM),
    ],
)
def test_prompts_and_answers_are_those_of_the_tasks_of_lm_eval(
    file: str, record: dict, tmp_path: Path
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.utils import apply_template

    text = (Path(lm_eval.__file__).parent / "tasks" / file).read_text()
    task = yaml.safe_load(text.replace("!function", ""))

    def rendered(template: Any) -> Any:
        return record[template] if template in record else apply_template(template, record)

    (ours,) = read_task("t", write(tmp_path / "t.jsonl", record)).items
    if not isinstance(ours, Question):
        assert ours.context == rendered(task["doc_to_text"])
        assert ours.answer == rendered(task["doc_to_target"])
        assert list(generation.UNTIL) == task["generation_kwargs"]["until"]
        return
    assert set(ours.contexts) == {rendered(task["doc_to_text"])}
    choices = task["doc_to_choice"]
    choices = choices if isinstance(choices, list) else ast.literal_eval(rendered(choices))
    assert ours.continuations == tuple(" " + choice for choice in choices)
    assert ours.gold == int(rendered(task["doc_to_target"]))


# ------------------------------------------------------------------- examples


def test_examples_are_the_first_lines_and_are_not_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ARC, {**ARC, "answerKey": "3"}, PLAIN)
    task = read_task("t", path, shots=2)
    assert [item.where for item in task.items] == [f"{path}:3"]
    assert task.before(task.items[0]) == (
        "Question: the cat sat on a\nAnswer: green tree\n\n"
        "Question: the cat sat on a\nAnswer: small bird\n\n"
    )
    other = write(tmp_path / "other.jsonl", PLAIN, ARC)
    task = read_task("t", path, shots=1, shots_from=other, limit=2)
    assert len(task.items) == 2
    assert task.before(task.items[0]) == "small birds sang in green trees\n\n"
    with pytest.raises(UserError, match=r"other.jsonl: has 2 questions, fewer than the 3 of --sh"):
        read_task("t", path, shots=3, shots_from=other)
    with pytest.raises(UserError, match=r"all its questions are examples .* --shots-from t=PATH"):
        read_task("t", path, shots=3)


def test_examples_of_mmlu_are_of_the_same_subject(tmp_path: Path) -> None:
    def of(subject: str, question: str) -> dict:
        return {"subject": subject, "question": question, "choices": ["x", "y"], "answer": 1}

    path = write(tmp_path / "t.jsonl", of("law", "1"), of("us_law", "2"))
    dev = write(tmp_path / "dev.jsonl", of("us_law", "3"), of("law", "4"))
    task = read_task("mmlu", path, shots=1, shots_from=dev)
    assert task.before(task.items[1]) == (
        "The following are multiple choice questions (with answers) about us law.\n\n"
        "3\nA. x\nB. y\nAnswer: B\n\n"
    )
    with pytest.raises(UserError, match="has 1 questions about 'law', fewer than the 2"):
        read_task("mmlu", path, shots=2, shots_from=dev)


# ------------------------------------------------------------------- figures


def test_accuracies_by_hand() -> None:
    def one(gold: int, *choices: str) -> Question:
        continuations = tuple(" " + c for c in choices)
        return Question("w", ("q",) * len(choices), continuations, gold, tuple(map(len, choices)))

    questions = [one(0, "ab", "abcdefgh"), one(1, "ab", "abcdefgh"), one(1, "é", "f")]
    # -3 / 2 < -8 / 8: by character the longer one is better. Equals: the first.
    scores = accuracies(questions, [[-3, -8], [-3, -8], [-1, -1]])
    assert scores == {"acc": [1, 0, 0], "acc_norm": [0, 1, 0]}
    assert standard_error([1, 0, 0]) == pytest.approx(math.sqrt((2 / 9 + 1 / 9) / 2 / 3 * 2))
    assert standard_error([1]) is None


def test_standard_errors_are_those_of_lm_eval() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert standard_error(values) == pytest.approx(metrics.mean_stderr(values))


def test_a_task_is_measured_by_the_log_likelihoods_of_its_choices(
    model: Model, tmp_path: Path
) -> None:
    records = [ARC, PLAIN, {**ARC, "answerKey": "1"}, {**PLAIN, "gold": 1}]
    task = read_task("t", write(tmp_path / "t.jsonl", *records))
    encoded = encode_task(model, task)
    settings = compare(model, (1.0, 0.5, 0.0), None).settings
    rows = {s.label: measure_task(s, encoded) for s in settings}
    tokenizer = model.require_tokenizer()
    for label, options in (("new blocks on", {}), ("new blocks off", {"new_blocks": False})):
        right, right_norm = [], []
        for item in task.items:
            pairs = []
            for context, continuation in zip(item.contexts, item.continuations, strict=True):
                whole = tokenizer.encode(context + continuation)
                before = len(tokenizer.encode(context))
                pairs.append((whole[:before], whole[before:]))
            log_p = [v for v, _ in loglikelihoods(model, pairs, **options)]
            right.append(log_p.index(max(log_p)) == item.gold)
            by_length = [v / (len(c) - 1) for v, c in zip(log_p, item.continuations, strict=True)]
            right_norm.append(by_length.index(max(by_length)) == item.gold)
        acc, acc_norm = rows[label]
        assert (acc["metric"], acc_norm["metric"]) == ("acc", "acc_norm")
        assert acc["value"] == sum(right) / 4 and acc_norm["value"] == sum(right_norm) / 4
        assert acc["count"] == 4 and acc["stderr"] == pytest.approx(standard_error(right))
    assert rows["strength 0.5"][0]["strength"] == 0.5


def test_a_strength_between_is_that_of_a_model_loaded_at_it(model: Model) -> None:
    half, with_new = Setting("s", model, 0.5).at_strength()
    assert with_new and half.params["base"] is model.params["base"]
    tokens = [[1, 5, 9, 4]]
    scaled = model.params["new"][-1]["down"] * 0.5
    assert (half.params["new"][-1]["down"] == scaled).all()
    assert half.params["new"][-1]["q"] is model.params["new"][-1]["q"]
    assert (half.logits(tokens) != model.logits(tokens)).any()
    assert Setting("s", model, 0.0).at_strength() == (model, False)


def test_spaces_between_belong_to_the_continuation_as_in_lm_eval(model: Model) -> None:
    tokenizer = model.require_tokenizer()
    pairs = [("the cat  ", "sat"), ("the cat", " sat"), ("the ca", "t sat"), ("a", "\u00e9")]
    encoded = encode_pairs(tokenizer, pairs)
    assert encoded[0] == encode_pairs(tokenizer, [("the cat", "  sat")])[0]
    for (context, continuation), (before, after) in zip(pairs, encoded, strict=True):
        assert after and before[0] == tokenizer.bos_id
        whole = encode(tokenizer, [context + continuation])[0]
        assert after == whole[len(before) :]
    # "t" ends in one token with what stands before it: that token is scored whole.
    before, after = encode_pairs(tokenizer, [("the ca", "t")])[0]
    assert tokenizer.decode([*before, *after]) == "the cat" and after


# ------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 3 and\n#### 1,002.", "1,002.", "1,002."),
        ("#### 7\n\n#### 8", "7", "8"),
        ("it costs $4.50 or -3", "[invalid]", "-3"),
        ("The answer is 42.", "[invalid]", "42."),
        ("#### x", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]"),
        ("#### -5 apples", "-5", "-5"),
    ],
)
def test_answers_are_found_as_in_the_harness(text: str, strict: str, flexible: str) -> None:
    assert (strict_answer(text), flexible_answer(text)) == (strict, flexible)


def test_answers_are_found_as_the_filters_of_lm_eval_find_them() -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    strict = extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)")
    flexible = extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    texts = ["a 3, #### 12.", "$1,000 is 7", "none", "-3.5 4", "#### ...", "1.\n#### 2 and $3"]
    for ours, theirs in ((strict_answer, strict), (flexible_answer, flexible)):
        assert [ours(t) for t in texts] == theirs.apply([texts], [{}])[0]


def test_what_is_compared_is_the_number() -> None:
    assert normalised("first 3\nthen\n#### 1,002") == normalised("$1002.") == "1002"


def test_generated_answers_are_compared(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = read_task("g", write(tmp_path / "g.jsonl", GSM, GSM, GSM), shots=1)
    encoded = encode_task(model, task, max_tokens=4)
    tokenizer = model.require_tokenizer()
    prompt = "Question: how many birds?\nAnswer:"
    expected = tokenizer.encode(f"{prompt} {GSM['answer']}\n\n{prompt}")
    assert list(encoded.prompts) == [expected, expected]
    strict, flexible = measure_task(Setting("model", model), encoded)
    assert (strict["value"], strict["count"], strict["shots"]) == (0, 2, 1)
    seen = {}

    def said(model: Model, prompts: Any, **options: Any) -> list[str]:
        seen.update(options)
        return ["I think #### 1002. Or 5", "it is 1002"]

    monkeypatch.setattr("llamapro_jax.evaluation.tasks.generate_until", said)
    strict, flexible = measure_task(Setting("model", model), encoded)
    assert strict["metric"] == "exact_match,strict-match" and strict["value"] == 0.5
    assert flexible["metric"] == "exact_match,flexible-extract" and flexible["value"] == 0.5
    assert seen["max_tokens"] == 4 and "Question:" in seen["until"]


# ------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "t.jsonl: is empty"),
        (["{"], r"t.jsonl:1: is not JSON \(Expecting property name .* at column 2\)"),
        ([PLAIN, "[1]"], "t.jsonl:2: is a list, not an object"),
        (
            [{"query": "q", "answers": 1}],
            "t.jsonl:1: has no field 'choices' or 'endings', .* it has 'query', 'answers'",
        ),
        (
            [PLAIN, GSM],
            "t.jsonl:2: is a problem .* in a number, and .*t.jsonl:1 is multiple choice; .* own",
        ),
        ([GSM, PLAIN], "t.jsonl:2: is multiple choice, and .*t.jsonl:1 is a problem"),
        ([PLAIN, {"query": "q"}], "t.jsonl:2: has no field 'choices' or 'endings'; it has 'query'"),
        ([{"question": "q", "answer": "b"}], "t.jsonl:1: 'answer' does not end in .* it has 'ques"),
        ([{"choices": ["a", "b"], "gold": 0}], "no field 'query' or 'question' or .* 'choices'"),
        ([{"query": "q", "choices": ["a", "b"]}], "no field 'gold' or 'answer' or 'label' or"),
        ([{**PLAIN, "gold": 2}], "t.jsonl:1: 'gold' is 2; there are 2 choices, 0 to 1 or A to B"),
        ([{**PLAIN, "gold": -1}], "'gold' is -1"),
        ([{**PLAIN, "gold": "C"}], "'gold' is 'C'; there are 2 choices"),
        ([{**PLAIN, "gold": "trees"}], "'gold' is 'trees'; it must be the number"),
        ([{**PLAIN, "gold": True}], "'gold' is True; it must be the number"),
        ([{**ARC, "answerKey": "D"}], "'answerKey' is 'D'; the labels of the choices are 1, 2, 3"),
        ([{**ARC, "choices": {"text": ["a"]}}], "'choices' must be a list of texts, or have"),
        ([{**PLAIN, "choices": []}], r"'choices' must be a list of texts, and not empty"),
        ([{**PLAIN, "choices": ["a"]}], "has a single choice"),
        ([{**PLAIN, "choices": ["a", " "]}], r"'choices\[1\]' is empty"),
        ([{**PLAIN, "choices": ["a", 3]}], r"'choices\[1\]' is a number, not a text"),
        ([{**PLAIN, "query": None}], "'query' is null, not a text"),
        ([{**PLAIN, "query": "\ud800"}], "'query' holds half of a surrogate pair"),
    ],
)
def test_lines_that_cannot_be_asked_are_named(
    lines: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_task("t", write(tmp_path / "t.jsonl", *lines))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        read_task("t", tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        read_task("t", tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{}\n{"query": "caf\xe9"}\n')
    with pytest.raises(UserError, match="latin.jsonl:2: is not UTF-8 .* at byte 14 of the line"):
        read_task("t", tmp_path / "latin.jsonl")
    for option, message in (({"shots": -1}, "shots is -1"), ({"limit": 0}, "limit is 0")):
        with pytest.raises(UserError, match=message):
            read_task("t", write(tmp_path / "t.jsonl", PLAIN), **option)


def test_what_the_model_cannot_hold_is_refused(model: Model, tmp_path: Path) -> None:
    long = {**PLAIN, "choices": ["a", "cat " * 200]}
    task = read_task("t", write(tmp_path / "t.jsonl", PLAIN, long))
    with pytest.raises(UserError, match="t.jsonl:2: a choice has ... tokens, more than .* 128"):
        encode_task(model, task)
    task = read_task("g", write(tmp_path / "g.jsonl", GSM))
    with pytest.raises(UserError, match="max_tokens is 128; it must be from 1 to 127"):
        encode_task(model, task, max_tokens=128)


def test_problems_need_a_question() -> None:
    with pytest.raises(UserError, match="f:1: has no field 'question'; it has 'answer'"):
        problem(Record("f:1", {"answer": "#### 3"}))
