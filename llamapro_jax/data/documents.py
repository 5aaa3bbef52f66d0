"""Sources to documents: what a configuration names, in pieces that processes read by themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro_jax.data.compressed import COMPRESSED_SUFFIXES
from llamapro_jax.data.lines import read_lines, read_whole
from llamapro_jax.errors import UserError, nearest

KINDS = ("text", "code", "chat", "tfds", "datasets")
PIECE_BYTES = 2**26

_TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
_LINES_SUFFIX = ".jsonl"


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
    bytes: about how many bytes of the source were read for it.
    """

    where: str
    value: str | dict[str, Any]
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
    UserError when the source is absent, of another kind, or has no such file.
    """
    if content.kind not in KINDS:
        raise UserError(
            f"{content.path}: kind is {content.kind!r}; it must be one of {', '.join(KINDS)}."
            f"{nearest(content.kind, KINDS)}"
        )
    return _walk(Path(content.path))


def pieces(content: Content, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The source in order, in pieces of about `piece_bytes` that follow from names and sizes alone.

    A source that is smaller is one piece. A file of lines is cut anywhere, Parquet between row
    groups, a data set between rows; a compressed file stays whole. Raises UserError as
    `input_files` does, and for a field or split that the source does not have.
    """
    parts = (part for file in input_files(content) for part in _parts(file, piece_bytes))
    return [Piece(content, tuple(group)) for group in _groups(parts, piece_bytes)]


def read(piece: Piece) -> Iterator[Record | Bad]:
    """The records of a piece in order, without those that are empty; what cannot be used is `Bad`.

    Memory is bounded by the largest record. Raises UserError when a file cannot be read, is damaged
    or ends too early.
    """
    for part in piece.parts:
        raw, value_of = _open(part, piece.content)
        for where, data, size in raw:
            try:
                value = value_of(data)
            except BadRecord as error:
                yield Bad(where, str(error), size)
                continue
            if value:
                yield Record(where, value, size)


def texts(content: Content) -> Iterator[str]:
    """The documents in order. Raises UserError as `pieces` and `read` do, and for the first Bad."""
    for piece in pieces(content):
        for record in read(piece):
            if isinstance(record, Bad):
                raise UserError(f"{record.where}: {record.why}")
            yield record.value


# ------------------------------------------------------------------- files and pieces


def _walk(path: Path) -> list[Path]:
    suffixes = (*_TEXT_SUFFIXES, _LINES_SUFFIX)
    if path.is_dir():
        found = []
        for directory, names, files in os.walk(path):
            names[:] = [name for name in names if not name.startswith(".")]
            found += [Path(directory, name) for name in files if not name.startswith(".")]
        found = [file for file in found if file.suffix in suffixes and file.is_file()]
        if not found:
            raise UserError(
                f"{path}: no file below it ends in {', '.join(suffixes)}; name a directory with "
                "text files."
            )
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    if path.suffix not in suffixes:
        raise UserError(
            f"{path}: a text source is a directory or a file that ends in {', '.join(suffixes)}, "
            f"not in {path.suffix!r}; rename or convert it."
        )
    return [path]


def _parts(file: Path, piece_bytes: int) -> Iterator[Part]:
    size = file.stat().st_size
    cut = file.suffix == _LINES_SUFFIX
    for start, stop in _ranges(size, size if cut else 0, piece_bytes):
        yield Part(str(file), start, stop, stop - start)


def _ranges(length: int, size: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """[0, length) in equal ranges, as few as have at most `piece_bytes` of the `size` bytes."""
    count = max(1, -(-size // piece_bytes))
    for i in range(count):
        yield i * length // count, (i + 1) * length // count


def _groups(parts: Iterable[Part], piece_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    for part in parts:
        if group and sum(one.bytes for one in group) + part.bytes > piece_bytes:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


# ------------------------------------------------------------------- values


def _open(
    part: Part, content: Content
) -> tuple[Iterator[tuple[str, Any, int]], Callable[[Any], str | dict[str, Any]]]:
    """The raw records of a part (place, data, bytes), and what makes values of their data."""
    file = Path(part.path)
    name = file.with_suffix("") if file.suffix in COMPRESSED_SUFFIXES else file
    if name.suffix == _LINES_SUFFIX:
        lines = read_lines(file, part.start, part.stop)
        return lines, lambda line: _text(_json_object(line), content.field)
    return iter([(part.path, read_whole(file), part.bytes)]), _decode


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"is not UTF-8 ({error.reason} at byte {error.start} of it); convert it, for instance with "
            "`iconv -f latin1 -t utf-8`."
        ) from None


def _json_object(data: bytes) -> dict[str, Any] | None:
    """The object on a line; None when the line is blank."""
    line = _decode(data).rstrip()
    if not line:
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord(
            f"is not JSON ({error.msg} at column {error.colno}); each line must be one object such "
            'as {"text": "..."}.'
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise BadRecord(f"is not JSON that can be read ({error}).") from None
    if not isinstance(record, dict):
        raise BadRecord(
            f"is a JSON {type(record).__name__}, not an object; each line must be one object such "
            'as {"text": "..."}.'
        )
    return record


def _text(record: dict[str, Any] | None, field: str) -> str:
    if record is None:
        return ""
    if field not in record:
        raise BadRecord(
            f"has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}. Set the "
            "source's `field` to the one that holds the document."
        )
    text = record[field]
    if not isinstance(text, str):
        raise BadRecord(
            f"{field!r} is a {type(text).__name__}, not a string; write the document as one string."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(
            f"{field!r} holds half of a surrogate pair, which is no character; remove it."
        ) from None
    return text
