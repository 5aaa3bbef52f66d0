"""What lm-evaluation-harness asks of a model: likelihoods, texts, chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_torch
from models import disturbed, english, expand_to, write_with_tokenizer

from llamapro_jax import UserError
from llamapro_jax.evaluation import harness
from llamapro_jax.expansion import spread
from llamapro_jax.hf.tokenizer import train_tokenizer
from llamapro_jax.model.api import Model, load

pytest.importorskip("lm_eval")


from harness_tasks import (  # noqa: E402
    ANSWER,
    LENGTH,
    fixtures,
    instances,
    log_p,
    write_task,
)

from llamapro_jax.evaluation.harness_model import Generation, HarnessModel  # noqa: E402

model, lm, only_local_tasks = fixtures()


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
