"""Byte positions to line numbers, for the few records that somebody has to look at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llamapro_jax.data.readers.documents import Bad

_AT_BYTE = re.compile(r"(.*): byte (\d+)", re.DOTALL)
_AT_ONCE = 2**20


def with_lines(records: Sequence[Bad]) -> list[Bad]:
    """The records with `file:line` for `file: byte N`, which is where a line begins.

    Who reads a part of a file does not know how many lines are before it. Here each file is read
    once, up to the last of its places.
    """
    found = {bad.where: match for bad in records if (match := _AT_BYTE.fullmatch(bad.where))}
    positions: dict[str, set[int]] = {}
    for match in found.values():
        positions.setdefault(match[1], set()).add(int(match[2]))
    lines = {file: _lines(Path(file), sorted(places)) for file, places in positions.items()}
    named = {where: f"{m[1]}:{lines[m[1]][int(m[2])]}" for where, m in found.items()}
    return [replace(bad, where=named.get(bad.where, bad.where)) for bad in records]


def _lines(file: Path, positions: Sequence[int]) -> dict[int, int]:
    """The number of the line, from 1, in which each byte of `positions` (ascending) is."""
    found = {}
    number, at = 1, 0
    with file.open("rb") as data:
        for position in positions:
            while at < position and (block := data.read(min(_AT_ONCE, position - at))):
                number += block.count(b"\n")
                at += len(block)
            found[position] = number
    return found
