"""Text files to a prepared data set: tokenise, pack, write, once for each content and tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamapro_jax.data.packing import pack
from llamapro_jax.data.records import write_rows
from llamapro_jax.data.rows import Row
from llamapro_jax.data.text import read_documents, text_files
from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_directory, read_json, write_json

FINGERPRINT_FILE = "fingerprint.json"
# Raise it when the same text would give other rows than before.
_FORMAT = 1
_CHARACTERS_AT_ONCE = 2**20


class Tokenizer(Protocol):
    """What preparing text needs of a tokenizer."""

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = True, eos: bool = True
    ) -> list[list[int]]: ...


@dataclasses.dataclass
class Counts:
    """What went into a data set. `bytes` are UTF-8 bytes of the text, `targets` predicted tokens.

    A token is a target unless it is the first of its segment, so that the loss in nats of all rows
    is `targets` x their mean, and bits per byte follow.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    targets: int = 0
    rows: int = 0
    largest_token: int = 0


def prepare_text(
    path: str | Path, tokenizer: Tokenizer, sequence_length: int, destination: str | Path
) -> Path:
    """The directory of the prepared data set `destination/STEM-HASH` for the text at `path`.

    The hash covers the content and names of the files, the tokenizer and the sequence length: a
    data set that is there already is returned at once, and another never takes its place. Each
    document gets begin and end tokens. Memory is bounded by the largest single document.
    Beside the records stands `fingerprint.json` with what went in and the counts.
    Raises UserError for text that cannot be read (see `text`) and when there is none.
    """
    path = Path(path)
    files = text_files(path)
    identity, digest = _identity(path, files, tokenizer, sequence_length)
    stem = re.sub(r"[^A-Za-z0-9_.]+", "-", path.resolve().stem).strip("-.") or "text"
    target = Path(destination) / f"{stem}-{digest[:12]}"
    if _is_prepared(target, digest):
        return target
    try:
        with atomic_directory(target) as directory:
            counts = Counts()
            documents = _encode(files, tokenizer, counts)
            write_rows(
                _count_rows(pack(documents, sequence_length), counts), directory, sequence_length
            )
            if counts.tokens == 0:
                raise UserError(f"{path}: holds no text; name a source that is not empty.")
            record = {"fingerprint": digest, **identity, **dataclasses.asdict(counts)}
            write_json(directory / FINGERPRINT_FILE, record)
    except OSError:
        # Another process may have prepared the same data set in the meantime.
        if not _is_prepared(target, digest):
            raise
    return target


def text_fingerprint(path: str | Path, tokenizer: Tokenizer, sequence_length: int) -> str:
    """The `fingerprint` that `prepare_text` records, without preparing anything."""
    path = Path(path)
    return _identity(path, text_files(path), tokenizer, sequence_length)[1]


def read_fingerprint(directory: str | Path) -> dict[str, Any] | None:
    """The content of a prepared data set's `fingerprint.json`; None for one made by others."""
    file = Path(directory) / FINGERPRINT_FILE
    return read_json(file) if file.is_file() else None


def _identity(
    path: Path, files: Sequence[Path], tokenizer: Tokenizer, sequence_length: int
) -> tuple[dict[str, Any], str]:
    """What decides the rows, and the hash of it."""
    identity = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": sequence_length,
        "files": {_name_within(path, file): _sha256(file) for file in files},
    }
    return identity, hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_prepared(target: Path, digest: str) -> bool:
    record = read_fingerprint(target)
    return record is not None and record.get("fingerprint") == digest


def _name_within(path: Path, file: Path) -> str:
    return file.name if file == path else file.relative_to(path).as_posix()


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _batches(files: Iterable[Path]) -> Iterator[list[str]]:
    """Documents in order, gathered until they have enough characters to keep a tokenizer busy."""
    texts: list[str] = []
    characters = 0
    for file in files:
        for text in read_documents(file):
            texts.append(text)
            characters += len(text)
            if characters >= _CHARACTERS_AT_ONCE:
                yield texts
                texts, characters = [], 0
    if texts:
        yield texts


def _encode(files: Sequence[Path], tokenizer: Tokenizer, counts: Counts) -> Iterator[np.ndarray]:
    progress = _Progress(sum(file.stat().st_size for file in files))
    for texts in _batches(files):
        counts.documents += len(texts)
        counts.bytes += sum(len(text.encode()) for text in texts)
        for ids in tokenizer.encode_batch(texts, bos=True, eos=True):
            tokens = np.asarray(ids, np.int32)
            counts.tokens += len(tokens)
            counts.largest_token = max(counts.largest_token, int(tokens.max(initial=0)))
            yield tokens
        progress.show(counts)
    progress.show(counts, last=True)


def _count_rows(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.rows += 1
        counts.targets += int((row["positions"] > 0).sum())
        yield row


class _Progress:
    """One line that is rewritten on a terminal; a plain line every half minute elsewhere."""

    def __init__(self, total_bytes: int) -> None:
        self._total = max(1, total_bytes)
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def show(self, counts: Counts, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._shown < (0.2 if self._terminal else 30):
            return
        self._shown = now
        # JSONL has more bytes than the text in it, so the share is a lower bound there.
        share = 100 if last else min(99, 100 * counts.bytes // self._total)
        rate = counts.tokens / max(1e-9, now - self._began)
        line = (
            f"preparing text: {share} %, {counts.documents:,} documents, "
            f"{counts.tokens:,} tokens, {rate:,.0f} tokens/s"
        )
        start, end = ("\r\x1b[K", "\n" if last else "") if self._terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
