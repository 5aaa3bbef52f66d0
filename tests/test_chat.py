"""Chat data: records, templates, ids and masks, against strings put together by hand."""

from __future__ import annotations

import json
import logging
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from chat_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llamapro_jax.config import load_config
from llamapro_jax.data.chat import LLAMA_PRO, BadRecord, ChatTemplate, messages_of
from llamapro_jax.errors import UserError
from llamapro_jax.files import write_json
from llamapro_jax.hf.tokenizer import Tokenizer, load_tokenizer, with_template, write_tokenizer

Message = dict[str, str]

LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|header|>' + message['role'] + '<|header_end|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] }}<|turn_end|>{%- endgeneration %}
{%- else %}{{ message['content'] }}<|turn_end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|header_end|>\\n\\n' }}{% endif %}
"""
# Lines that hold only a block, as templates are often written: they leave nothing.
CHATML = """\
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
        {% generation %}
{{ message.content | trim }}{{ eos_token }}
        {%- endgeneration %}

    {% else %}
{{ '<|im_start|>' ~ message.role }}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


@pytest.fixture(scope="module", params=[sentencepiece_tokenizer, byte_level_tokenizer])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_level_tokenizer(tmp_path_factory.mktemp("byte_level"))


def turns(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in alternation."""
    made = [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]
    return ([{"role": "system", "content": system}] if system is not None else []) + made


# ------------------------------------------------------- ids and masks of the shipped template

WORDS = ["the", "def f(x):", "    return x", "\n", "\n\n", " ", "  ", "\t", "café", "😀", "你好"]
WORDS += [
    "e\u0301",
    "\u2581",
    "<s>",
    "</s>",
    "<|end|>",
    "<|turn_end|>",
    "<|user|>",
    "<|assistant|>",
]
WORDS += ["<think>", "</", "s>", "1234", "\xa0", "\u3000x", "{{ x }}", "{% raw %}", "\\n", '"']


def random_conversation(rng: random.Random) -> list[Message]:
    def content(least: int) -> str:
        text = "".join(rng.choices(WORDS, k=rng.randrange(least, 12)))
        return text if text.strip() or not least else "yes"

    exchanges = [part for _ in range(rng.randrange(1, 5)) for part in (content(0), content(1))]
    return turns(*exchanges, system=content(1) if rng.random() < 0.3 else None)


def by_hand(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Ids and mask from the strings: what comes before an answer, the answer, the end token."""
    ids, mask, before = [tokenizer.bos_id], [False], ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "assistant":
            before += "<|assistant|>\n"
            prompt = tokenizer.encode(before, bos=False)
            both = tokenizer.encode(before + content, bos=False)
            assert both[: len(prompt)] == prompt
            ids += [*both, tokenizer.eos_id]
            mask += [False] * len(prompt) + [True] * (len(both) - len(prompt) + 1)
            before = "\n"
        else:
            before += f"<|{message['role']}|>\n{content}\n"
    return ids, mask


def test_a_thousand_conversations_are_those_put_together_by_hand(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load("llama_pro", tokenizer)
    rng = random.Random(0)
    for _ in range(1000):
        messages = random_conversation(rng)
        ids, mask = template.encode(messages)
        assert (ids.tolist(), mask.tolist()) == by_hand(tokenizer, messages)
        assert ids.dtype == np.int32 and mask.dtype == np.bool_
        # No word of the data ends a turn.
        answers = sum(message["role"] == "assistant" for message in messages)
        assert (ids == tokenizer.eos_id).sum() == answers and (ids == tokenizer.bos_id).sum() == 1
        end = tokenizer.token_of(tokenizer.eos_id)
        said = [m["content"].strip() + end for m in messages if m["role"] == "assistant"]
        assert letters(tokenizer.decode(ids[mask], skip_special=False)) == letters("".join(said))


def letters(text: str) -> str:
    """Without what decoding may change: spaces, and the sign that SentencePiece has for them."""
    return re.sub("[ \u2581]", "", text)


RESERVED = "\U0010ffff\U0010fffe\U000ffffe\U000fffff"
characters = st.characters(exclude_categories=["Cs"], exclude_characters=RESERVED)
contents = st.lists(
    st.sampled_from(WORDS) | st.text(characters, max_size=3), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(st.lists(contents.map("".join), min_size=2, max_size=5), st.booleans())
def test_a_prompt_is_the_beginning_of_the_conversation(
    tokenizer: Tokenizer, parts: list[str], system: bool
) -> None:
    template = ChatTemplate.load("llama_pro", tokenizer)
    parts = parts[: len(parts) // 2 * 2]
    messages = turns(*parts, system="Be brief." if system else None)
    ids, mask = template.encode(messages)
    prompt = template.prompt(messages[:-1])
    assert ids[: len(prompt)].tolist() == prompt
    assert (
        not mask[prompt_end(template, messages) : len(prompt)].any() and mask[len(prompt) :].all()
    )


def prompt_end(template: ChatTemplate, messages: list[Message]) -> int:
    """Where the last user turn begins: after the conversation before it."""
    return len(template.encode(messages[:-2])[0]) if len(messages) > 3 else 0


# ------------------------------------------------------------- as transformers does it


@pytest.mark.parametrize("template", [LLAMA_PRO, LLAMA_3, CHATML], ids=["pro", "llama3", "chatml"])
def test_ids_and_masks_are_those_of_transformers(
    tokenizer: Tokenizer, template: str, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "template.jinja").write_text(template)
    ours = ChatTemplate.load(str(tmp_path / "template.jinja"), tokenizer)
    assert ours.text == template or template == CHATML and ours.text == "{{ bos_token }}" + CHATML
    write_tokenizer(tokenizer, tmp_path)
    with_template(tmp_path, ours.text)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rng = random.Random(1)
    special = set(tokenizer.special_tokens)
    for _ in range(60):
        messages = random_conversation(rng)
        if any(token in message["content"] for message in messages for token in special):
            continue
        for message in messages:  # an end in a cut character differs, see the next test
            message["content"] += "."
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = ours.encode(messages)
        assert ids.tolist() == found["input_ids"]
        assert mask.tolist() == [bool(value) for value in found["assistant_masks"]]
        prompt = theirs.apply_chat_template(
            messages[:-1], return_dict=True, add_generation_prompt=True
        )
        assert ours.prompt(messages[:-1]) == prompt["input_ids"]


def test_an_answer_that_ends_within_a_character_of_several_tokens_counts_whole(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    ids, mask = ChatTemplate.load(str(path), tokenizer).encode([turns("", "a \U0001f9ff")[1]])
    assert ids[0] == tokenizer.bos_id and mask[1:].all() and len(ids) >= 6


# --------------------------------------------------------------------- special tokens


def added(tokenizer: Tokenizer, directory: Path, **tokens: dict[str, bool]) -> Tokenizer:
    """The tokenizer with more special tokens."""
    engine = tokenizers.Tokenizer.from_str(tokenizer.json_text)
    engine.add_special_tokens(
        [tokenizers.AddedToken(content, **options) for content, options in tokens.items()]
    )
    write_tokenizer(tokenizer, directory)
    engine.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def test_special_tokens_of_every_kind_are_the_template_s_alone(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    kinds: dict[str, Any] = {"[ab]": {}, "]x": {}, "\u2602": {}, "<r>": {"rstrip": True}}
    tokenizer = added(tokenizer, tmp_path, **kinds, **{"<l>": {"lstrip": True}})
    path = tmp_path / "template.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}[ab]\u2602<r>  {% generation %}{{ m.content }}  <l>"
        "{% endgeneration %}{% endfor %}"
    )
    template = ChatTemplate.load(str(path), tokenizer)
    ids = tokenizer.special_tokens
    content = "x[ab]x\u2602 <r> <l>]x\u2602"
    tokens, mask = template.encode([{"role": "user", "content": content}])
    around = [tokenizer.bos_id, ids["[ab]"], ids["\u2602"], ids["<r>"]]
    assert tokens[:4].tolist() == around and tokens[-1] == ids["<l>"]
    assert set(ids.values()).isdisjoint(tokens[4:-1].tolist())
    # The white space after <r> and before <l> is part of them.
    assert tokens[4:-1].tolist() == tokenizer.encode(content, bos=False)
    assert mask.tolist() == [False] * 4 + [True] * (len(tokens) - 4)


def test_no_merge_builds_a_special_token(tmp_path: Path) -> None:
    vocabulary = {
        token: index for index, token in enumerate(["</s>", "<", "/", "s", ">", "</", "s>"])
    }
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    engine.add_special_tokens(["</s>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    for listed in (True, False):
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["merges"] = [list(m) if listed else " ".join(m) for m in merges]
        write_json(tmp_path / "tokenizer.json", content)
        tokenizer = load_tokenizer(tmp_path)
        ids, offsets = tokenizer.encode_with_offsets(tokenizer.marked(0) + "</s>")
        assert ids == [0, 5, 6] and offsets[1:] == [(3, 5), (5, 7)]
        assert tokenizer.encode("</s>") == [5, 6]
        assert tokenizer.encode("</s>", allow_special=True) == [0]


def test_added_tokens_that_are_not_special_stay_tokens(byte_level: Tokenizer) -> None:
    think = byte_level.encode("<think>", bos=False)
    assert len(think) == 1
    ids, _ = ChatTemplate.load("llama_pro", byte_level).encode(turns("hi", "<think>ok"))
    assert think[0] in ids.tolist() and ids.max() < byte_level.vocab_size


@pytest.mark.parametrize("bad", ["\ud83d", *RESERVED])
def test_what_is_no_character_is_refused(tokenizer: Tokenizer, bad: str) -> None:
    template = ChatTemplate.load("llama_pro", tokenizer)
    with pytest.raises(BadRecord, match=f"a user turn holds U\\+{ord(bad):04X}, which is no char"):
        template.encode(turns(f"a{bad}b", "c"))


def test_the_begin_token_is_first_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    generation = "{% generation %}a{{ messages[1].content }}{{ eos_token }}{% endgeneration %}"
    path = tmp_path / "template.jinja"
    for text in (generation, "{{ bos_token }}" + generation):
        path.write_text(text)
        template = ChatTemplate.load(str(path), tokenizer)
        assert template.text == "{{ bos_token }}" + generation
        assert template.encode(turns("", "x"))[0].tolist().count(tokenizer.bos_id) == 1


def test_a_template_goes_to_other_processes(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load("llama_pro", tokenizer)
    messages = turns("a</s><|end|>", "b</s><|end|>")
    ids, mask = template.encode(messages)
    again = pickle.loads(pickle.dumps(template))
    assert again.encode(messages)[0].tolist() == ids.tolist()
    assert again.tokenizer.encode("a</s><|end|>") == tokenizer.encode("a</s><|end|>")
    assert again.fingerprint == template.fingerprint


# ------------------------------------------------------------------------------ templates


def test_templates_that_cannot_be_used_say_why(byte_level: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"

    def load(text: str) -> ChatTemplate:
        path.write_text(text)
        return ChatTemplate.load(str(path), byte_level)

    words = "{% for m in messages %}{{ m.content }}{% endfor %}"
    marked = "{% generation %}" + words + "{% endgeneration %}"
    for text, message in (
        (words, r"does not say which part is the assistant's.*\{% generation %\}"),
        ("{% generation %}{% endgeneration %}" + words, "does not say which part"),
        ("{% for m in messages %}", "template.jinja cannot render.*line 1"),
        ("{{ raise_exception('no user') }}", "cannot render a question.*no user"),
        ("{{ messages.pop() }}" + marked, "cannot render a question.*"),
        ("{{ messages[0].content + none }}", "cannot render a question"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render a question"),
    ):
        with pytest.raises(UserError, match=message):
            load(text)
    with pytest.raises(UserError, match="template is 'chatml', which is no file; .*llama_pro"):
        ChatTemplate.load("chatml", byte_level)
    path.write_bytes(b"{{ messages }} \xff")
    with pytest.raises(UserError, match="template.jinja: is not UTF-8.*at byte 15"):
        ChatTemplate.load(str(path), byte_level)
    with pytest.raises(UserError, match="has no chat template.*llama_pro"):
        ChatTemplate.load("tokenizer", byte_level)
    write_json(tmp_path / "tokenizer_config.json", {})
    (tmp_path / "tokenizer.json").write_text(byte_level.json_text)
    with pytest.raises(UserError, match="names no end-of-sequence token.*llama_pro"):
        ChatTemplate.load("llama_pro", load_tokenizer(tmp_path))


def test_a_template_without_an_end_token_is_warned_of(
    byte_level: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "template.jinja").write_text(LLAMA_3.replace("<|turn_end|>{%- end", "{%- end"))
    with caplog.at_level(logging.WARNING):
        ChatTemplate.load(str(tmp_path / "template.jinja"), byte_level)
    assert "does not learn to stop" in caplog.text


def test_a_template_sees_the_tokens_and_helpers_that_transformers_gives(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    text = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% generation %}"
        "{% set within = 1 %}{{ [m.content, 'é<'] | tojson }}{{ eos_token }}{% endgeneration %}"
        "{{ 'seen' if within is defined }}{% endfor %}"
        "{{ tools }}{{ strftime_now is defined }}{{ pad_token }}"
    )
    (tmp_path / "template.jinja").write_text(text)
    ids, _ = ChatTemplate.load(str(tmp_path / "template.jinja"), byte_level).encode(turns("a", "b"))
    decoded = byte_level.decode(ids, skip_special=False)
    expected = "".join(f'["{content}", "é<"]<|end|>' for content in "ab")
    assert decoded == f"<|begin|>{expected}NoneFalse"


def test_a_tokenizer_s_own_template_is_found_written_and_kept(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(tokenizer, tmp_path / "run")
    with_template(tmp_path / "run", CHATML)
    with_template(tmp_path / "run", LLAMA_PRO)
    write_tokenizer(tmp_path / "run", tmp_path / "export")
    for directory in (tmp_path / "run", tmp_path / "export"):
        found = load_tokenizer(directory)
        assert found.fingerprint == tokenizer.fingerprint
        assert ChatTemplate.load("tokenizer", found).text == LLAMA_PRO
        config = json.loads((directory / "tokenizer_config.json").read_text())
        assert config["chat_template"] == LLAMA_PRO


def test_the_token_that_ends_an_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert ChatTemplate.load("llama_pro", tokenizer).end_id == tokenizer.eos_id
    turn_end = tokenizer.special_tokens.get("<|turn_end|>")
    for text, expected in ((LLAMA_3, turn_end), (CHATML, tokenizer.eos_id)):
        (tmp_path / "template.jinja").write_text(text)
        assert ChatTemplate.load(str(tmp_path / "template.jinja"), tokenizer).end_id == expected


# ---------------------------------------------------------------------- conversations that fit


def test_conversations_are_cut_after_an_answer(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load("llama_pro", tokenizer)
    messages = turns(*(f"number {n}" * (n % 5 + 1) for n in range(14)), system="Count.")
    wholes = {end: template.encode(messages[:end]) for end in range(3, len(messages) + 1, 2)}
    lengths = {end: len(tokens) for end, (tokens, _) in wholes.items()}
    for length in range(2, max(lengths.values()) + 3):
        fits = [end for end, size in lengths.items() if size <= length]
        found = template.fit(messages, length)
        if not fits:
            assert found is None
            continue
        assert found is not None
        tokens, mask, cut = found
        assert cut == len(messages) - fits[-1]
        assert tokens.tolist() == wholes[fits[-1]][0].tolist()
        assert mask.tolist() == wholes[fits[-1]][1].tolist() and mask[-1]
    assert template.fit(messages, lengths[3] - 1) is None


# ------------------------------------------------------------------------------------ records


def said(*pairs: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in pairs]


CONVERSATION = said(("system", "S"), ("user", "Q"), ("assistant", "A"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CONVERSATION, "id": 3},
        {"messages": [*CONVERSATION, {"role": "user", "content": "and?"}]},
        {
            "messages": None,
            "conversations": [  # SlimOrca
                {"from": "system", "value": "S", "weight": None},
                {"from": "human", "value": "Q", "weight": 0.0},
                {"from": "gpt", "value": "A", "weight": 1.0},
            ],
        },
        {
            "conversations": [  # a part of a conversation of ShareGPT
                {"from": "system", "value": "S"},
                {"from": "gpt", "value": "", "markdown": None},
                {"from": "chatgpt", "value": "before"},
                {"from": "user", "value": "Q"},
                {"from": "bing", "value": "A"},
                {"from": "human", "value": "more"},
                {"from": "human", "value": "please"},
            ]
        },
    ],
)
def test_records_with_turns(record: dict[str, Any]) -> None:
    assert messages_of(record) == CONVERSATION


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"prompt": "Q", "completion": "A"}, "Q"),
        ({"query": "Q", "response": "A", "original_question": "q", "type": "GSM_Rephrased"}, "Q"),
        ({"instruction": "Q", "output": "A"}, "Q"),
        ({"instruction": "Q", "input": "", "output": "A"}, "Q"),
        ({"instruction": "Q", "input": None, "output": "A"}, "Q"),
        ({"instruction": "Q", "input": "of this", "output": "A"}, "Q\n\nof this"),
        ({"question": "Q", "answer": "A"}, "Q"),
        ({"prompt": None, "instruction": "Q", "response": "A"}, "Q"),
        ({"prompt": "", "completion": "A"}, ""),
    ],
)
def test_records_with_a_question_and_an_answer(record: dict[str, Any], question: str) -> None:
    assert messages_of(record) == said(("user", question), ("assistant", "A"))


def test_an_empty_system_turn_is_left_out() -> None:
    record = {"messages": said(("system", " \n"), ("user", ""), ("assistant", "A"))}
    assert messages_of(record) == said(("user", ""), ("assistant", "A"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "holds no conversation.*nothing"),
    ({"text": "x"}, "holds no conversation: neither messages.*but 'text'"),
    ({"\x1b[2J": "x"}, r"but '\\x1b\[2J'"),
    ({"messages": "hello"}, "messages is of type str, not a list"),
    ({"messages": ["hello"]}, "turn 1 is of type str, not an object"),
    ({"messages": []}, "no user turn with an assistant turn after it"),
    ({"messages": said(("user", "Q"))}, "no user turn with an assistant"),
    ({"messages": said(("system", "S"), ("assistant", "A"))}, "no user turn with an assistant"),
    ({"messages": [{"role": "user", "content": None}]}, "content of turn 1 is absent"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 is of type list"),
    ({"messages": [{"content": "x"}]}, "role of turn 1 is absent"),
    ({"messages": said(("tool", "x"))}, "role of turn 1 is 'tool'; it must be one of system, us"),
    ({"conversations": [{"from": "function_call", "value": ""}]}, "from of turn 1 is 'function"),
    ({"messages": said(("user", "Q"), ("assistant", ""))}, r"an empty assistant turn \(turn 2\)"),
    (
        {"messages": said(("assistant", "x"), ("user", "Q"), ("assistant", " \n"))},
        r"an empty assistant turn \(turn 3\)",
    ),
    (
        {"messages": said(("user", "Q"), ("user", "q"), ("assistant", "A"))},
        r"two user turns in a row \(the second is turn 2\)",
    ),
    (
        {"messages": said(("user", "Q"), ("assistant", "A"), ("assistant", "B"))},
        "two assistant turns in a row",
    ),
    ({"messages": [*CONVERSATION[1:], *CONVERSATION]}, "a system turn that is not the first"),
    ({"prompt": "Q", "completion": ["A"]}, "completion is of type list, not text"),
    ({"prompt": "Q", "completion": ""}, r"an empty assistant turn \(turn 2\)"),
    ({"instruction": "Q", "input": 3, "output": "A"}, "input is of type int, not text"),
]


@pytest.mark.parametrize(("record", "why"), BAD)
def test_records_without_a_usable_conversation(record: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        messages_of(record)


# ------------------------------------------------------------------------------ the document

DOCUMENT = Path(__file__).parent.parent / "docs" / "instruction_tuning.md"


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_records_of_the_document_are_taken() -> None:
    records = [json.loads(line) for line in block("json").splitlines()]
    assert len(records) == 6
    for record in records:
        assert messages_of(record)[-1] == {"role": "assistant", "content": "4"}


def test_the_template_of_the_document_is_the_shipped_one(tokenizer: Tokenizer) -> None:
    shown = re.search(r"^  ```\n(.*?)^  ```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    end = tokenizer.token_of(tokenizer.eos_id)
    expected = "".join(line.removeprefix("  ") for line in shown[1].splitlines(keepends=True))
    ids, _ = ChatTemplate.load("llama_pro", tokenizer).encode(
        turns("2 + 2?", "4", system="Be brief.")
    )
    assert tokenizer.decode(ids) + "</s>\n" == expected and tokenizer.token_of(ids[-1]) == end


def test_the_configuration_of_the_document_is_one(tmp_path: Path) -> None:
    (tmp_path / "my_instruct.yaml").write_text(block("yaml"))
    config = load_config(tmp_path / "my_instruct.yaml")
    assert config.data.sources[0].kind == "chat" and config.trainable == ("all",)
