"""Rows on disk: a TFDS data set in ArrayRecord, written and opened without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf.json_format import ParseError
from tensorflow_datasets.proto import tf_example_pb2

from llamapro_jax.data.readers.datasets_directory import is_datasets_directory
from llamapro_jax.data.rows import DTYPES, Row
from llamapro_jax.errors import UserError, nearest
from llamapro_jax.local_copies import fetched

SPLIT = "train"
_NAME = "rows"
# The pattern that TFDS's own sequential writer takes: no shard's name has the number of them.
_SHARD_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


def shard_name(split: str, index: int) -> str:
    """The file name of shard `index` of a split, as the metadata of `write_metadata` has it."""
    return f"{_NAME}-{split}.array_record-{index:05d}"


def write_shard(rows: Iterable[Row], file: Path) -> tuple[int, int]:
    """Writes rows in order as one ArrayRecord file; returns how many, and their bytes.

    The same rows give the same bytes. `group_size:1` is what random access wants. Raises OSError
    when the file cannot be written, as on a full disk.
    """
    count = size = 0
    with _refusals(file):
        writer = ArrayRecordWriter(str(file), "group_size:1")
    try:
        for row in rows:
            record = _serialized(row)
            with _refusals(file):
                writer.write(record)
            count += 1
            size += len(record)
    finally:
        with _refusals(file):
            writer.close()
    return count, size


@contextmanager
def _refusals(file: Path) -> Iterator[None]:
    """ArrayRecord makes a RuntimeError of whatever the system refuses."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from None


def _serialized(row: Row) -> bytes:
    """A row as TFDS's own encoder stores it by `_features`, in a third of its time."""
    example = tf_example_pb2.Example()
    for name, dtype in DTYPES.items():
        data = np.ascontiguousarray(row[name], dtype).tobytes()
        example.features.feature[name].bytes_list.value.append(data)
    # Otherwise the features come in an order that differs from process to process.
    return example.SerializeToString(deterministic=True)


def write_metadata(
    directory: Path, sequence_length: int, splits: Mapping[str, Sequence[tuple[int, int]]]
) -> None:
    """Writes what TFDS reads a directory of shards by.

    splits: for each split what `write_shard` returned of its shards, in order, none empty. They
    are `shard_name(split, i)` in `directory`.
    """
    identity = tfds.core.DatasetIdentity(
        name=_NAME, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=_features(sequence_length),
        description="Token ids packed into rows of fixed length.",
        disable_shuffling=True,
    )
    info.set_file_format("array_record", override=False)
    info.set_splits(
        tfds.core.splits.SplitDict([_split_info(directory, *item) for item in splits.items()])
    )
    info.write_to_directory(directory)


def _split_info(directory: Path, split: str, shards: Sequence[tuple[int, int]]) -> Any:
    template = tfds.core.ShardedFileTemplate(
        dataset_name=_NAME,
        data_dir=directory,
        split=split,
        filetype_suffix="array_record",
        template=_SHARD_NAME,
    )
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[count for count, _ in shards],
        num_bytes=sum(size for _, size in shards),
        filename_template=template,
    )


def _features(sequence_length: int) -> Any:
    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(shape=(sequence_length,), dtype=dtype, encoding="bytes")
            for name, dtype in DTYPES.items()
        }
    )


def open_builder(path: str) -> Any:
    """The read-only TFDS builder of a data set directory, or of a name that TFDS finds on disk.

    A directory may be the data set itself (it has `dataset_info.json`) or hold one version of it.
    A name (`my_set`, `my_set/config:1.0.0`) is looked up in `$TFDS_DATA_DIR`, by default
    `~/tensorflow_datasets`; nothing is downloaded. Raises UserError when there is no such data set
    or it is not in ArrayRecord.
    """
    directory = fetched(path)
    if directory.exists():
        builder = _builder_of(_dataset_directory(directory))
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


def _builder_of(directory: Path) -> Any:
    try:
        return tfds.builder_from_directory(str(directory))
    except (ParseError, ValueError, KeyError, OSError) as error:
        why = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"{directory}: dataset_info.json or features.json is damaged or missing ({why[0]}); "
            "prepare the data set again."
        ) from None


def _dataset_directory(directory: Path) -> Path:
    if is_datasets_directory(directory):
        raise UserError(
            f"{directory}: is a directory of Hugging Face `datasets`, not a TFDS data set; set "
            "kind to 'datasets'."
        )
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
