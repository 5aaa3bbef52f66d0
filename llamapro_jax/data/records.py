"""Rows on disk: a TFDS data set in ArrayRecord, written and opened without TensorFlow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from llamapro_jax.data.rows import DTYPES, Row
from llamapro_jax.errors import UserError, nearest

SPLIT = "train"
_SHARD_BYTES = 2**29
_ROWS_AT_ONCE = 256


def write_rows(rows: Iterable[Row], directory: Path, sequence_length: int) -> int:
    """Writes rows in order as the split `train` of a TFDS data set; returns how many.

    `directory` exists and is empty. TFDS's sequential writer keeps the order and holds a few rows
    in memory; its `download_and_prepare` buffers a gigabyte and then needs TensorFlow. It writes
    ArrayRecord with `group_size:1`, which random access wants.
    """
    features = tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(shape=(sequence_length,), dtype=dtype, encoding="bytes")
            for name, dtype in DTYPES.items()
        }
    )
    identity = tfds.core.DatasetIdentity(
        name="rows", version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features,
        description="Token ids packed into rows of fixed length.",
        disable_shuffling=True,
    )
    row_bytes = sequence_length * sum(np.dtype(dtype).itemsize for dtype in DTYPES.values())
    writer = tfds.core.SequentialWriter(
        info,
        max_examples_per_shard=max(1, _SHARD_BYTES // row_bytes),
        file_format="array_record",
    )
    writer.initialize_splits([SPLIT])
    count = 0
    iterator = iter(rows)
    try:
        while chunk := list(itertools.islice(iterator, _ROWS_AT_ONCE)):
            writer.add_examples({SPLIT: chunk})
            count += len(chunk)
    finally:
        writer.close_all()
    return count


def open_builder(path: str) -> Any:
    """The read-only TFDS builder of a data set directory, or of a name that TFDS finds on disk.

    A directory may be the data set itself (it has `dataset_info.json`) or hold one version of it.
    A name (`my_set`, `my_set/config:1.0.0`) is looked up in `$TFDS_DATA_DIR`, by default
    `~/tensorflow_datasets`; nothing is downloaded. Raises UserError when there is no such data set
    or it is not in ArrayRecord.
    """
    directory = Path(path).expanduser()
    if directory.exists():
        builder = tfds.builder_from_directory(str(_dataset_directory(directory)))
    else:
        try:
            builder = tfds.core.read_only_builder.builder_from_files(path)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise UserError(
                f"{path}: is neither a directory nor the name of a TFDS data set on this machine "
                f"({str(error).splitlines()[0]}); prepare it or set TFDS_DATA_DIR."
            ) from None
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise UserError(
            f"{path}: is stored as {file_format.value if file_format else 'an unknown format'}, "
            "which has no random access; convert it with "
            "`tfds convert_format --out_file_format=array_record`."
        )
    return builder


def open_split(builder: Any, path: str, split: str) -> Any:
    """The random-access data source of a split such as `train` or `train[:90%]`.

    The last record of each shard is read once, so that a missing or truncated file is found here
    and not hours later. Raises UserError for that, an unknown split, and an empty one.
    """
    known = list(builder.info.splits)
    name = split.partition("[")[0]
    if name not in known:
        raise UserError(
            f"{path}: has no split {name!r}, only {', '.join(known) or 'none'}."
            f"{nearest(name, known)}"
        )
    try:
        instructions = builder.info.splits[split].file_instructions
        count = sum(instruction.take for instruction in instructions)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{path}: split {split!r} cannot be read ({error}); write it like 'train[:90%]'."
        ) from None
    if count == 0:
        raise UserError(f"{path}: split {split!r} is empty; name one with rows.")
    source = builder.as_data_source(split=split)
    end = 0
    for instruction in instructions:
        end += instruction.take
        read_record(source, end - 1, path)
    return source


def read_record(source: Any, index: int, path: str) -> dict[str, Any]:
    """One decoded record. Raises UserError when the file is damaged (ArrayRecord has checksums)."""
    try:
        features = source[index]
        # A file cut at a multiple of 64 KiB passes the checksums and gives empty records.
        if any(value is None for value in features.values()):
            raise ValueError("the record is empty")
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: row {index} cannot be read, the file is damaged or missing "
            f"({str(error).splitlines()[0]}); remove the data set and prepare it again."
        ) from None
    return features


def _dataset_directory(directory: Path) -> Path:
    if (directory / "dataset_info.json").is_file():
        return directory
    found = sorted(file.parent for file in directory.glob("*/dataset_info.json"))
    if len(found) == 1:
        return found[0]
    if found:
        versions = ", ".join(version.name for version in found)
        raise UserError(f"{directory}: holds several data sets ({versions}); name one of them.")
    raise UserError(
        f"{directory}: is not a TFDS data set (no dataset_info.json in it or one level below); "
        "for text files set kind to 'text'."
    )
