"""A TFDS data set with a feature of text, to that text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamapro_jax.data.records import open_builder, open_split, read_record
from llamapro_jax.errors import UserError, nearest


def record_files(path: str, split: str) -> list[Path]:
    """The files that decide the rows of the split. Raises UserError as opening it does."""
    builder = open_builder(path)
    open_split(builder, path, split)
    names = ("dataset_info.json", "features.json", *builder.info.splits[split].filenames)
    return sorted(Path(builder.data_path, name) for name in names)


def count_rows(path: str, split: str, field: str) -> int:
    """How many rows the split has. Raises UserError when `field` is no feature of text."""
    builder = open_builder(path)
    features = builder.info.features
    if field not in features:
        raise UserError(
            f"{path}: has no feature {field!r}, only {', '.join(map(repr, sorted(features)))}; set "
            f"`field` to the one that holds the document.{nearest(field, features)}"
        )
    feature = features[field]
    if feature.shape != () or np.dtype(feature.np_dtype) != object:
        raise UserError(
            f"{path}: the feature {field!r} is {feature}, not text; set `field` to the one that "
            "holds the document."
        )
    return builder.info.splits[split].num_examples


def read_rows(
    path: str, split: str, field: str, start: int, stop: int
) -> Iterator[tuple[str, bytes]]:
    """The rows [start, stop): place, and the bytes of the text."""
    source = open_builder(path).as_data_source(split=split)
    for index in range(start, stop):
        yield f"{path}: row {index}", read_record(source, index, path)[field]
