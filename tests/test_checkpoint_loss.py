"""What must not be taken for damage, and what must not be taken for a run that saved nothing."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import optimizer_state, restore, save, trainable

from llamapro_jax import checkpoint, checkpoint_files
from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_files import (
    COMMIT_FILE,
    Damaged,
    committed_steps,
    missing_file,
    read_leaf,
    read_meta,
    steps_set_aside,
    stored_arrays,
)
from llamapro_jax.checkpoint_restore import (
    CheckpointLost,
    abstract,
    check_not_lost,
    restore_newest,
)
from llamapro_jax.remote import Unreachable
from llamapro_jax.verification.findings import Findings
from llamapro_jax.verification.runs import _check_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save(directory, 1, 2)
    return directory


@pytest.fixture
def steps(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# ------------------------------------------------------------------- trouble of this host


@contextmanager
def no_handles() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_a_file_handle_nothing_is_damaged(steps: Path) -> None:
    leaves = read_meta(steps / "2")["leaves"]["trainable"]
    arrays = stored_arrays(steps / "2", "trainable", leaves)
    for read in (
        lambda: read_meta(steps / "2"),
        lambda: stored_arrays(steps / "2", "trainable", leaves),
        lambda: read_leaf(arrays, "new.1.q"),
    ):
        with no_handles(), pytest.raises(Unreachable, match=r"Too many open.*|EXHAUSTED") as caught:
            read()
        assert caught.value.status == 2 and "ulimit -n" in str(caught.value)
    assert missing_file(steps / "2") is None


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), False),
        (MemoryError(), False),
        (OSError(errno.EIO, os.strerror(errno.EIO)), True),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), True),
    ],
)
def test_no_step_is_set_aside_for_what_ails_the_host(
    steps: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, damage: bool
) -> None:
    def read_bytes(file: Path) -> bytes:
        if file.parent.parent.name == "2":
            raise error
        return read(file)

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    if damage:
        with pytest.raises(Damaged):
            read_meta(steps / "2")
        assert restore(steps).step == 1
        return
    wanted = abstract((trainable(), optimizer_state(trainable())))
    with pytest.raises(Unreachable, match="says nothing about what is there"):
        restore_newest(steps, *wanted)
    assert (committed_steps(steps), steps_set_aside(steps)) == ([1, 2], [])


def test_an_array_that_memory_does_not_hold_is_not_damaged(
    steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = stored_arrays(steps / "2", "trainable", read_meta(steps / "2")["leaves"]["trainable"])

    def full(*_: Any) -> None:
        raise MemoryError("Unable to allocate 18 GiB")

    monkeypatch.setattr("llamapro_jax.flax_checkpoint._aligned_empty", full)
    with pytest.raises(Unreachable, match="Unable to allocate 18 GiB"):
        read_leaf(arrays, "new.1.q")


def test_a_step_of_which_the_store_says_nothing_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole: that is asked again, before the next save."""

    def silent(step: Path) -> None:
        asked.append(step.name)
        raise Unreachable("no answer")

    asked: list[str] = []
    told: list[tuple[int, str]] = []
    tree = trainable(1)
    with Checkpoints(tmp_path, 2, lambda *failed: told.append(failed)) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "missing_file", silent)
            checkpoints.save(1, tree, optimizer_state(tree), {})
            assert not checkpoints.wait()
        assert (asked, told) == (["1"] * 2, [(1, "no answer")])
        assert committed_steps(tmp_path) == [1] and checkpoints.saved is None
        checkpoints.save(1, tree, optimizer_state(tree), {})  # as the end of a run tries again
        assert checkpoints.wait() and checkpoints.saved == 1
        checkpoints.save(2, tree, optimizer_state(tree), {})
        assert checkpoints.wait() and checkpoints.saved == 2
    assert committed_steps(tmp_path) == [1, 2]


def test_what_is_known_to_be_half_written_goes_when_the_store_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(step: Path) -> None:
        raise Unreachable("no answer")

    tree = trainable(1)
    with Checkpoints(tmp_path, 2) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "missing_file", silent)
            checkpoints.save(1, tree, optimizer_state(tree), {})
            assert not checkpoints.wait()
        (tmp_path / "1/meta/metadata").unlink()
        checkpoints.save(2, tree, optimizer_state(tree), {})
    assert committed_steps(tmp_path) == [2] and not (tmp_path / "1").exists()


# ------------------------------------------------------------------- commit files that are lost


def test_a_copy_without_commit_files_is_not_a_run_that_saved_nothing(steps: Path) -> None:
    for step in ("1", "2"):
        (steps / step / COMMIT_FILE).unlink()
    for attempt in (lambda: check_not_lost(steps), lambda: restore_newest(steps, {}, {})):
        with pytest.raises(CheckpointLost, match=rf"steps 1, 2 are whole.*2/{COMMIT_FILE}") as lost:
            attempt()
        assert lost.value.status == 44
    findings = Findings("run", "run")
    _check_steps(findings, steps)
    assert [problem.found for problem in findings.problems] == [f"no {COMMIT_FILE}"] * 2
    (steps / "2" / COMMIT_FILE).touch()  # the mend that the message names
    check_not_lost(steps)
    assert restore(steps).step == 2


def one_step(steps: Path) -> None:
    shutil.rmtree(steps / "1")
    (steps / "2" / COMMIT_FILE).unlink()


def half_written(steps: Path) -> None:
    for step in ("1", "2"):
        (steps / step / COMMIT_FILE).unlink()
    (steps / "1/meta/metadata").unlink()


def beside_a_committed_one(steps: Path) -> None:
    (steps / "2" / COMMIT_FILE).unlink()


@pytest.mark.parametrize("do", [one_step, half_written, beside_a_committed_one])
def test_what_a_killed_save_left_goes_and_that_is_said(
    steps: Path, capsys: pytest.CaptureFixture[str], do: Callable[[Path], None]
) -> None:
    do(steps)
    gone = [path.name for path in sorted(steps.iterdir()) if not (path / COMMIT_FILE).exists()]
    check_not_lost(steps)
    with Checkpoints(steps, 2):
        pass
    assert re.search(rf"removed what no save finished: {', '.join(gone)}", capsys.readouterr().out)
    assert [path.name for path in steps.iterdir()] == ["1"][: do is beside_a_committed_one]


def test_a_leftover_that_cannot_be_removed_does_not_end_the_start(
    steps: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS keeps the files that a dying process has open, as .nfs*."""

    def busy(directory: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(directory))

    (steps / "2" / COMMIT_FILE).unlink()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(checkpoint_files.shutil, "rmtree", busy)
        assert checkpoint_files.remove_leftovers(steps) == []
    assert "is left of a save and cannot be removed" in caplog.text
    assert committed_steps(steps) == [1]
    save(steps, 2)  # it does not stand in the way
    assert restore(steps).step == 2
