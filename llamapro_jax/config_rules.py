"""Rules for the values of a configuration: each yields `(field, message)` of what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Problems = Iterator[tuple[str, str]]


def positive(section: Any, *names: str) -> Problems:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            yield name, f"must be positive, is {value}."


def not_negative(section: Any, *names: str) -> Problems:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 0:
            yield name, f"must not be negative, is {value}."


def share(section: Any, *names: str) -> Problems:
    for name in names:
        value = getattr(section, name)
        if not 0 <= value <= 1:
            yield name, f"must be between 0 and 1, is {value}."


def not_empty(section: Any, *names: str) -> Problems:
    for name in names:
        if not getattr(section, name):
            yield name, "must not be empty."


def names(field: str, entries: Sequence[Any]) -> Problems:
    """Names become parts of metric names and file names, so each is plain and used once."""
    seen: set[str] = set()
    for i, entry in enumerate(entries):
        where = f"{field}.{i}.name"
        if not _NAME.fullmatch(entry.name):
            yield where, f"{entry.name!r} must be letters, digits, '_', '-' and '.' only."
        if entry.name in seen:
            yield where, f"{entry.name!r} names two entries of {field}; give each its own name."
        seen.add(entry.name)
