from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_sources import BOS, EOS, ByteTokenizer

from llamapro_jax.data.dataset import open_rows
from llamapro_jax.data.preparation.prepare import prepare, read_fingerprint
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.data.records import open_builder
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import train_tokenizer

TEXTS = ["first é document", "x", "the second one is a little longer than the others 😀"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "my texts"
    directory.mkdir()
    for index, text in enumerate(TEXTS):
        (directory / f"{index}.txt").write_text(text, encoding="utf-8")
    (directory / "nothing.txt").touch()
    return directory


def read_back(directory: Path, tokenizer: ByteTokenizer, sequence_length: int) -> list[str]:
    rows = open_rows(directory, sequence_length=sequence_length, vocab_size=258)
    tokens = []
    for index in range(len(rows)):
        row = rows[index]
        tokens += row["tokens"][row["segment_ids"] > 0].tolist()
    documents, start = [], 0
    for end in (i + 1 for i, token in enumerate(tokens) if token == EOS):
        assert tokens[start] == BOS
        documents.append(tokenizer.decode(tokens[start:end]))
        start = end
    assert start == len(tokens)
    return documents


@pytest.mark.parametrize("sequence_length", [2, 7, 16, 512])
def test_a_prepared_set_gives_back_every_document(
    corpus: Path, tmp_path: Path, sequence_length: int
) -> None:
    tokenizer = ByteTokenizer()
    directory = prepare(Content(str(corpus)), tokenizer, sequence_length, cache=tmp_path / "cache")
    assert read_back(directory, tokenizer, sequence_length) == TEXTS
    assert directory.parent == tmp_path / "cache"
    assert directory.name.startswith("my-texts-")


def test_the_models_own_tokenizer_is_taken(corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, tmp_path / "tokenizer")
    directory = prepare(Content(str(corpus)), tokenizer, 8, cache=tmp_path / "cache")
    rows = open_rows(
        directory,
        sequence_length=8,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    tokens = [t for row in map(rows.__getitem__, range(len(rows))) for t in row["tokens"]]
    ends = [index + 1 for index, token in enumerate(tokens) if token == tokenizer.eos_id]
    pieces = zip([0, *ends], ends, strict=False)
    assert [tokenizer.decode(tokens[start:end]) for start, end in pieces] == TEXTS
    assert tokens[0] == tokenizer.bos_id


def test_the_fingerprint_says_what_went_in(corpus: Path, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    directory = prepare(Content(str(corpus)), tokenizer, 16, cache=tmp_path / "cache")
    record = read_fingerprint(directory)
    size = sum(len(text.encode()) for text in TEXTS)
    assert record is not None
    assert directory.name.endswith(record["fingerprint"][:12])
    assert record["tokenizer"] == tokenizer.fingerprint
    assert record["sequence_length"] == 16
    assert record["files"]["0.txt"] == hashlib.sha256(TEXTS[0].encode()).hexdigest()
    assert (record["documents"], record["bytes"], record["tokens"]) == (3, size, size + 6)
    assert record["rows"] == -(-(size + 6) // 16)
    assert record["largest_token"] == EOS
    rows = open_rows(directory, sequence_length=16, vocab_size=258)
    parts = sum(int(rows[index]["segment_ids"].max()) for index in range(len(rows)))
    assert record["targets"] == record["tokens"] - parts


def test_the_same_is_reused_and_another_stands_beside(corpus: Path, tmp_path: Path) -> None:
    tokenizer, cache = ByteTokenizer(), tmp_path / "cache"
    first = prepare(Content(str(corpus)), tokenizer, 16, cache=cache)
    calls = tokenizer.calls
    assert prepare(Content(str(corpus)), tokenizer, 16, cache=cache) == first
    assert tokenizer.calls == calls
    longer = prepare(Content(str(corpus)), tokenizer, 32, cache=cache)
    (corpus / "1.txt").write_text("changed")
    changed = prepare(Content(str(corpus)), tokenizer, 16, cache=cache)
    other = ByteTokenizer()
    other.fingerprint = "another"
    assert len({first, longer, changed, prepare(Content(str(corpus)), other, 16, cache=cache)}) == 4
    assert first.is_dir()


def test_the_same_text_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    sets = [
        prepare(Content(str(corpus)), ByteTokenizer(), 8, cache=tmp_path / name)
        for name in ("a", "b")
    ]
    contents = [{file.name: file.read_bytes() for file in sorted(d.iterdir())} for d in sets]
    assert contents[0] == contents[1]


def test_nothing_is_left_when_it_fails(corpus: Path, tmp_path: Path) -> None:
    (corpus / "z.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"z\.txt: is not UTF-8"):
        prepare(Content(str(corpus)), ByteTokenizer(), 4, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_text_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match=r"empty\.txt: holds no text"):
        prepare(Content(str(empty)), ByteTokenizer(), 4, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is handed about a million characters at a time, in order."""
    file = tmp_path / "many.jsonl"
    line = json.dumps({"text": "a" * 1000}) + "\n"
    file.write_text(line * 2500)
    tokenizer = ByteTokenizer()
    sizes = []

    def encode_batch(texts: list[str], bos: bool = True, eos: bool = True) -> list[list[int]]:
        sizes.append(len(texts))
        return [[BOS, EOS] for _ in texts]

    monkeypatch.setattr(tokenizer, "encode_batch", encode_batch)
    prepare(Content(str(file)), tokenizer, 64, cache=tmp_path / "cache")
    assert sizes == [1049, 1049, 402]


def test_no_network_no_home_no_noise_no_tensorflow(corpus: Path, tmp_path: Path) -> None:
    code = f"""
import socket, sys
def refuse(*_): raise AssertionError("network")
socket.socket.connect = refuse
from data_sources import ByteTokenizer
from llamapro_jax.config import SourceConfig
from llamapro_jax.data.dataset import open_source
rows = open_source(
    SourceConfig("my texts", {str(corpus)!r}), tokenizer=ByteTokenizer(), sequence_length=8,
    vocab_size=258, cache_directory={str(tmp_path)!r},
)
rows[0]
assert not {{"tensorflow", "torch", "jax"}} & set(sys.modules)
"""
    home = tmp_path / "home"
    home.mkdir()
    tests = Path(__file__).parent
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": f"{tests}:{tests.parent}"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert list(home.iterdir()) == []
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("preparing my texts: 100 %, 3 documents, ")


def test_progress_is_plain_and_rare_without_a_terminal(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10000, 31))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    prepare(Content(str(corpus)), ByteTokenizer(), 8, cache=tmp_path / "cache")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "\r" not in "".join(lines)


def test_a_directory_of_datasets_is_no_tfds_data_set(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="is a directory of Hugging Face `datasets`.*'datasets'"):
        open_builder(str(tmp_path))
