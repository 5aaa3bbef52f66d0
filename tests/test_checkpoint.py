from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import full_disk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamapro_jax import checkpoint
from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_files import (
    COMMIT_FILE,
    committed_steps,
    first_line,
    read_meta,
    steps_set_aside,
    verify_step,
)
from llamapro_jax.checkpoint_restore import (
    CheckpointLost,
    Restored,
    abstract,
    check_not_lost,
    restore_newest,
)
from llamapro_jax.errors import UserError
from llamapro_jax.flax_checkpoint import StackedArrays

# A leaf of more than a megabyte is written in chunks.
BLOCK = (512, 768)


def trainable(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    return {"base": [{}, {}], "new": [{}, {"q": draw(2, 2, *BLOCK), "norm": draw(2, 2, 3)}]}


def optimizer_state(tree: Any) -> Any:
    """With what makes a state hard to keep: empty and masked nodes, an integer count."""
    labels = jax.tree.map(lambda _: "train", tree)
    adamw = optax.adamw(1e-3, mask=lambda t: jax.tree.map(lambda x: x.ndim > 3, t))
    train = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return optax.multi_transform({"train": train, "freeze": optax.set_to_zero()}, labels).init(tree)


def save(directory: Path, *steps: int, keep: int = 5) -> tuple[Any, Any]:
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            tree = trainable(step)
            checkpoints.save(step, tree, optimizer_state(tree), {"note": f"step {step}"})
    return tree, optimizer_state(tree)


def restore(directory: Path, tree: Any = None, state: Any = None) -> Restored:
    """The newest step, whatever was set aside for it."""
    tree = trainable() if tree is None else tree
    wanted = abstract((tree, optimizer_state(tree) if state is None else state))
    restored = restore_newest(directory, *wanted)
    assert restored is not None
    return restored


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    tree, state = save(tmp_path, 3, 7)
    again = restore(tmp_path)
    assert again.step == 7
    assert_same(again.trainable, tree)
    assert_same(again.optimizer, state)
    assert (again.meta["step"], again.meta["note"]) == (7, "step 7")
    assert verify_step(tmp_path / "7") == []


def test_a_save_survives_the_donation_of_what_it_saves(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    tree = trainable()
    wanted = jax.tree.map(np.array, tree)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, tree, {"count": jnp.ones(())}, {})
        for _ in range(5):
            tree = step(tree)
    again = restore(tmp_path, state={"count": jnp.ones(())})
    for a, b in zip(jax.tree.leaves(again.trainable), jax.tree.leaves(wanted), strict=True):
        assert np.array_equal(a, b)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=3)
    assert committed_steps(tmp_path) == [2, 3, 4]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "3", "4"]


def test_two_are_kept_until_a_run_ends_whatever_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep=1)
    assert committed_steps(tmp_path) == [2, 3]
    with Checkpoints(tmp_path, 1) as checkpoints:
        tree = trainable()
        checkpoints.save(4, tree, optimizer_state(tree), {})
        checkpoints.finish()
        assert committed_steps(tmp_path) == [4]


def test_an_older_step_goes_only_for_one_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2, keep=2)
    tree, failed = trainable(), []
    with Checkpoints(tmp_path, 2, lambda *told: failed.append(told)) as checkpoints:
        checkpoints.save(3, tree, optimizer_state(tree), {})
        while not (tmp_path / "3" / COMMIT_FILE).exists():
            time.sleep(0.01)
        next((tmp_path / "3/trainable/new.1.q").glob("0*")).unlink()
        assert not checkpoints.wait()
    assert failed == [(3, "trainable new.1.q: has 3 of 4 files")]
    assert committed_steps(tmp_path) == [1, 2]


def test_a_block_can_be_read_alone(tmp_path: Path) -> None:
    tree, _ = save(tmp_path, 1)
    arrays = StackedArrays(tmp_path / "1" / "trainable")
    q = tree["new"][1]["q"]
    assert np.array_equal(arrays.read("new.1.q", (1, 0)), q[1, 0])
    layout = json.loads((tmp_path / "1/trainable/new.1.q/.zarray").read_text())
    assert layout["chunks"] == [1, 1, *BLOCK]


def test_a_save_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 1)
    assert not [r.message for r in caplog.records if r.name == "absl"]


@pytest.mark.parametrize("left", ["an empty directory", "no commit file"])
def test_a_step_that_was_not_saved_to_its_end_does_not_exist(tmp_path: Path, left: str) -> None:
    tree, _ = save(tmp_path, 3)
    if left == "no commit file":
        shutil.copytree(tmp_path / "3", tmp_path / "9")
        (tmp_path / "9" / COMMIT_FILE).unlink()
    else:
        (tmp_path / "9").mkdir()
    assert committed_steps(tmp_path) == [3]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert not (tmp_path / "9").exists()
        checkpoints.save(9, tree, optimizer_state(tree), {})
    assert committed_steps(tmp_path) == [3, 9]
    assert_same(restore(tmp_path).trainable, tree)


def other(**leaves: Any) -> dict[str, Any]:
    tree = trainable()
    new = {name: leaf for name, leaf in {**tree["new"][1], **leaves}.items() if leaf is not None}
    return {**tree, "new": [{}, new]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (other(norm=jnp.zeros((2, 2, 4))), r"new\.1\.norm has shape \[2, 2, 3\].*\[2, 2, 4\]"),
        (other(norm=jnp.zeros((2, 2, 3), jnp.bfloat16)), r"new\.1\.norm has dtype float32"),
        (other(k=jnp.zeros((2, 2, 3))), r"has no new\.1\.k, which this run trains"),
        (other(norm=None), r"has new\.1\.norm, which this run lacks"),
    ],
)
def test_another_tree_is_refused(tmp_path: Path, tree: Any, message: str) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        restore(tmp_path, tree)
    assert committed_steps(tmp_path) == [1]


def test_another_optimizer_state_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"optimizer: has inner_states.*which this run lacks"):
        restore(tmp_path, state={"momentum": jnp.zeros(3)})


# ------------------------------------------------------------------- damage


def other_value(step: Path) -> None:
    """Stored properly: what a flipped bit in memory comes to."""
    import tensorstore

    leaf = step / "trainable" / "new.1.norm"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{leaf}/"}}
    array = tensorstore.open(spec, open=True, read=True, write=True).result()
    array[0, 0, 0].write(np.float32(array[0, 0, 0].read().result() + 1e-6)).result()


def edited(step: Path, **values: Any) -> None:
    file = step / "meta/metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


# Each kind of file that is read.
FILES = {
    "a chunk": ("trainable/new.1.q/0.1.0.0", r"trainable new\.1\.q"),
    "a small chunk": ("trainable/new.1.norm/0.0.0", r"trainable new\.1\.norm"),
    "the optimizer's": ("optimizer/inner_states.train.inner_state.1.0.count/0", r"0\.count"),
    "an array's description": ("trainable/new.1.q/.zarray", r"trainable new\.1\.q"),
    "the meta item": ("meta/metadata", "meta/metadata"),
}
DAMAGE = {
    f"{name}: {action.__name__}": (lambda step, f=file, do=action: do(step / f), message)
    for name, (file, message) in FILES.items()
    for action in (truncate, zero, flip, Path.unlink)
} | {
    "a leaf gone": (lambda step: shutil.rmtree(step / "trainable/new.1.norm"), r"new\.1\.norm"),
    "an item gone": (lambda step: shutil.rmtree(step / "optimizer"), "optimizer inner_states"),
    "the meta item gone": (lambda step: shutil.rmtree(step / "meta"), "meta/metadata"),
    "another value": (other_value, r"trainable new\.1\.norm: its checksum is not that saved"),
    "another time": (lambda step: edited(step, note="other"), "its digest is not that saved"),
    "another step": (
        lambda step: shutil.copytree(step.parent / "1/meta", step / "meta", dirs_exist_ok=True),
        "is that of step 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_step_is_set_aside_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    do, message = DAMAGE[damage]
    save(tmp_path, 1, 2)
    do(tmp_path / "2")
    assert any(re.search(message, line) for line in verify_step(tmp_path / "2"))
    told: list[tuple[int, str]] = []
    wanted = abstract((trainable(), optimizer_state(trainable())))
    restored = restore_newest(tmp_path, *wanted, lambda *aside: told.append(aside))
    assert restored is not None and restored.step == 1
    assert_same(restored.trainable, trainable(1))
    [(step, reason)] = told
    assert step == 2 and re.search(message, reason)
    assert (committed_steps(tmp_path), steps_set_aside(tmp_path)) == ([1], ["2.damaged"])
    # It does not stand in the way of the same step saved again, nor is it lost by that.
    tree = trainable(2)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(2, tree, optimizer_state(tree), {})
    assert steps_set_aside(tmp_path) == ["2.damaged"]
    assert restore(tmp_path).step == 2


# What Orbax writes beside the arrays is of no use to a restore, and so of no harm.
UNREAD = ("_CHECKPOINT_METADATA", "trainable/_METADATA", "trainable/_sharding")


@pytest.mark.parametrize("file", UNREAD)
def test_damage_to_what_is_not_read_is_without_effect(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1)
    zero(tmp_path / "1" / file)
    assert_same(restore(tmp_path).trainable, trainable(1))
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(2, trainable(2), optimizer_state(trainable(2)), {})
    assert committed_steps(tmp_path) == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_when_no_step_is_left_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    wanted = abstract((trainable(), optimizer_state(trainable())))
    assert restore_newest(tmp_path, *wanted) is None
    check_not_lost(tmp_path)
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip(tmp_path / step / "trainable/new.1.norm/0.0.0")
    for attempt in (partial(restore_newest, tmp_path, *wanted), partial(check_not_lost, tmp_path)):
        with pytest.raises(CheckpointLost, match=r"set aside: 1\.damaged, 2\.damaged") as lost:
            attempt()
        assert lost.value.status == 44
    # The mend that the message names.
    flip(tmp_path / "2.damaged/trainable/new.1.norm/0.0.0")
    (tmp_path / "2.damaged").rename(tmp_path / "2")
    assert restore(tmp_path).step == 2


def test_leftovers_of_dead_saves_and_deletions_go(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".deleted-0", "trainable.orbax-checkpoint-tmp-7", "9", "3.damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / ".deleted-0" / COMMIT_FILE).touch()
    with Checkpoints(tmp_path, 2):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "3.damaged"]


# ------------------------------------------------------------------- saves that fail


disk = full_disk.fixture()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_save_is_told_at_once_and_the_next_one_succeeds(
    tmp_path: Path, disk: full_disk.Disk, caplog: pytest.LogCaptureFixture
) -> None:
    tree, state = save(tmp_path, 1, 2)
    failed: list[tuple[int, str]] = []
    with Checkpoints(tmp_path, 2, lambda *told: failed.append(told)) as checkpoints:
        disk.limit(2**20)
        checkpoints.save(3, tree, state, {})
        wait_for(lambda: failed)  # nobody asked
        disk.mend()
        assert failed[0][0] == 3 and "new.1.q" in failed[0][1]
        assert not checkpoints.wait() and checkpoints.saved is None
        assert committed_steps(tmp_path) == [1, 2] and not (tmp_path / "3").exists()
        checkpoints.save(4, trainable(4), optimizer_state(trainable(4)), {})
        assert checkpoints.wait() and checkpoints.saved == 4
        # One more is again the first.
        disk.limit(2**20)
        checkpoints.save(5, tree, state, {})
        assert not checkpoints.wait()
        disk.mend()
    assert committed_steps(tmp_path) == [2, 4] and len(failed) == 2
    assert_same(restore(tmp_path).trainable, trainable(4))
    assert not [r.getMessage() for r in caplog.records if r.name == "absl"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_twice_ends_the_run(tmp_path: Path, disk: full_disk.Disk) -> None:
    tree, state = save(tmp_path, 1)
    with Checkpoints(tmp_path, 2) as checkpoints:
        disk.limit(2**20)
        checkpoints.save(2, tree, state, {})
        checkpoints.save(3, tree, state, {})
        with pytest.raises(UserError, match="steps 2 and 3 could not be.*goes on from step 1"):
            checkpoints.wait()
        disk.mend()
    assert committed_steps(tmp_path) == [1]


def test_room_is_looked_for_ahead_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, state = save(tmp_path, 1)
    bytes_needed = sum(leaf.nbytes for leaf in jax.tree.leaves((tree, state)))
    free = [bytes_needed - 1, bytes_needed, 0, 0]
    usage = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free.pop(0)))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage.disk_usage)
    failed: list[tuple[int, str]] = []
    with Checkpoints(tmp_path, 2, lambda *told: failed.append(told)) as checkpoints:
        checkpoints.save(2, tree, state, {})
        assert failed == [(2, "it takes 0.0189 GB, and 0.0189 GB are free")]
        checkpoints.save(3, tree, state, {})
        assert checkpoints.wait()
        checkpoints.save(4, tree, state, {})
        with pytest.raises(UserError, match=r"steps 4 and 5 .*it takes .* GB, and 0 GB are free"):
            checkpoints.save(5, tree, state, {})
    assert committed_steps(tmp_path) == [1, 3]


def test_where_a_file_system_does_not_say_its_room_the_save_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(path: Path) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", unknown)
    save(tmp_path, 1)
    assert committed_steps(tmp_path) == [1]


def test_a_step_of_an_earlier_format_is_refused_not_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "1/meta/metadata").write_text('{"step": 1, "checksums": {}}')
    with pytest.raises(UserError, match="was saved by an earlier version"):
        restore(tmp_path)
    assert committed_steps(tmp_path) == [1]


def test_meta_has_what_every_leaf_was(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leaves = read_meta(tmp_path / "1")["leaves"]
    assert leaves["trainable"]["new.1.norm"]["shape"] == [2, 2, 3]
    assert {leaf["dtype"] for leaf in leaves["optimizer"].values()} == {"float32", "int32"}


def test_what_is_not_permitted_is_neither_committed_nor_deleted(tmp_path: Path) -> None:
    """Another run may have taken the directory over at any time, the last one just before the
    commit."""

    class Gone(UserError):
        pass

    def permitted() -> None:
        asked.append(1)
        if len(asked) > limit:
            raise Gone("another run's")

    told: list[Any] = []
    tree = trainable()
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, tree, optimizer_state(tree), {})
    asked, limit = [], 2  # to open, and to begin

    def failed(*save: Any) -> None:
        told.append(save)

    with pytest.raises(Gone):
        with Checkpoints(tmp_path, 2, failed, permitted) as checkpoints:
            checkpoints.save(2, tree, optimizer_state(tree), {})
            checkpoints.wait()
    assert len(asked) >= 4 and told == []
    assert committed_steps(tmp_path) == [1] and (tmp_path / "2/trainable").is_dir()
    before = sorted(tmp_path.iterdir())
    asked, limit = [], 1
    with pytest.raises(Gone):
        with Checkpoints(tmp_path, 2, permitted=permitted) as checkpoints:
            checkpoints.save(3, tree, optimizer_state(tree), {})
    assert sorted(tmp_path.iterdir()) == [entry for entry in before if entry.name != "2"]
    asked, limit = [], 0
    with pytest.raises(Gone):
        Checkpoints(tmp_path, 2, permitted=permitted)


def test_a_directory_that_cannot_be_read_is_a_failed_save(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    readable = True

    def permitted() -> None:
        if not readable:
            raise OSError(5, "Input/output error")

    trees = trainable(), optimizer_state(trainable())
    with Checkpoints(
        tmp_path, 5, lambda step, reason: told.append((step, reason)), permitted
    ) as checkpoints:
        checkpoints.save(1, *trees, {})
        assert checkpoints.wait() and checkpoints.saved == 1
        readable = False
        checkpoints.save(2, *trees, {})  # nothing is begun
        assert not checkpoints.wait()
        readable = True
        checkpoints.save(3, *trees, {})
        assert checkpoints.wait()
        checkpoints.save(4, *trees, {})
        checkpoints._under_way.end()  # type: ignore[union-attr]
        readable = False
        assert not checkpoints.wait()  # nobody knows
        assert checkpoints.saved == 3
        readable = True
        checkpoints.save(4, *trees, {})
        assert checkpoints.wait() and checkpoints.saved == 4
        # Two in a row end the run all the same.
        readable = False
        checkpoints.save(5, *trees, {})
        with pytest.raises(UserError, match=r"steps 5 and 6 could not be written .*Input/output"):
            checkpoints.save(6, *trees, {})
    assert committed_steps(tmp_path) == [1, 3, 4]
    assert [step for step, _ in told] == [2, 4, 5, 6]
    assert all("Input/output error" in reason for _, reason in told)


def test_the_reason_is_not_cut_off_behind_long_paths() -> None:
    path = "/" + "long/" * 60
    error = (
        f'RESOURCE_EXHAUSTED: Error writing local file "{path}": Failed writing: "{path}": '
        "No space left on device [OS error 28: ENOSPC] "
        "[source locations='" + "x.cc:1\\n" * 40 + "']\nmore"
    )
    line = first_line(ValueError(error))
    assert line.startswith("RESOURCE_EXHAUSTED: Error writing") and len(line) < 260
    assert line.endswith("No space left on device [OS error 28: ENOSPC]")
    assert first_line("disk full\n") == "disk full" and first_line(KeyError()) == "KeyError"
