"""Files of a checkpoint, and of prepared data, damaged as disks and copies damage them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos_parts.plan import (
    COMMIT,
    CUT,
    DELETED,
    FLIP,
    META,
    MOMENTS,
    ORBAX,
    SHAPES,
    TRAINED,
    ZEROED,
)
from llamapro_jax.checkpoint_files import COMMIT_FILE, OPTIMIZER, TRAINABLE


def files(step: Path) -> dict[str, list[Path]]:
    """All files of a step, by what they are."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path for path in step.rglob("*") if path.is_file()):
        found.setdefault(_kind(file.relative_to(step)), []).append(file)
    return found


def _kind(file: Path) -> str:
    if file.parts == (COMMIT_FILE,):
        return COMMIT
    if file.parts == ("meta", "metadata"):
        return META
    if file.parts[1:2] == ("array_metadatas",):  # one for each process that saved
        return ORBAX
    if file.parts[0] in (TRAINABLE, OPTIMIZER) and len(file.parts) == 3:
        if file.name == ".zarray":
            return SHAPES
        if not file.name.startswith("."):
            return TRAINED if file.parts[0] == TRAINABLE else MOMENTS
    return ORBAX


def damage(file: Path, kind: str, draw: random.Random) -> str:
    """Does it. Returns it in words."""
    data = bytearray(file.read_bytes())
    if kind == DELETED:
        file.unlink()
        return "deleted"
    if kind == FLIP:
        bit = draw.randrange(8 * len(data)) if data else 0
        if data:
            data[bit // 8] ^= 1 << bit % 8
        what = f"bit {bit} flipped"
    elif kind == CUT:
        del data[draw.randrange(len(data)) if data else 0 :]
        what = f"cut to {len(data)} bytes"
    else:
        assert kind == ZEROED
        data = bytearray(len(data))
        what = "zeroed"
    file.write_bytes(data)
    return what


@contextmanager
def damaged(file: Path, kind: str, draw: random.Random) -> Iterator[str]:
    """While entered. Afterwards the file is as it was, wherever its directory went."""
    before = file.read_bytes()
    what = damage(file, kind, draw)
    try:
        yield what
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(before)


def records(run: Path) -> Path:
    """The file of a run's training rows."""
    return max(
        (file for file in (run / "data").rglob("*train*array_record*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )
