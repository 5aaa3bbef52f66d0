"""Text files to documents: `.txt .md .py .rst` are one document a file, `.jsonl` one a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from llamapro_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
LINES_SUFFIX = ".jsonl"
SUFFIXES = (*TEXT_SUFFIXES, LINES_SUFFIX)


def text_files(path: str | Path) -> list[Path]:
    """The text files at `path`: itself, or those below it sorted by their path within it.

    Names that begin with a dot and other suffixes than `SUFFIXES` are passed over in a directory.
    Raises UserError when `path` is absent, is a file of another kind, or holds no text file.
    """
    path = Path(path)
    if path.is_dir():
        found = []
        for directory, names, files in os.walk(path):
            names[:] = [name for name in names if not name.startswith(".")]
            found += [Path(directory, name) for name in files if not name.startswith(".")]
        found = [file for file in found if file.suffix in SUFFIXES and file.is_file()]
        if not found:
            raise UserError(
                f"{path}: no file below it ends in {', '.join(SUFFIXES)}; name a directory with "
                "text files."
            )
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path}: a text source is a directory or a file that ends in {', '.join(SUFFIXES)}, "
            f"not in {path.suffix!r}; rename or convert it."
        )
    return [path]


def read_documents(file: Path) -> Iterator[str]:
    """The documents of one text file, as they are, without the empty ones.

    Raises UserError with file and byte offset when it is not UTF-8, and with file and line when a
    line of JSONL is malformed or has no string `text`.
    """
    if file.suffix == LINES_SUFFIX:
        yield from _read_lines(file)
        return
    text = _decode(file, file.read_bytes(), 0)
    if text:
        yield text


def _read_lines(file: Path) -> Iterator[str]:
    offset = 0
    with file.open("rb") as lines:
        for number, data in enumerate(lines, start=1):
            line = _decode(file, data, offset).rstrip()
            offset += len(data)
            if line:
                text = _text_field(line, f"{file}:{number}")
                if text:
                    yield text


def _decode(file: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 ({error.reason} at byte {offset + error.start}); convert it, "
            f"for instance with `iconv -f latin1 -t utf-8`."
        ) from None


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: is not JSON ({error.msg} at column {error.colno}); each line must be one "
            'object such as {"text": "..."}.'
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: is a JSON {type(record).__name__}, not an object; each line must be one "
            'object such as {"text": "..."}.'
        )
    if "text" not in record:
        raise UserError(
            f"{where}: has no field 'text'; it has {', '.join(map(repr, record)) or 'none'}. "
            "Rename the field that holds the document to 'text'."
        )
    if not isinstance(record["text"], str):
        raise UserError(
            f"{where}: 'text' is a {type(record['text']).__name__}, not a string; write the "
            "document as one string."
        )
    if any("\ud800" <= character <= "\udfff" for character in record["text"]):
        raise UserError(
            f"{where}: 'text' holds half of a surrogate pair, which is no character; remove it."
        )
    return record["text"]
