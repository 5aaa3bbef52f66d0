"""What happened to a run beside its training: `events.jsonl`, one JSON object a line.

    {"event": "step set aside", "step": 8, "time": "2026-01-31T12:00:00+00:00", "reason": ...}

Unlike `metrics.jsonl` it is never cut back: that one says what an undisturbed run would have
written, this one what disturbed it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llamapro_jax.launch.processes import is_first

EVENTS_FILE = "events.jsonl"

SET_ASIDE = "step set aside"
SAVE_FAILED = "save failed"
METRICS_LOST = "metrics lost"
LENGTHENED = "made longer"
TAKEN_OVER = "taken over"


def record_event(directory: Path, event: str, step: int, **details: Any) -> None:
    """Appends a line on the first process. Where that cannot be written, training goes on."""
    if not is_first():
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"event": event, "step": step, "time": now, **details}, ensure_ascii=False)
    path = directory / EVENTS_FILE
    try:
        # A process that was killed may have left a part of a line.
        cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + line + "\n")
    except OSError as error:  # a full disk is what some events are about
        print(f"warning: {path}: {error.strerror}: {line}", flush=True)


def read_events(directory: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a run in order, all or those of one name. A line cut short is left out."""
    file = directory / EVENTS_FILE
    lines = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = []
    for line in lines.splitlines():
        try:
            found.append(dict(json.loads(line)))
        except ValueError:
            continue
    return [record for record in found if event in (None, record.get("event"))]
