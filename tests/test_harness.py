"""Tasks of lm-evaluation-harness on our models, from data on disk, and the suites of them."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_torch
from models import disturbed, english, expand_to, write_with_tokenizer

from llamapro_jax import UserError
from llamapro_jax.evaluation import harness
from llamapro_jax.evaluation.published import published
from llamapro_jax.evaluation.suite import SuiteConfig, SuiteTask, load_suite
from llamapro_jax.expansion import spread
from llamapro_jax.hf.tokenizer import train_tokenizer
from llamapro_jax.model.api import Model, load

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from llamapro_jax.evaluation.harness_model import Generation, HarnessModel  # noqa: E402

PAPER = Path(__file__).resolve().parent.parent / "configs" / "evaluate_llama_pro.yaml"
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


# ------------------------------------------------------------------- against transformers

PAIRS = [
    ("the cat", " sat on a mat"),
    ("the cat ", "sat"),
    (" the cat", " birds"),
    ("", "the cat sat"),
    ("  two  spaces", "   three"),
    ("trees\n", "\n"),
    ("def f():\n", "    return 1"),
    ("water</s>", " trees"),
    ("<s>the cat", " sat"),
    ("x = {", "'é': 日本}"),
    (english(5, 150), english(6, 8)),
]


def test_log_likelihoods_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_tokenizer([english(0)], 300, tmp_path)
    peer = write_torch(tmp_path, vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    encode = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).encode
    lm = HarnessModel(load(str(tmp_path)), batch_size=4)
    values = lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)

    def ids(text: str) -> list[int]:
        found = encode(text, add_special_tokens=False)
        return found if found[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *found]

    for (context, answer), (value, greedy) in zip(PAIRS, values, strict=True):
        # Spaces at the end of a context belong to the answer, as the harness has it.
        prefix = ids(context.rstrip(" ") if context.endswith(" ") else context)
        if context.endswith("\n"):
            prefix = ids(context.rstrip())
        row = ids(context + answer)
        scored = len(row) - len(prefix)
        row = row[-(LENGTH + 1) :]
        with torch.no_grad():
            scores = peer(torch.tensor([row[:-1]])).logits[0, -scored:]
        targets = torch.tensor(row[-scored:])
        expected = torch.log_softmax(scores, -1)[torch.arange(scored), targets].sum()
        assert value == pytest.approx(float(expected), abs=1e-4), (context, answer)
        assert greedy == bool((scores.argmax(-1) == targets).all())


def test_what_greedy_decoding_gives_is_greedy(model: Model, lm: HarnessModel) -> None:
    tokenizer = model.require_tokenizer()
    prompts = [tokenizer.encode(english(i, 5)) for i in range(4)]
    made = [(prompt, model.generate(prompt, max_tokens=3)) for prompt in prompts]
    greedy = [(prompt, ids) for prompt, ids in made if ids]
    changed = [(prompt, [*ids[:-1], (ids[-1] + 1) % 300]) for prompt, ids in greedy]
    assert len(greedy) >= 3
    found = lm._loglikelihood_tokens([("", *pair) for pair in greedy + changed])
    assert [best for _, best in found] == [True] * len(greedy) + [False] * len(greedy)


def test_a_context_that_ends_within_a_token(model: Model, lm: HarnessModel) -> None:
    tokenizer = model.require_tokenizer()
    whole = tokenizer.encode("the cat")
    assert len(tokenizer.encode("the ca")) >= len(whole)
    expected = log_p(model, whole[:-1], whole[-1:])
    ((value, _),) = lm.loglikelihood(instances("loglikelihood", ("the ca", "t")), disable_tqdm=True)
    assert value == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="answer '' after 'the cat' adds no token"):
        lm.loglikelihood(instances("loglikelihood", ("the cat", "")), disable_tqdm=True)


def test_without_new_blocks_it_is_the_base(tmp_path: Path) -> None:
    base = write_with_tokenizer(tmp_path / "base", num_hidden_layers=1)
    grown = disturbed(load(str(expand_to(base, tmp_path / "grown", spread(1, 1)))))
    requests = instances("loglikelihood", *PAIRS[:3])

    def values(model: Model, **options: Any) -> list[tuple[float, bool]]:
        lm = HarnessModel(model, batch_size=4, **options)
        return lm.loglikelihood(requests, disable_tqdm=True)

    assert values(grown, new_blocks=False) == values(load(str(base))) != values(grown)


# ------------------------------------------------------------------- generation


def test_texts_are_those_of_generate(model: Model, lm: HarnessModel) -> None:
    prompts = ["the cat sat", "a", " green trees", english(3, 60)]
    options = [{"max_gen_toks": n, "until": []} for n in (6, 6, 4, 6)]
    made = lm.generate_until(instances("generate_until", *zip(prompts, options, strict=True)))
    ids = model.require_tokenizer().encode(prompts[3])[6 - LENGTH :]
    for prompt, option, text in zip(prompts[:3], options, made, strict=False):
        assert text == model.generate(prompt, max_tokens=option["max_gen_toks"])
    tail = model.require_tokenizer().decode(model.generate(ids, max_tokens=6))
    assert made[3].strip() == tail.strip()


def test_a_text_ends_before_a_stop(model: Model, lm: HarnessModel) -> None:
    whole = model.generate("the cat sat", max_tokens=12)
    stop = whole[4:6]
    for until in (stop, ["never", stop, ""]):
        (text,) = lm.generate_until(
            instances("generate_until", ("the cat sat", {"until": until, "max_gen_toks": 12}))
        )
        assert text == whole[: whole.index(stop)]


def test_sampled_texts_differ_and_come_again(lm: HarnessModel) -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = instances("generate_until", *[("the cat", options)] * 3)
    first = lm.generate_until(requests)
    assert len(set(first)) == 3 and lm.generate_until(requests) == first
    stop = first[0][2]
    (text,) = lm.generate_until(
        instances("generate_until", ("the cat", {**options, "until": [stop]}))
    )
    assert text == first[0][: first[0].index(stop)]


def test_what_tasks_say_of_generation(lm: HarnessModel, caplog: pytest.LogCaptureFixture) -> None:
    assert Generation.of({}) == Generation((), 256, 0.0)
    given = {"until": "\n", "max_new_tokens": 9, "do_sample": False, "temperature": 0.7}
    assert Generation.of(given) == Generation(("\n",), 9, 0.0)
    given = {"until": ["", "a"], "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert Generation.of(given) == Generation(("a",), 256, 0.7, 5, 0.9)
    assert Generation.of({"num_beams": 1}) == Generation() and not caplog.records
    options = {"num_beams": 4, "max_gen_toks": 1}
    lm.generate_until(instances("generate_until", *[("the cat", options)] * 3))
    (warning,) = caplog.records
    assert "{'num_beams': 4} have no effect" in warning.getMessage()


def test_longer_texts_than_the_model_has_positions_for(model: Model, tmp_path: Path) -> None:
    settings = ANSWER.replace("max_gen_toks: 6", "max_gen_toks: 64")
    tasks = write_task(tmp_path / "tasks", "long", settings, [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match=r"long: max_gen_toks is 64; it must be from 1 to 63"):
        harness.run_harness(model, ["long"], include_path=tasks)


# ------------------------------------------------------------------- chats

REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m['content'] }};{% endfor %}"


def test_chats(model: Model) -> None:
    lm = HarnessModel(model, template="llama_pro")
    messages = [{"role": "user", "content": "the cat"}]
    prompt = lm.apply_chat_template(messages)
    assert prompt == "<s><|user|>\nthe cat\n<|assistant|>\n"
    assert lm.tok_encode(prompt).count(model.require_tokenizer().bos_id) == 1
    opened = [*messages, {"role": "assistant", "content": "The answer is"}]
    assert lm.apply_chat_template(opened, False) == f"{prompt}The answer is"
    assert "generation" in str(lm.chat_template(True)) and lm.chat_template(False) is None
    assert lm.tokenizer_name != HarnessModel(model, template="llama_pro").tokenizer_name[:-1]


def test_a_model_without_a_template(lm: HarnessModel) -> None:
    with pytest.raises(UserError, match="has no chat template.*llama_pro"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])


def test_a_template_without_a_system_role(tmp_path: Path, caplog: Any) -> None:
    path = write_with_tokenizer(tmp_path, num_hidden_layers=1)
    (path / "chat_template.jinja").write_text(REFUSES + PLAIN)
    lm = HarnessModel(str(path))
    user, system = ({"role": role, "content": role} for role in ("user", "system"))
    assert lm.apply_chat_template([user]) == "<s>user;"
    assert lm.apply_chat_template([system, user]) == "<s>user;"
    assert "no system" in caplog.text


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


def test_the_harness_is_not_imported_before_it_is_used() -> None:
    check = (
        "import sys, llamapro_jax.evaluation.harness, llamapro_jax.evaluation.suite;"
        "sys.exit(any(m in sys.modules for m in ('lm_eval', 'jax', 'datasets', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
