"""Files to prepare, and what became of them.

    lines, small_pieces, tokenizer = fixtures()
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_sources import BOS, EOS

from llamapro_jax.data.dataset import Rows, open_rows
from llamapro_jax.data.preparation import prepare as engine
from llamapro_jax.data.readers.documents import pieces
from llamapro_jax.hf.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"document {i}: " + "some words that differ " * (i % 7) + str(i * i) for i in range(60)]


def write_lines(file: Path, texts: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (t if isinstance(t, bytes) else json.dumps({"text": t}).encode() for t in texts)
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def rows_of(directory: Path, sequence_length: int = 16, split: str = "train") -> Rows:
    return open_rows(directory, sequence_length=sequence_length, vocab_size=10**6, split=split)


def documents_of(rows: Rows, bos: int = BOS, eos: int = EOS) -> list[list[int]]:
    """The tokens of each document, of rows that `pack` made."""
    tokens = [
        t
        for r in map(rows.__getitem__, range(len(rows)))
        for t in r["tokens"][r["segment_ids"] > 0]
    ]
    documents: list[list[int]] = []
    for token in map(int, tokens):
        if token == bos:
            documents.append([])
        documents[-1].append(token)
    assert all(document[-1] == eos for document in documents)
    return documents


def fixtures() -> tuple[Any, Any, Any]:
    """The fixtures `lines` (a file of TEXTS), `small_pieces` (of 500 bytes) and `tokenizer`."""

    @pytest.fixture
    def lines(tmp_path: Path) -> Path:
        return write_lines(tmp_path / "texts" / "lines.jsonl", TEXTS)

    @pytest.fixture
    def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "pieces", lambda content: pieces(content, 500))

    @pytest.fixture(scope="module")
    def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
        words = [*TEXTS, "question answer <|user|> <|assistant|> system"]
        return train_tokenizer(words, 320, tmp_path_factory.mktemp("tokenizer"))

    return lines, small_pieces, tokenizer
