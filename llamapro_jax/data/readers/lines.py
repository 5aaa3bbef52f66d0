"""Lines of a file, or of a byte range of it, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from llamapro_jax.data.readers.compressed import open_bytes
from llamapro_jax.data.readers.suffixes import COMPRESSED
from llamapro_jax.errors import UserError

# No document is this long: what is, is no file of lines, or expands without end.
LARGEST = 2**28


def read_lines(file: Path, start: int, stop: int) -> Iterator[tuple[str, bytes, int]]:
    """The lines whose first byte is in [start, stop): place, line and bytes read of the file.

    So adjacent ranges give each line once, however they are cut. A compressed file is read whole.
    The place is `file:line`, and `file: byte N` (both of the first byte) where `start` is not 0,
    because the lines before are not read. Raises UserError for a line longer than `LARGEST` and
    for a file that cannot be read.
    """
    with open_bytes(file) as (data, read_of_file):
        if file.suffix in COMPRESSED:
            yield from _compressed_lines(file, data, read_of_file)
        else:
            yield from _lines_of_range(file, data, start, stop)


def read_whole(file: Path) -> bytes:
    """The content of a file. Raises UserError when it is over `LARGEST` or cannot be read."""
    with open_bytes(file) as (data, _):
        content = data.read(LARGEST + 1)
    _check_size(content, str(file), "is one document")
    return content


def _compressed_lines(
    file: Path, data: BinaryIO, read_of_file: Callable[[], int]
) -> Iterator[tuple[str, bytes, int]]:
    number = before = 0
    while line := data.readline(LARGEST + 1):
        number += 1
        where = f"{file}:{number}"
        _check_size(line, where, "is a line")
        position = read_of_file()
        yield where, line, position - before
        before = position


def _lines_of_range(
    file: Path, data: BinaryIO, start: int, stop: int
) -> Iterator[tuple[str, bytes, int]]:
    if start:
        # The line that is under way at `start` belongs to the range before, unless it ends there.
        data.seek(start - 1)
        while (line := data.readline(2**20)) and not line.endswith(b"\n"):
            pass
    position, number = data.tell(), 0
    while position < stop and (line := data.readline(LARGEST + 1)):
        number += 1
        where = f"{file}: byte {position}" if start else f"{file}:{number}"
        _check_size(line, where, "is a line")
        position += len(line)
        yield where, line, len(line)


def _check_size(data: bytes, where: str, what: str) -> None:
    if len(data) > LARGEST:
        raise UserError(
            f"{where}: {what} of more than {LARGEST:,} bytes, which is more than fits into memory; "
            "cut it into documents and write them as JSONL, one on each line."
        )
