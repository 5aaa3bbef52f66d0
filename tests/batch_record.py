"""What every global batch of a run was, written down by all its processes and put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def record(step: int, batch: Mapping[str, Any], file: Path) -> None:
    """Adds a line with a hash of each row of the batch that lies on a device of this process."""
    parts: dict[int, dict[str, bytes]] = {}
    for name, array in batch.items():
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            for row, data in enumerate(np.asarray(shard.data), start=first):
                parts.setdefault(row, {})[name] = data.tobytes()
    rows = {
        row: hashlib.sha256(b"".join(of[name] for name in sorted(of))).hexdigest()
        for row, of in parts.items()
    }
    with file.open("a") as lines:
        lines.write(json.dumps({"step": step, "rows": rows}) + "\n")


def global_hashes(files: Iterable[Path], batch_size: int) -> dict[int, str]:
    """A hash of the whole batch by its step. All processes agree, and no row is missing."""
    steps: dict[int, dict[int, str]] = {}
    for file in files:
        for line in map(json.loads, file.read_text().splitlines()):
            found = steps.setdefault(line["step"], {})
            for row, digest in line["rows"].items():
                assert found.setdefault(int(row), digest) == digest, (file, line["step"], row)
    for step, rows in steps.items():
        assert sorted(rows) == list(range(batch_size)), (step, sorted(rows))
    return {
        step: hashlib.sha256("".join(rows[b] for b in sorted(rows)).encode()).hexdigest()
        for step, rows in sorted(steps.items())
    }
