"""Lines of a JSONL file, and fields of them, with errors that name file, line and field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError


@dataclass(frozen=True)
class Record:
    """One line. where: `file:line`, for messages."""

    where: str
    fields: Mapping[str, Any]

    @property
    def names(self) -> str:
        """The fields there are, for messages."""
        return ", ".join(map(repr, self.fields)) or "none"

    def has(self, *names: str) -> bool:
        return all(name in self.fields for name in names)

    def first(self, names: Sequence[str]) -> str:
        """The first of `names` that there is. Raises UserError when there is none."""
        for name in names:
            if name in self.fields:
                return name
        wanted = " or ".join(map(repr, names))
        raise UserError(f"{self.where}: has no field {wanted}; it has {self.names}.")

    def text(self, *names: str) -> str:
        """The text in the first of these fields that there is. Raises UserError."""
        name = self.first(names)
        return checked_text(self, name, self.fields[name])

    def texts(self, name: str) -> list[str]:
        """A list of texts that are not empty. Raises UserError."""
        values = self.fields[name]
        if not isinstance(values, list) or not values:
            raise UserError(f"{self.where}: {name!r} must be a list of texts, and not empty.")
        return [checked_text(self, f"{name}[{i}]", value) for i, value in enumerate(values)]


def checked_text(record: Record, name: str, value: Any) -> str:
    """`value` where it is a text that is not empty. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"{record.where}: {name!r} is {_kind(value)}, not a text.")
    if not value.strip():
        raise UserError(f"{record.where}: {name!r} is empty; remove the line or complete it.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(
            f"{record.where}: {name!r} holds half of a surrogate pair, which is no character; "
            "remove it."
        )
    return value


def read_records(path: str | Path) -> list[Record]:
    """The lines of a JSONL file, each an object; empty lines are passed over.

    Raises UserError when there is no such file, it is not UTF-8 or holds no line, and with file and
    line when one is not JSON or no object.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; a task is a JSONL file, a question a line.")
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                records.append(Record(where, _object(line, where)))
    if not records:
        raise UserError(f"{path}: is empty; a task is a JSONL file, a question a line.")
    return records


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is not UTF-8 ({error.reason} at byte {error.start} of the line); convert "
            "the file, for instance with `iconv -f latin1 -t utf-8`."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: is not JSON ({error.msg} at column {error.colno}); each line must be one "
            "object."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {_kind(value)}, not an object; each line must be one.")
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a bool"}
    return kinds.get(type(value), "a number")
