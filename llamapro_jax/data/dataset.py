"""Opening data as random-access rows: a data set of tokens as it is, all else prepared first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.config_data import DEFAULT_FIELD, EvalSourceConfig, SourceConfig
from llamapro_jax.data.columns import BadRow, BadShape, Columns
from llamapro_jax.data.preparation.prepare import (
    TOKENIZER_DIRECTORY,
    Tokenizer,
    prepare_in,
    read_fingerprint,
)
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.data.records import SPLIT, open_builder, open_split
from llamapro_jax.data.rows import Row, complete_row, empty_rows
from llamapro_jax.errors import UserError
from llamapro_jax.local_copies import path_here
from llamapro_jax.remote import RemotePath, as_path

ROWS_LOOKED_AT = 64
# Their split says what is read of them, of other kinds what is taken of the rows.
OWN_SPLITS = ("tfds", "datasets")


class Rows:
    """Random access to the rows of one split of a TFDS data set in ArrayRecord.

    `rows[i]` is a dict of four arrays [T] (see `llamapro_jax.data.rows`), `rows.read(indices)` one
    of arrays [n, T], which is faster. They are checked as they are read: T tokens, each in
    [0, vocab_size). `fingerprint` is what `preparation.prepare` recorded (tokenizer, files,
    documents, tokens, targets, bytes), or None for a data set made by others. `digest` changes
    with the rows: of a data set made by others, with the number and size of its records.
    """

    def __init__(
        self,
        name: str,
        path: str,
        split: str,
        records: Any,
        columns: Columns,
        sequence_length: int,
        vocab_size: int,
        fingerprint: dict[str, Any] | None,
        digest: str,
    ) -> None:
        self.name = name
        self.path = path
        self.split = split
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.digest = digest
        self._records = records
        self._columns = columns

    @property
    def counts(self) -> dict[str, Any] | None:
        """What `fingerprint` counts of the split, or of all where it does not tell them apart."""
        if self.fingerprint is None:
            return None
        splits = self.fingerprint.get("splits", {})
        return splits.get(self.split.partition("[")[0], self.fingerprint)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        return {name: array[0] for name, array in self.read([index]).items()}

    def read(self, indices: Sequence[int]) -> Row:
        """Rows [n, T] in the order of `indices`. Raises UserError for the first that is bad."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"{self.name}: row {index} of {len(self)}")
        if not indices:
            return empty_rows(0, self.sequence_length)
        try:
            features = self._columns.decode(self._read(indices))
        except BadShape as bad:
            raise UserError(
                f"{self._where(indices[bad.index])}: {bad}, the run's sequence length is "
                f"{self.sequence_length}; set sequence_length to match, or pack the data set into "
                "rows of that length."
            ) from None
        except BadRow as bad:
            raise damaged(self.path, indices[bad.index], bad) from None
        self._check_tokens(features["tokens"], indices)
        return complete_row(features)

    def _read(self, indices: Sequence[int]) -> Sequence[bytes]:
        try:
            return self._records.__getitems__(indices)
        except (RuntimeError, ValueError, OSError):
            for index in indices:
                try:
                    self._records[index]
                except (RuntimeError, ValueError, OSError) as error:
                    raise damaged(self.path, index, error) from None
            raise

    def _where(self, index: int) -> str:
        return f"{self.name} ({self.path}), row {index}"

    def _check_tokens(self, tokens_NT: np.ndarray, indices: Sequence[int]) -> None:
        if tokens_NT.min() >= 0 and tokens_NT.max() < self.vocab_size:
            return
        bad_NT = (tokens_NT < 0) | (tokens_NT >= self.vocab_size)
        row = int(bad_NT.any(axis=1).argmax())
        raise UserError(
            f"{self._where(indices[row])}: token {tokens_NT[row][bad_NT[row]][0]} is not in the "
            f"model's vocabulary of {self.vocab_size}; prepare the data with the model's own "
            "tokenizer."
        )


def open_rows(
    path: str | Path,
    *,
    sequence_length: int,
    vocab_size: int,
    split: str = SPLIT,
    name: str | None = None,
    tokenizer_fingerprint: str | None = None,
) -> Rows:
    """The rows of a TFDS data set in ArrayRecord that has at least the integer feature `tokens`.

    `path` is its directory, or a name that TFDS finds on this machine. Raises UserError when it is
    absent, empty, damaged, in another file format, has no `tokens` [T] of the run's sequence
    length, or was prepared with another tokenizer than `tokenizer_fingerprint`. Some rows are read,
    so that what is wrong with all of them is found here.
    """
    path = str(path)
    name = name or as_path(path).name
    builder = open_builder(path)
    _check_features(builder.info.features, name, path, sequence_length)
    fingerprint = read_fingerprint(builder.data_path)
    if fingerprint is not None:
        _check_fingerprint(fingerprint, name, path, vocab_size, tokenizer_fingerprint)
    records = open_split(builder, path, split).data_source
    columns = Columns(builder.info.features, sequence_length)
    rows = Rows(
        name,
        path,
        split,
        records,
        columns,
        sequence_length,
        vocab_size,
        fingerprint,
        _digest(builder, fingerprint),
    )
    rows.read(range(0, len(rows), -(-len(rows) // ROWS_LOOKED_AT)))
    return rows


def content_of(entry: SourceConfig | EvalSourceConfig) -> Content | None:
    """What has to be tokenised and packed for a source of a run; None when it has rows of tokens.

    Raises UserError for a TFDS data set that is absent, or has neither tokens nor the text.
    """
    if entry.kind == "tfds":
        features = open_builder(entry.path).info.features
        if "tokens" in features and entry.field == DEFAULT_FIELD:
            return None
        if "tokens" in features:
            raise UserError(
                f"{entry.name} ({entry.path}): has tokens, which are read as they are, so that "
                f"nothing reads `field`, which is {entry.field!r}; remove it."
            )
        if entry.field not in features:
            raise UserError(
                f"{entry.name} ({entry.path}): has no feature 'tokens' and none called "
                f"{entry.field!r}, only {', '.join(sorted(features))}; name the one that holds the "
                "text in `field`."
            )
    split = entry.split if entry.kind in OWN_SPLITS else SPLIT
    return Content(path_here(entry.path), entry.kind, entry.field, split)


def prepared_template(entry: SourceConfig | EvalSourceConfig) -> str | None:
    """The chat template of a TFDS data set that was prepared from conversations; None of others."""
    directory = Path(open_builder(entry.path).data_path)
    fingerprint = read_fingerprint(directory)
    if fingerprint is None or fingerprint.get("kind") != "chat":
        return None
    file = directory / TOKENIZER_DIRECTORY / "chat_template.jinja"
    if not file.is_file():
        raise UserError(
            f"{file}: is missing, with which the conversations were written; prepare the data set "
            "again."
        )
    return file.read_text(encoding="utf-8")


def open_source(
    entry: SourceConfig | EvalSourceConfig,
    *,
    tokenizer: Tokenizer | None,
    sequence_length: int,
    vocab_size: int,
    cache_directory: str | Path | RemotePath,
) -> Rows:
    """The rows of one source of a run.

    Whatever is not rows of tokens is prepared first, once, under `cache_directory`. The `tokenizer`
    may be None when nothing is. Raises UserError as `prepare` and `open_rows` do.
    """
    content = content_of(entry)
    path, split = entry.path, entry.split
    if content is not None:
        if tokenizer is None:
            raise UserError(
                f"data source {entry.name!r}: text needs the model's tokenizer and the model has "
                "none; add its tokenizer files, or name a prepared data set with kind 'tfds'."
            )
        path = str(
            prepare_in(
                as_path(cache_directory),
                content,
                tokenizer,
                sequence_length,
                template=entry.template,
                label=entry.name,
            )
        )
        split = SPLIT if entry.kind in OWN_SPLITS else entry.split
    return open_rows(
        path,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        split=split,
        name=entry.name,
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
    )


def digest_of_rows(path: str) -> str:
    """What a data set of rows is recognised by. Raises UserError when it is absent or damaged."""
    builder = open_builder(path)
    return _digest(builder, read_fingerprint(builder.data_path))


def _digest(builder: Any, fingerprint: Mapping[str, Any] | None) -> str:
    """Its fingerprint. Of a data set made by others that of the metadata, which has the records and
    bytes of its shards: to hash the records themselves would mean to read them all."""
    if fingerprint is not None:
        return fingerprint["fingerprint"]
    described = sorted(
        (name, split.shard_lengths, split.num_bytes) for name, split in builder.info.splits.items()
    )
    return hashlib.sha256(repr(described).encode()).hexdigest()


def damaged(path: str, index: int, why: Exception) -> UserError:
    """ArrayRecord has checksums; which one is wrong is of no use to anybody."""
    return UserError(
        f"{path}: row {index} cannot be read, the file is damaged or missing "
        f"({str(why).splitlines()[0]}); remove the data set and prepare it again."
    )


def _check_features(features: Any, name: str, path: str, sequence_length: int) -> None:
    if "tokens" not in features:
        raise UserError(
            f"{name} ({path}): has no feature 'tokens', only {', '.join(sorted(features))}; rows "
            "need token ids packed to a fixed length."
        )
    tokens = features["tokens"]
    if tokens.shape not in ((sequence_length,), (None,)):
        raise UserError(
            f"{name} ({path}): 'tokens' has shape {tuple(tokens.shape)}, the run's sequence length "
            f"is {sequence_length}; set sequence_length to match, or pack the data set into rows "
            "of that length."
        )
    if not np.issubdtype(tokens.np_dtype, np.integer):
        raise UserError(
            f"{name} ({path}): 'tokens' is {tokens.np_dtype}; rows need integer token ids."
        )


def _check_fingerprint(
    fingerprint: dict[str, Any],
    name: str,
    path: str,
    vocab_size: int,
    tokenizer_fingerprint: str | None,
) -> None:
    if fingerprint["largest_token"] >= vocab_size:
        raise UserError(
            f"{name} ({path}): holds token {fingerprint['largest_token']}, the model's vocabulary "
            f"is {vocab_size}; prepare the data with the model's own tokenizer."
        )
    prepared_with = fingerprint["tokenizer"]
    if tokenizer_fingerprint is not None and prepared_with != tokenizer_fingerprint:
        raise UserError(
            f"{name} ({path}): was prepared with tokenizer {prepared_with[:12]}, the model's is "
            f"{tokenizer_fingerprint[:12]}; prepare the text again with the model's tokenizer."
        )
