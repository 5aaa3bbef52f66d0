"""Parquet to rows, a few at a time and only the column that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from llamapro_jax.data.readers.packages import data_package
from llamapro_jax.errors import UserError, nearest

_BATCH_BYTES = 2**22
_BATCH_ROWS = 1024


def row_groups(file: Path, field: str | None, other_field: str) -> list[int]:
    """The stored bytes of each row group, of the column `field` or (None) of all.

    other_field: what to do when it is another column, for messages.

    Raises UserError when the file is damaged or `field` is no column of strings.
    """
    with _open(file) as parquet:
        if field is not None:
            _check_field(parquet.schema_arrow, field, file, other_field)
        return [_column_bytes(parquet, group, field) for group in _groups(parquet)]


def read_rows(
    file: Path, field: str | None, start: int, stop: int
) -> Iterator[tuple[str, Any, int]]:
    """The rows of the row groups [start, stop): place, Arrow's scalar, about the bytes read for it.

    The scalar is the bytes of the string `field`, or (None) the row as a struct. Raises UserError
    when the file is damaged.
    """
    with _open(file) as parquet:
        before = list(accumulate((_rows(parquet, group) for group in _groups(parquet)), initial=0))
        for group in range(start, stop):
            if not _rows(parquet, group):
                continue
            row_bytes = _column_bytes(parquet, group, field) // _rows(parquet, group)
            scalars = _scalars(parquet, group, field)
            for row, scalar in enumerate(scalars, start=before[group]):
                yield f"{file}: row {row}", scalar, row_bytes


def _scalars(parquet: Any, group: int, field: str | None) -> Iterator[Any]:
    import pyarrow as pa

    expanded = max(1, parquet.metadata.row_group(group).total_byte_size)
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * _rows(parquet, group) // expanded))
    columns = None if field is None else [field]
    for batch in parquet.iter_batches(
        batch_size=rows, row_groups=[group], columns=columns, use_threads=False
    ):
        # As bytes, since Arrow does not check that a string is UTF-8.
        yield from (
            batch.to_struct_array()
            if field is None
            else batch.column(field).cast(pa.large_binary())
        )


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    pa = data_package("pyarrow", str(file))
    from pyarrow.parquet import ParquetFile

    try:
        # A column of a row group may be gigabytes: it is read through a buffer, not at once.
        with ParquetFile(
            file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
        ) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{file}: cannot be read ({error.strerror}).") from None
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{file}: is damaged or no Parquet file ({reason}); fetch or write it again."
        ) from None


def _check_field(schema: Any, field: str, file: Path, other_field: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise UserError(
            f"{file}: has no column {field!r}, only {', '.join(map(repr, schema.names))}; "
            f"{other_field}.{nearest(field, schema.names)}"
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    ):
        raise UserError(f"{file}: the column {field!r} is {kind}, not a string; {other_field}.")


def _groups(parquet: Any) -> range:
    return range(parquet.metadata.num_row_groups)


def _rows(parquet: Any, group: int) -> int:
    return parquet.metadata.row_group(group).num_rows


def _column_bytes(parquet: Any, group: int, field: str | None) -> int:
    metadata = parquet.metadata.row_group(group)
    columns = (metadata.column(index) for index in range(metadata.num_columns))
    return sum(
        column.total_compressed_size
        for column in columns
        if field is None or column.path_in_schema == field
    )
