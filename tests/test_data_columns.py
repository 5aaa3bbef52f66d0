from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llamapro_jax.data.columns import BadRow, BadShape, Columns

LENGTH = 5


def features_of(**encodings: Any) -> tfds.features.FeaturesDict:
    tensor = tfds.features.Tensor
    return tfds.features.FeaturesDict(
        {
            "tokens": tensor(shape=(LENGTH,), dtype=np.int32, **encodings),
            "loss_mask": tensor(shape=(LENGTH,), dtype=np.bool_, **encodings),
            "segment_ids": tensor(shape=(LENGTH,), dtype=np.uint8, **encodings),
            "note": tfds.features.Text(),
        }
    )


def examples(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "tokens": rng.integers(0, 2**31 - 1, LENGTH).astype(np.int32),
            "loss_mask": rng.integers(0, 2, LENGTH).astype(bool),
            "segment_ids": rng.integers(0, 255, LENGTH).astype(np.uint8),
            "note": "not read",
        }
        for _ in range(count)
    ]


def records(features: tfds.features.FeaturesDict, rows: list[dict[str, Any]]) -> list[bytes]:
    return [features.serialize_example(row) for row in rows]


@pytest.mark.parametrize("encoding", ["bytes", "zlib", "none"])
def test_columns_are_what_tfds_decodes(encoding: str) -> None:
    features, rows = features_of(encoding=encoding), examples(7)
    columns = Columns(features, LENGTH).decode(records(features, rows))
    assert set(columns) == {"tokens", "loss_mask", "segment_ids"}
    for name, array_NT in columns.items():
        np.testing.assert_array_equal(array_NT, np.stack([row[name] for row in rows]))
        assert array_NT.dtype == rows[0][name].dtype


def test_features_stored_in_different_ways_make_one_row() -> None:
    features = features_of(encoding="bytes")
    mixed = tfds.features.FeaturesDict(
        {**features, "segment_ids": tfds.features.Sequence(np.uint8, length=LENGTH)}
    )
    rows = examples(3)
    columns = Columns(mixed, LENGTH).decode(records(mixed, rows))
    for name, array_NT in columns.items():
        np.testing.assert_array_equal(array_NT, np.stack([row[name] for row in rows]))


def test_a_record_that_is_no_row_says_which_it_is() -> None:
    features = features_of(encoding="bytes")
    good = records(features, examples(2))
    columns = Columns(features, LENGTH)
    for bad, why in ((b"", "the record is empty"), (b"\xff\xff", "the record is no example")):
        with pytest.raises(BadRow, match=why) as caught:
            columns.decode([*good, bad, *good])
        assert caught.value.index == 2
    short = tfds.features.FeaturesDict({"tokens": tfds.features.Tensor(shape=(4,), dtype=np.int32)})
    ragged = tfds.features.FeaturesDict({"tokens": tfds.features.Sequence(np.int32)})
    row = {"tokens": np.arange(4, dtype=np.int32)}
    with pytest.raises(BadShape, match=r"'tokens' has shape \(4,\)") as shape:
        Columns(ragged, LENGTH).decode(records(short, [row]))
    assert shape.value.index == 0
