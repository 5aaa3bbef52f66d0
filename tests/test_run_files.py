"""The copying of a run's own files to a store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from llamapro_jax.remote import RemotePath
from llamapro_jax.training import run_files
from llamapro_jax.training.run_files import RunFiles


@pytest.fixture
def place() -> Iterator[RunFiles]:
    files = fsspec.filesystem("memory")
    with RunFiles("memory://store/run") as place:
        place.files.mkdir()
        yield place
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def in_store(place: RunFiles) -> set[str]:
    assert isinstance(place.run, RemotePath)
    return set(place.run.files())


def test_a_file_that_vanishes_while_it_is_copied_is_passed_over(
    place: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("events.jsonl", "passing.tmp", "metrics.jsonl"):
        (place.files / name).write_text(name)
    put = RemotePath.put

    def vanishing(self: RemotePath, file: Path) -> None:
        if file.name == "passing.tmp":
            file.unlink()
        put(self, file)

    with monkeypatch.context() as inner:
        inner.setattr(RemotePath, "put", vanishing)
        place.copy()
    assert in_store(place) == {"events.jsonl", "metrics.jsonl"}
    (place.files / "passing.tmp").write_text("here again")
    place.copy()
    assert "passing.tmp" in in_store(place)


def test_the_copying_goes_on_after_an_error(
    place: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_files, "EVERY", 0.05)
    tried = []
    copy = RunFiles.copy

    def failing_once(self: RunFiles) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise OSError(5, "Input/output error")
        copy(self)

    monkeypatch.setattr(RunFiles, "copy", failing_once)
    (place.files / "events.jsonl").write_text("a line")
    place.keep_copying()
    deadline = time.monotonic() + 20
    while "events.jsonl" not in in_store(place) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(tried) > 1 and "events.jsonl" in in_store(place)
