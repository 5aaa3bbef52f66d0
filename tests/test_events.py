"""What disturbed a run: `llamapro_jax.training.events`."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from llamapro_jax.training.events import EVENTS_FILE, read_events, record_event


def test_events_are_read_in_order_and_by_name(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    record_event(tmp_path, "one", 3, reason="a\nline")
    record_event(tmp_path, "other", 4)
    record_event(tmp_path, "one", 5)
    assert [(e["event"], e["step"]) for e in read_events(tmp_path)] == [
        ("one", 3), ("other", 4), ("one", 5),
    ]
    first, last = read_events(tmp_path, "one")
    assert first["reason"] == "a\nline" and last["step"] == 5
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert len((tmp_path / EVENTS_FILE).read_text().splitlines()) == 3


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    record_event(tmp_path, "one", 1)
    file = tmp_path / EVENTS_FILE
    file.write_text(file.read_text() + json.dumps({"event": "one", "step": 2})[:-4])
    record_event(tmp_path, "one", 3)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]


def test_an_event_that_cannot_be_written_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / EVENTS_FILE).mkdir()
    record_event(tmp_path, "save failed", 7, reason="full")
    said = capsys.readouterr().out
    assert said.startswith("warning:") and '"step": 7' in said
