"""The progress of preparing on a terminal."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from llamapro_jax.data.preparation import progress
from llamapro_jax.data.preparation.progress import Display
from llamapro_jax.data.preparation.shards import Seen


def test_name_share_and_time_fit_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Display("proof_pile_2", 4000) as display:
        display.add(Seen(documents=12345, bytes=1000, tokens=56789012))
        display._bar.refresh()
        shown = screen.getvalue()
    for figure in ("preparing proof_pile_2", "25%", "12,345 documents", "tokens/s", "left"):
        assert figure in shown, figure


def test_where_nothing_was_left_to_do_there_is_no_rate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = Seen(documents=3, bytes=100, tokens=20)
    with Display("prose", 100) as display:
        display.done_before(done)
    assert capsys.readouterr().err == "preparing prose: 100 %, 3 documents, 20 tokens\n"
    with Display("prose", 200) as display:
        display.done_before(done)
        display.add(done)
    assert "6 documents, 40 tokens, " in (errors := capsys.readouterr().err)
    assert errors.endswith(" tokens/s\n")
