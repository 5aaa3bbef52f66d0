"""Opening data: a prepared data set, one made by others, or text files, as random-access rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.data.prepare import Tokenizer, prepare_text, read_fingerprint
from llamapro_jax.data.records import SPLIT, open_builder, open_split, read_record
from llamapro_jax.data.rows import DTYPES, Row, complete_row
from llamapro_jax.errors import UserError

KINDS = ("text", "tfds")


class Rows:
    """Random access to the rows of one split of a TFDS data set in ArrayRecord.

    `rows[i]` is a dict of four arrays [T] (see `llamapro_jax.data.rows`), checked as it is read:
    T tokens, each in [0, vocab_size). `fingerprint` is what `prepare_text` recorded (tokenizer,
    files, documents, tokens, targets, bytes), or None for a data set made by others.
    """

    def __init__(
        self,
        name: str,
        path: str,
        source: Any,
        sequence_length: int,
        vocab_size: int,
        fingerprint: dict[str, Any] | None,
    ) -> None:
        self.name = name
        self.path = path
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        record = read_record(self._source, index, self.path)
        features = {name: np.asarray(record[name]) for name in DTYPES if name in record}
        self._check(features, index)
        return complete_row(features)

    def _check(self, features: dict[str, np.ndarray], index: int) -> None:
        where = f"{self.name} ({self.path}), row {index}"
        for name, array in features.items():
            if array.shape != (self.sequence_length,):
                raise UserError(
                    f"{where}: {name!r} has shape {array.shape}, the run's sequence length is "
                    f"{self.sequence_length}; set sequence_length to match, or pack the data set "
                    "into rows of that length."
                )
        tokens_T = features["tokens"]
        low, high = int(tokens_T.min()), int(tokens_T.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"{where}: token {low if low < 0 else high} is not in the model's vocabulary of "
                f"{self.vocab_size}; prepare the data with the model's own tokenizer."
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
    source = open_split(builder, path, split)
    return Rows(name, path, source, sequence_length, vocab_size, fingerprint)


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
