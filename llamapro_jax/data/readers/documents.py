"""Sources to documents: what a configuration names, in pieces that processes read by themselves."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamapro_jax.data.readers import datasets_directory, parquet, suffixes
from llamapro_jax.data.readers.lines import read_lines, read_whole
from llamapro_jax.data.readers.packages import data_package
from llamapro_jax.errors import UserError, nearest

log = logging.getLogger(__name__)

KINDS = ("text", "code", "chat", "tfds", "datasets")
PIECE_BYTES = 2**26

# What the readers find: a place, data of the format, and the bytes of the source that it took.
_Found = tuple[str, Any, int]
_Value = str | dict[str, Any] | None


@dataclass(frozen=True)
class Content:
    """What one source reads, as a configuration names it.

    path: a file or directory; of kind `tfds` also a name. field: where the document is in a JSONL
    object, a Parquet row, a TFDS example or a row of `datasets`; a file of text has none, and a
    conversation is the whole object. split: of `tfds` and `datasets` only.
    """

    path: str
    kind: str = "text"
    field: str = "text"
    split: str = "train"


@dataclass(frozen=True)
class Part:
    """[start, stop) of a file or data set: its bytes, its row groups (Parquet) or its rows.

    bytes: about how many bytes of the source the part takes.
    """

    path: str
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class Piece:
    """Parts of a source, in order, that one process reads by itself. May turn out to be empty."""

    content: Content
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """About the sum of `bytes` of its records."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Record:
    """A document, or of kind `chat` the object with the conversation.

    where: its place for messages, `file:line`, `file: byte N`, `file: row N` (from 0) or `file`.
    bytes: about how many bytes of the source were read for it. `shards.good_or_bad` puts the
    conversation's messages in the place of the object.
    """

    where: str
    value: str | dict[str, Any] | list[dict[str, str]]
    bytes: int


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used; `f"{where}: {why}"` is the message."""

    where: str
    why: str
    bytes: int = 0


class BadRecord(ValueError):
    """Why a record cannot be used, without the place."""


def input_files(content: Content) -> list[Path]:
    """All files whose content decides the records, sorted by their path within the source.

    In a directory, names that begin with a dot and files of other kinds are passed over. Raises
    UserError when the source is absent, of another kind, has no such file or no such split, or
    needs a package that is not installed.
    """
    path = Path(content.path)
    match _storage(content):
        case "tfds":
            from llamapro_jax.data.readers import tfds_text

            return tfds_text.record_files(content.path, content.split)
        case "datasets":
            return datasets_directory.data_files(path, content.split)
    found = _files(path, content.kind)
    for file in found:
        if file.suffix in (suffixes.PARQUET, ".zst"):
            data_package("pyarrow", str(file))
    return found


def pieces(content: Content, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The source in order, in pieces of about `piece_bytes` that follow from names and sizes alone.

    A source that is smaller is one piece. A file of lines is cut anywhere, Parquet between row
    groups, a data set between rows; a compressed file stays whole. Raises UserError as
    `input_files` does, and for a field that the source does not have.
    """
    files = input_files(content)
    if _storage(content) == "files":
        parts = (part for file in files for part in _parts_of_file(file, content, piece_bytes))
    else:
        size = sum(_size(file) for file in files)
        parts = iter(_ranges(content.path, _count_rows(content), size, piece_bytes))
    return [Piece(content, group) for group in _groups(parts, piece_bytes)]


def read(piece: Piece) -> Iterator[Record | Bad]:
    """The records of a piece in order, without those that are empty; what cannot be used is `Bad`.

    Memory is bounded by the largest record. Raises UserError when a file cannot be read, is damaged
    or ends too early.
    """
    taken = 0  # with what was passed over since the record before
    for part in piece.parts:
        found, value_of = _open(part, piece.content)
        for where, data, size in found:
            taken += size
            try:
                value = value_of(data)
            except BadRecord as error:
                yield Bad(where, str(error), taken)
            else:
                if value is None or value == "":
                    continue
                yield Record(where, value, taken)
            taken = 0


def texts(content: Content) -> Iterator[str]:
    """The documents in order. Raises UserError as `pieces` and `read` do, and for the first Bad."""
    for piece in pieces(content):
        for record in read(piece):
            if isinstance(record, Bad):
                raise UserError(f"{record.where}: {record.why}")
            yield record.value


# ------------------------------------------------------------------- sources to pieces


def _storage(content: Content) -> str:
    """How the source is stored: `files`, `tfds` or `datasets`."""
    if content.kind not in KINDS:
        raise UserError(
            f"{content.path}: kind is {content.kind!r}; it must be one of {', '.join(KINDS)}."
            f"{nearest(content.kind, KINDS)}"
        )
    if content.kind in ("tfds", "datasets"):
        return content.kind
    saved = content.kind == "chat" and datasets_directory.is_datasets_directory(Path(content.path))
    return "datasets" if saved else "files"


def _files(path: Path, kind: str) -> list[Path]:
    if path.is_dir():
        found = list(_walk(path, kind))
        if not found:
            raise UserError(
                f"{path}: no file below it ends in {suffixes.described(kind)}; name a directory "
                f"with such files.{_other_kind(path)}"
            )
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    if not suffixes.layout(path.name, kind):
        raise UserError(
            f"{path}: a source of kind {kind!r} is a directory or a file that ends in "
            f"{suffixes.described(kind)}, not in {path.suffix!r}; rename or convert it."
        )
    return [path]


def _walk(path: Path, kind: str) -> Iterator[Path]:
    """The files of a kind below a directory. What cannot be looked into is an error, not a gap."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from None

    for directory, names, files in os.walk(path, onerror=unreadable):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in names:
            if os.path.islink(os.path.join(directory, name)):
                log.warning(
                    "%s is a link to a directory and is passed over; name its target as a source.",
                    os.path.join(directory, name),
                )
        for name in files:
            file = Path(directory, name)
            if name.startswith(".") or not suffixes.layout(name, kind):
                continue
            if file.is_symlink() and not file.exists():
                raise UserError(f"{file}: is a link to a file that does not exist; remove it.")
            if file.is_file():
                yield file


def _other_kind(path: Path) -> str:
    if datasets_directory.is_datasets_directory(path):
        return " `save_to_disk` wrote this one: set kind to 'datasets'."
    if next(path.glob("**/dataset_info.json"), None):
        return " This one looks like a TFDS data set: set kind to 'tfds'."
    return ""


def _parts_of_file(file: Path, content: Content, piece_bytes: int) -> Iterator[Part]:
    size = _size(file)
    match suffixes.layout(file.name, content.kind):
        case "parquet":
            for group, stored in enumerate(parquet.row_groups(file, _column(content))):
                yield Part(str(file), group, group + 1, stored)
        case "lines" if file.suffix == suffixes.LINES:
            yield from _ranges(str(file), size, size, piece_bytes)
        case _:
            yield Part(str(file), 0, size, size)


def _ranges(path: str, length: int, size: int, piece_bytes: int) -> Iterator[Part]:
    """[0, length) in equal ranges, as few as have at most `piece_bytes` of the `size` bytes."""
    count = max(1, min(length, -(-size // piece_bytes)))
    for i in range(count):
        start, stop = i * length // count, (i + 1) * length // count
        yield Part(path, start, stop, size * (stop - start) // max(1, length))


def _groups(parts: Iterable[Part], piece_bytes: int) -> Iterator[tuple[Part, ...]]:
    """Parts gathered in order while they fit into `piece_bytes`; neighbours become one."""
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.bytes > piece_bytes:
            yield tuple(group)
            group, size = [], 0
        size += part.bytes
        if group and (group[-1].path, group[-1].stop) == (part.path, part.start):
            last = group.pop()
            part = replace(last, stop=part.stop, bytes=last.bytes + part.bytes)
        group.append(part)
    if group:
        yield tuple(group)


def _count_rows(content: Content) -> int:
    if content.kind == "tfds":
        from llamapro_jax.data.readers import tfds_text

        return tfds_text.count_rows(content.path, content.split, content.field)
    return datasets_directory.count_rows(Path(content.path), content.split, _column(content))


def _column(content: Content) -> str | None:
    """The column that is read; None: a conversation is the whole row."""
    return None if content.kind == "chat" else content.field


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from None


# ------------------------------------------------------------------- parts to values


def _open(part: Part, content: Content) -> tuple[Iterable[_Found], Callable[[Any], _Value]]:
    """What a part holds, and what makes a value of the data of each."""
    column = _column(content)
    storage = _storage(content)
    if storage != "files":
        row_bytes = part.bytes // max(1, part.stop - part.start)
        rows = ((where, data, row_bytes) for where, data in _rows(part, content, storage))
        return rows, (lambda row: row) if column is None else (lambda data: _text(data, column))
    file = Path(part.path)
    match suffixes.layout(file.name, content.kind):
        case "lines":
            lines = read_lines(file, part.start, part.stop)
            if column is None:
                return lines, _conversation
            return lines, lambda line: _field(_json_object(line, column), column)
        case "parquet":
            rows = parquet.read_rows(file, column, part.start, part.stop)
            if column is None:
                return rows, _python_value
            return rows, lambda scalar: _text(scalar.as_py(), column)
    whole = [(part.path, read_whole(file), part.bytes)]
    return whole, _source_code if content.kind == "code" else _decode


def _rows(part: Part, content: Content, storage: str) -> Iterator[tuple[str, Any]]:
    if storage == "tfds":
        from llamapro_jax.data.readers import tfds_text

        return tfds_text.read_rows(part.path, content.split, content.field, part.start, part.stop)
    return datasets_directory.read_rows(
        Path(part.path), content.split, _column(content), part.start, part.stop
    )


def _decode(data: bytes) -> str:
    """The text, without the byte order mark that some editors begin a file with."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"is not UTF-8 ({error.reason} at byte {error.start} of it); convert it, for instance "
            "with `iconv -f latin1 -t utf-8`."
        ) from None


def _source_code(data: bytes) -> str:
    """The text of a file; nothing when it is binary."""
    return "" if b"\0" in data else _decode(data)


def _json_object(data: bytes, field: str) -> dict[str, Any] | None:
    """The object on a line; None when the line is blank."""
    line = _decode(data).rstrip()
    if not line:
        return None
    mend = f'each line must be one object such as {{"{field}": ...}}.'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord(f"is not JSON ({error.msg} at column {error.colno}); {mend}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise BadRecord(f"is JSON that cannot be read ({error}); {mend}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"is a JSON {type(record).__name__}, not an object; {mend}")
    return record


def _conversation(data: bytes) -> dict[str, Any] | None:
    record = _json_object(data, "messages")
    # In UTF-8 there are no surrogates, so that only an escape can bring one.
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        _require_characters(json.dumps(record, ensure_ascii=False), "it")
    return record


def _field(record: dict[str, Any] | None, field: str) -> str:
    if record is None:
        return ""
    if field not in record:
        raise BadRecord(
            f"has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}. Set `field` "
            "to the one that holds the document."
        )
    return _text(record[field], field)


def _text(value: Any, field: str) -> str:
    if isinstance(value, bytes):
        return _decode(value)
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise BadRecord(f"{field!r} is {found}, not a string; write the document as one string.")
    _require_characters(value, repr(field))
    return value


def _require_characters(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(
            f"{name} holds half of a surrogate pair, which is no character; remove it."
        ) from None


def _python_value(scalar: Any) -> dict[str, Any]:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"holds a string that is not UTF-8 ({error.reason}); write the file again."
        ) from None
