"""Opening data: a prepared data set, one made by others, or text files, as random-access rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.data.columns import BadRow, BadShape, Columns
from llamapro_jax.data.prepare import Tokenizer, prepare_text, read_fingerprint
from llamapro_jax.data.records import SPLIT, open_builder, open_split
from llamapro_jax.data.rows import Row, complete_row, empty_rows
from llamapro_jax.errors import UserError

KINDS = ("text", "tfds")


class Rows:
    """Random access to the rows of one split of a TFDS data set in ArrayRecord.

    `rows[i]` is a dict of four arrays [T] (see `llamapro_jax.data.rows`), `rows.read(indices)` one
    of arrays [n, T], which is faster. They are checked as they are read: T tokens, each in
    [0, vocab_size). `fingerprint` is what `llamapro_jax.data.prepare` recorded (tokenizer, files,
    documents, tokens, targets, bytes), or None for a data set made by others.
    """

    def __init__(
        self,
        name: str,
        path: str,
        records: Any,
        columns: Columns,
        sequence_length: int,
        vocab_size: int,
        fingerprint: dict[str, Any] | None,
    ) -> None:
        self.name = name
        self.path = path
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self._records = records
        self._columns = columns

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
    length, or was prepared with another tokenizer than `tokenizer_fingerprint`.
    """
    path = str(path)
    name = name or Path(path).name
    builder = open_builder(path)
    _check_features(builder.info.features, name, path, sequence_length)
    fingerprint = read_fingerprint(builder.data_path)
    if fingerprint is not None:
        _check_fingerprint(fingerprint, name, path, vocab_size, tokenizer_fingerprint)
    records = open_split(builder, path, split).data_source
    columns = Columns(builder.info.features, sequence_length)
    return Rows(name, path, records, columns, sequence_length, vocab_size, fingerprint)


def open_source(
    name: str,
    path: str | Path,
    kind: str,
    split: str,
    tokenizer: Tokenizer | None,
    sequence_length: int,
    cache_directory: str | Path,
    vocab_size: int,
) -> Rows:
    """The rows of one named source of a run.

    kind `text`: text files, prepared once under `cache_directory`. kind `tfds`: a data set as
    `open_rows` takes it; `tokenizer` may be None then. Raises UserError as those two do.
    """
    if kind not in KINDS:
        raise UserError(f"data source {name!r}: kind is {kind!r}; it must be 'text' or 'tfds'.")
    if kind == "text":
        if tokenizer is None:
            raise UserError(
                f"data source {name!r}: text needs the model's tokenizer and the model has none; "
                "add its tokenizer files, or name a prepared data set with kind 'tfds'."
            )
        path = prepare_text(path, tokenizer, sequence_length, cache_directory)
    return open_rows(
        path,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        split=split,
        name=name,
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
    )


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
