"""What the tests of the data path share: rows in memory, a small real tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import tokenizers

from llamapro_jax.data.rows import Row, complete_row

BOS, EOS = 256, 257


class ArrayRows:
    """Rows in memory whose first token is the row's index plus `first`."""

    def __init__(self, count: int, sequence_length: int = 4, first: int = 0) -> None:
        self.sequence_length = sequence_length
        self._count = count
        self._first = first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return {name: array[0] for name, array in self.read([index]).items()}

    def read(self, indices: Sequence[int]) -> Row:
        first_N = self._first + np.asarray(indices, np.int32)
        return complete_row({"tokens": np.repeat(first_N[:, None], self.sequence_length, axis=1)})


class ByteTokenizer:
    """One token a byte, through the `tokenizers` library, with begin and end tokens."""

    def __init__(self) -> None:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: index for index, character in enumerate(alphabet)}
        self.backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        self.backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = tokenizers.decoders.ByteLevel()
        self.fingerprint = hashlib.sha256(self.backend.to_str().encode()).hexdigest()
        self.vocab_size = 258
        self.calls = 0

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = True
    ) -> list[list[int]]:
        self.calls += 1
        encoded = [encoding.ids for encoding in self.backend.encode_batch(list(texts))]
        return [[BOS] * bos + ids + [EOS] * eos for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids if i < BOS])
