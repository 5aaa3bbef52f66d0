"""One piece of a source to its shards: tokenise, pack, write. What a process does by itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamapro_jax.data.chat import ChatTemplate, messages_of
from llamapro_jax.data.packing import pack, pack_whole
from llamapro_jax.data.readers.documents import Bad, BadRecord, Piece, Record, read
from llamapro_jax.data.records import SPLIT, write_shard
from llamapro_jax.data.rows import Row

HELD_OUT = "validation"
BAD_RECORDS_KEPT = 100
_CHARACTERS_AT_ONCE = 2**20
_CONVERSATIONS_AT_ONCE = 256
_BAD_AT_ONCE = 100

Example = tuple[np.ndarray, np.ndarray]


class Tokenizer(Protocol):
    """What preparing text needs of a tokenizer."""

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = True, eos: bool = True
    ) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes rows of records.

    template: how `ChatTemplate.load` finds the one of kind `chat`. held_out: share of the
    documents that go to the split `validation`.
    """

    tokenizer: Tokenizer
    sequence_length: int
    template: str
    held_out: float

    @property
    def splits(self) -> tuple[str, ...]:
        return (SPLIT, HELD_OUT) if self.held_out > 0 else (SPLIT,)

    def split_of(self, document: str) -> str:
        """By its content, so that a document that is there twice is never on both sides."""
        if self.held_out <= 0:
            return SPLIT
        digest = hashlib.sha256(document.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return HELD_OUT if place < self.held_out else SPLIT


@dataclasses.dataclass
class Counts:
    """What went into the rows of a split.

    bytes: UTF-8 bytes of the text; 0 of conversations, of which not every token counts.
    targets: predicted tokens. A token is one unless it is the first of its segment or masked, so
    the loss in nats of all rows is `targets` x their mean, and bits per byte follow.
    turns_cut: turns left out at the end of conversations longer than a row; dropped: conversations
    whose first exchange is. stored_bytes: of the records before compression.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    targets: int = 0
    rows: int = 0
    largest_token: int = 0
    turns_cut: int = 0
    dropped: int = 0
    stored_bytes: int = 0

    def add(self, other: Counts) -> None:
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            largest = field.name == "largest_token"
            setattr(self, field.name, max(ours, theirs) if largest else ours + theirs)


@dataclasses.dataclass
class Seen:
    """What was read since the last report: for progress, and for the share of bad records.

    records, bytes: of the source, the bad ones among them. bad_records: the first ones.
    """

    records: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bad: int = 0
    bad_records: list[Bad] = dataclasses.field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.records += other.records
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.bad += other.bad
        self.bad_records += other.bad_records[: BAD_RECORDS_KEPT - len(self.bad_records)]


Report = Callable[[Seen], None]


def make_shards(
    piece: Piece, recipe: Recipe, file_of: Callable[[str], Path], report: Report
) -> tuple[dict[str, Counts], Seen]:
    """Writes the rows of a piece, a file for each split; counts of each, and what was seen.

    A split without rows has no file. The piece is read once for each split, so that memory stays
    bounded by a batch and the largest document.
    """
    meter = _Meter(report)
    found = {}
    for split in recipe.splits:
        counts = Counts()
        if piece.content.kind == "chat":
            examples = _conversations(piece, recipe, split, counts, meter)
            rows = pack_whole(examples, recipe.sequence_length)
        else:
            rows = pack(_documents(piece, recipe, split, counts, meter), recipe.sequence_length)
        file = file_of(split)
        counts.rows, counts.stored_bytes = write_shard(_count_targets(rows, counts), file)
        if counts.rows == 0:
            file.unlink()
        found[split] = counts
        meter.first_reading = False
    meter.flush()
    return found, meter.total


class _Meter:
    """Gathers what is seen, and reports it now and then.

    first_reading: of the piece; what a second one sees again is not counted again.
    """

    def __init__(self, report: Report) -> None:
        self.total = Seen()
        self.first_reading = True
        self._report = report
        self._since = Seen()

    def read(self, size: int) -> None:
        if self.first_reading:
            self._since.records += 1
            self._since.bytes += size

    def bad(self, record: Bad) -> None:
        self._since.bad += 1
        if self.total.bad + self._since.bad <= BAD_RECORDS_KEPT:
            self._since.bad_records.append(record)
        if self.total.bad == 0 or self._since.bad >= _BAD_AT_ONCE:
            self.flush()  # It may be the end of all.

    def used(self, documents: int, tokens: int) -> None:
        self._since.documents += documents
        self._since.tokens += tokens

    def flush(self) -> None:
        since, self._since = self._since, Seen()
        if since != Seen():
            self.total.add(since)
            self._report(since)


def _records(piece: Piece, meter: _Meter) -> Iterator[tuple[str, Any]]:
    """(where, value) of the good ones."""
    for record in good_or_bad(piece):
        meter.read(record.bytes)
        if not isinstance(record, Bad):
            yield record.where, record.value
        elif meter.first_reading:
            meter.bad(record)


def good_or_bad(piece: Piece) -> Iterator[Record | Bad]:
    """The records of a piece; of kind `chat` the messages, and what has none is bad."""
    for record in read(piece):
        if isinstance(record, Record) and piece.content.kind == "chat":
            try:
                record = dataclasses.replace(record, value=messages_of(record.value))
            except BadRecord as error:
                record = Bad(record.where, str(error), record.bytes)
        yield record


def _batches(piece: Piece, recipe: Recipe, split: str, meter: _Meter) -> Iterator[list[str]]:
    """Documents in order, gathered until they have enough characters to keep a tokenizer busy."""
    texts: list[str] = []
    characters = 0
    for _, text in _records(piece, meter):
        if recipe.split_of(text) != split:
            continue
        texts.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _documents(
    piece: Piece, recipe: Recipe, split: str, counts: Counts, meter: _Meter
) -> Iterator[np.ndarray]:
    for texts in _batches(piece, recipe, split, meter):
        counts.documents += len(texts)
        counts.bytes += sum(len(text.encode()) for text in texts)
        before = counts.tokens
        for ids in recipe.tokenizer.encode_batch(texts, bos=True, eos=True):
            tokens = np.asarray(ids, np.int32)
            _count_tokens(tokens, counts)
            yield tokens
        meter.used(len(texts), counts.tokens - before)
        meter.flush()


def _conversations(
    piece: Piece, recipe: Recipe, split: str, counts: Counts, meter: _Meter
) -> Iterator[Example]:
    template = ChatTemplate.load(recipe.template, recipe.tokenizer)
    for number, (where, messages) in enumerate(_records(piece, meter), start=1):
        if number % _CONVERSATIONS_AT_ONCE == 0:
            meter.flush()
        if recipe.split_of(json.dumps(messages, sort_keys=True)) != split:
            continue
        try:
            fitted = template.fit(messages, recipe.sequence_length)
        except BadRecord as error:
            meter.bad(Bad(where, str(error)))
            continue
        if fitted is None:
            counts.dropped += 1
            continue
        tokens, loss_mask, turns_cut = fitted
        counts.documents += 1
        counts.turns_cut += turns_cut
        _count_tokens(tokens, counts)
        meter.used(1, len(tokens))
        yield tokens, loss_mask


def _count_tokens(tokens: np.ndarray, counts: Counts) -> None:
    counts.tokens += len(tokens)
    counts.largest_token = max(counts.largest_token, int(tokens.max(initial=0)))


def _count_targets(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.targets += int(((row["positions"] > 0) & row["loss_mask"]).sum())
        yield row
