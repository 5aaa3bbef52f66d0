from __future__ import annotations

import pytest

from llamapro_jax.evaluation import progress


def test_without_a_terminal_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.tracked(range(5), "code")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines() == [
        "code: 1 of 5 batches, 0:02:40 left",
        "code: 3 of 5 batches, 0:00:53 left",
    ]
