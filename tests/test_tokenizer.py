from __future__ import annotations

import inspect
import json
import random
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llamapro_jax.errors import UserError
from llamapro_jax.hf import sentencepiece_model
from llamapro_jax.hf.tokenizer import (
    TOKENIZER_FILES,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
    write_tokenizer,
)

TEXTS = [inspect.getsource(module) for module in (random, json.decoder, inspect)]
TEXTS += ["naïve café — “quoted”\n" * 50]
VOCAB = 1200

FRAGMENTS = ["a", "ab", "def ", "return", " ", "  ", "    ", "\n", "\n\n", "\t", "\r", "é", "你"]
FRAGMENTS += ["e\u0301", "😀", "👨\u200d👩", "\u2581", "<s>", "</s>", "</", "s>", "<unk>", "<0x0A>"]
FRAGMENTS += ["\0", "\u200b", "\xa0", "\ufeff", "\u3000", "1", "2024", ".", "==", "—", "naïve"]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=20).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    train_tokenizer(TEXTS, VOCAB, directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(trained)


@pytest.fixture(scope="module")
def reference(trained):
    return sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))


@pytest.fixture
def model_only(trained, tmp_path):
    """A directory with nothing but tokenizer.model, as LLaMA-Pro-8B's is."""
    directory = tmp_path / "model_only"
    directory.mkdir()
    shutil.copy(trained / "tokenizer.model", directory)
    return directory


def write(directory, name, value):
    (directory / name).write_text(json.dumps(value), encoding="utf-8")


def test_ids_are_sentencepieces_on_thousands_of_lines(tokenizer, reference):
    modules = (random, json, inspect, pytest, shutil, sentencepiece)
    lines = [line for module in modules for line in inspect.getsource(module).split("\n")]
    lines += [" " * n + "x" + " " * n for n in range(40)] + ["", " ", "\n", "\n\n  \n", "\t"]
    lines += TEXTS
    assert len(lines) > 3000
    assert tokenizer.encode_batch(lines, bos=False) == reference.encode(lines)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(lines)] == lines


@settings(max_examples=500, deadline=None)
@given(texts)
def test_ids_are_sentencepieces_on_any_text(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == [1, *reference.encode(text)]
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_ids_are_sentencepieces_where_a_piece_has_many_splits(tmp_path):
    rng = random.Random(0)
    words = ["a", "b", "ab", "aab", "aa", " "]
    texts = ["".join(rng.choices(words, k=30)) for _ in range(2000)]
    tokenizer = train_tokenizer(texts, 400, tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = ["".join(rng.choices("ab ", k=rng.randrange(50))) for _ in range(3000)]
    assert tokenizer.encode_batch(texts, bos=False) == reference.encode(texts)


def test_training_gives_llamas_layout_and_the_same_bytes_again(trained, tokenizer, tmp_path):
    train_tokenizer(iter(TEXTS), VOCAB, tmp_path / "again")
    written = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert written == {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()}
    assert set(written) < set(TOKENIZER_FILES)
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert [tokenizer.token_of(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (TEXTS, 259, "vocab_size=259"),
        (["tiny"], 5000, "vocab_size=5000.*more text"),
        (["", "\n"], 400, "every text is empty"),
    ],
)
def test_training_refuses_what_cannot_work(texts, size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, size, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_reads_a_long_line_too(tmp_path):
    tokenizer = train_tokenizer([*TEXTS, "zqzq" * 5000], VOCAB, tmp_path)
    assert "zqzq" in map(tokenizer.token_of, range(tokenizer.vocab_size))


def test_bos_and_eos_are_added_once(tokenizer):
    plain = tokenizer.encode("Hello", bos=False)
    assert tokenizer.encode("Hello", eos=True) == [1, *plain, 2]
    assert tokenizer.encode("<s>Hello", allow_special=True) == [1, *plain]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode_batch(["Hello", ""], bos=True, eos=True) == [[1, *plain, 2], [1, 2]]


def test_no_merge_builds_a_control_token():
    kinds = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        *((piece, 1) for piece in ("</", "s>", *"</s>")),
    ]
    model = sentencepiece_model.SentencePieceModel(
        pieces=tuple((piece, -float(i), kind) for i, (piece, kind) in enumerate(kinds)),
        byte_fallback=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=None,
    )
    assert sentencepiece_model.merges_from_scores(model) == [("<", "/"), ("s", ">")]


def test_special_tokens_in_text_are_characters_unless_allowed(tokenizer):
    ids = tokenizer.encode("a</s>b<s>", bos=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a</s>b<s>"
    allowed = tokenizer.encode("a</s>b<s>", bos=False, allow_special=True)
    assert allowed.count(2) == 1 and allowed[-1] == 1
    assert tokenizer.decode(allowed) == "a b"
    assert tokenizer.decode(allowed, skip_special=False) == "a</s> b<s>"
    assert tokenizer.encode("a</s>b<s>", bos=False) == ids  # asking once leaves no trace


@settings(max_examples=200, deadline=None)
@given(st.lists(texts, max_size=4), st.booleans())
def test_streamed_pieces_join_to_the_decoded_text(tokenizer, parts, skip_special):
    ids = [i for part in parts for i in tokenizer.encode(part, eos=True)]
    stream = tokenizer.stream_decoder(skip_special=skip_special)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)


def test_streaming_waits_for_whole_characters_and_flushes_the_rest(tokenizer):
    ids = tokenizer.encode("a 😀 b", bos=False)
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(i) for i in ids]
    assert "😀" in pieces and not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == "a" and pieces[-1] == " b"
    face = [i for i in ids if (tokenizer.token_of(i) or "").startswith("<0x")]
    assert len(face) == 4
    cut = tokenizer.stream_decoder()
    assert [cut.push(i) for i in face[:2]] == ["", ""]
    assert set(cut.flush()) == {"\ufffd"}


def test_a_json_file_is_used_and_written_verbatim(trained, tmp_path):
    content = json.loads((trained / "tokenizer.json").read_text("utf-8"))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    source = tmp_path / "source"
    source.mkdir()
    raw = json.dumps(content, indent=1).replace("\n", "\r\n").encode()
    (source / "tokenizer.json").write_bytes(raw)
    tokenizer = load_tokenizer(source)
    assert len(tokenizer.encode("a text that is longer than four tokens")) > 6
    write_tokenizer(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == raw


def test_fingerprint_follows_the_ids_alone(trained, tokenizer, model_only, tmp_path):
    assert load_tokenizer(model_only).fingerprint == tokenizer.fingerprint
    write(model_only, "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert load_tokenizer(model_only).fingerprint == tokenizer.fingerprint
    write(model_only, "tokenizer_config.json", {"eos_token": "<s>"})
    assert load_tokenizer(model_only).fingerprint != tokenizer.fingerprint
    write(model_only, "tokenizer_config.json", {})
    write(model_only, "added_tokens.json", {"<pad>": VOCAB})
    assert load_tokenizer(model_only).fingerprint != tokenizer.fingerprint
    content = json.loads((trained / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = [m.split(" ") for m in content["model"]["merges"]]
    write(tmp_path, "tokenizer.json", content)
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_special_tokens_are_found_wherever_models_name_them(trained, tmp_path):
    def ids(**files):
        directory = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        shutil.copy(trained / "tokenizer.json", directory)
        for name, value in files.items():
            write(directory, f"{name}.json", value)
        tokenizer = load_tokenizer(directory)
        return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id

    as_object = {"content": "</s>", "lstrip": False, "__type": "AddedToken"}
    config = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": -1}
    assert ids() == (None, None, None)
    assert ids(tokenizer_config={"bos_token": "<s>", "eos_token": as_object}) == (1, 2, None)
    assert ids(special_tokens_map={"bos_token": "<s>", "pad_token": as_object}) == (1, None, 2)
    assert ids(config=config) == (1, 2, None)
    assert ids(config={"eos_token_id": VOCAB + 5}) == (None, None, None)
    # What tokenizer_config.json says goes first, also that there is none.
    assert ids(tokenizer_config={"bos_token": None, "eos_token": "<s>"}, config=config)[:2] == (
        None,
        1,
    )


def test_tokens_added_to_a_sentencepiece_model(model_only):
    write(model_only, "added_tokens.json", {"<pad>": VOCAB, "<|user|>": VOCAB + 1})
    write(model_only, "special_tokens_map.json", {"pad_token": "<pad>"})
    entry = {"content": "<|end|>", "special": True, "normalized": False}
    write(model_only, "tokenizer_config.json", {"added_tokens_decoder": {str(VOCAB + 2): entry}})
    tokenizer = load_tokenizer(model_only)
    assert tokenizer.vocab_size == VOCAB + 3 and tokenizer.pad_id == VOCAB
    assert set(tokenizer.special_tokens) == {"<unk>", "<s>", "</s>", "<pad>", "<|end|>"}
    assert VOCAB + 1 in tokenizer.encode("x<|user|>y")  # not special: always a token
    assert VOCAB + 2 not in tokenizer.encode("x<|end|>")
    assert VOCAB + 2 in tokenizer.encode("x<|end|>", allow_special=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("added_tokens.json", {"<pad>": VOCAB + 4}, "must follow the 1200 pieces"),
        ("added_tokens.json", {"<pad>": 7}, "'<pad>' has id 7"),
        ("added_tokens.json", {"</s>": VOCAB}, "'</s>' has id 1200"),
        ("tokenizer_config.json", {"eos_token": "<end>"}, "eos_token is '<end>'.*added_tokens"),
        ("tokenizer_config.json", ["eos"], "tokenizer_config.json: holds a list"),
    ],
)
def test_files_that_contradict_each_other_are_refused(model_only, name, value, message):
    write(model_only, name, value)
    with pytest.raises(UserError, match=message):
        load_tokenizer(model_only)


def test_no_tokenizer_names_the_directory_the_files_and_the_mend(tmp_path):
    write(tmp_path, "tokenizer_config.json", {})
    assert not find_tokenizer(tmp_path)
    with pytest.raises(UserError, match="tokenizer.json and tokenizer.model") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "Copy" in str(error.value)


def test_files_that_are_no_tokenizer_are_refused(trained, tmp_path):
    data = (trained / "tokenizer.model").read_bytes()
    # A protocol buffer cut in a piece, a Git LFS pointer, the tiktoken file of LLaMA 3.
    for content in (data[:1001], b"version https://git-lfs.github.com/spec/v1\n", b"IQ== 0\n", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="is not a SentencePiece model"):
            load_tokenizer(tmp_path)
    write(tmp_path, "tokenizer.json", {"version": "1.0"})
    with pytest.raises(UserError, match="tokenizer.json: cannot be read by tokenizers"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json:1: is not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "model_type is 'unigram'"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "removes extra whitespace"),
        ({"treat_whitespace_as_suffix": True}, "whitespace as a suffix"),
    ],
)
def test_sentencepiece_models_of_another_kind_are_refused(tmp_path, options, message):
    given = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        minloglevel=2,
        **{**given, **options},
    )
    with pytest.raises(UserError, match=f"{message}.*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_no_dummy_prefix_and_user_defined_pieces(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    model = sentencepiece_model.read_sentencepiece(tmp_path / "tokenizer.model")
    assert not model.add_dummy_prefix and model.byte_fallback
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("def f(x):", "  return x<sep>  y", "<sep>", " ", "é<sep>"):
        assert tokenizer.encode(text, bos=False) == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def exported(model_only, tmp_path):
    """A source with the keys that trouble readers, and what is written from it."""
    given = {
        "add_bos_token": True,
        "tokenizer_class": "TokenizersBackend",
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "extra_special_tokens": ["<|end|>"],
        "chat_template": TEMPLATE,
        "pad_token": "<pad>",
        "bos_token": {"content": "<s>", "lstrip": False, "normalized": True, "rstrip": False},
        "a_key_of_tomorrow": {"kept": 1},
    }
    write(model_only, "tokenizer_config.json", given)
    write(model_only, "added_tokens.json", {"<pad>": VOCAB, "<|end|>": VOCAB + 1})
    written = tmp_path / "written"
    names = write_tokenizer(model_only, written)
    assert sorted(names) == sorted(path.name for path in written.iterdir())
    return written


def test_what_is_written_is_what_every_reader_takes(exported, trained):
    config = json.loads((exported / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Else transformers 4 returns token_type_ids too, which `generate` of a LLaMA refuses.
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["a_key_of_tomorrow"] == {"kept": 1}
    assert config["additional_special_tokens"] == ["<|end|>"]
    assert not {"auto_map", "extra_special_tokens"} & set(config)
    assert config["added_tokens_decoder"][str(VOCAB)]["content"] == "<pad>"
    assert config["chat_template"] == (exported / "chat_template.jinja").read_text() == TEMPLATE
    special = json.loads((exported / "special_tokens_map.json").read_text("utf-8"))
    assert special["bos_token"] == "<s>" and special["pad_token"] == "<pad>"
    model = (exported / "tokenizer.model").read_bytes()
    assert model == (trained / "tokenizer.model").read_bytes()


def test_writing_again_changes_nothing(exported, model_only, tmp_path):
    tokenizer = load_tokenizer(exported)
    assert tokenizer.fingerprint == load_tokenizer(model_only).fingerprint
    assert tokenizer.chat_template == TEMPLATE
    write_tokenizer(tokenizer, tmp_path / "again")
    for path in exported.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_transformers_gives_our_ids(exported):
    transformers = pytest.importorskip("transformers")
    write(exported, "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = load_tokenizer(exported)
    lines = [line for text in TEXTS for line in text.split("\n")]
    lines += ["", " ", "  two spaces", "</s> after", "</s>after", "a<|end|> b", "a\n\n", "你好 😀"]
    encoded = theirs(lines)
    assert encoded["input_ids"] == ours.encode_batch(lines, allow_special=True)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert theirs.pad_token_id == ours.pad_id and theirs.eos_token_id == ours.eos_id
    chat = [{"role": "user", "content": "Hello"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    ids = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids == ours.encode(rendered, allow_special=True)


def test_eos_is_refused_when_there_is_none(trained, tmp_path):
    shutil.copy(trained / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tokenizer.encode("a", eos=True)
