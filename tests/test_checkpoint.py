from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamapro_jax.checkpoint import (
    COMMIT_FILE,
    Checkpoints,
    abstract,
    committed_steps,
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


def restore(directory: Path, step: int, tree: Any = None, state: Any = None) -> Any:
    tree = trainable() if tree is None else tree
    with Checkpoints(directory, 5) as checkpoints:
        wanted = abstract((tree, optimizer_state(tree) if state is None else state))
        return checkpoints.restore(step, *wanted)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    tree, state = save(tmp_path, 3, 7)
    again, state_again, meta = restore(tmp_path, 7)
    assert_same(again, tree)
    assert_same(state_again, state)
    assert (meta["step"], meta["note"]) == (7, "step 7")


def test_a_save_survives_the_donation_of_what_it_saves(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    tree = trainable()
    wanted = jax.tree.map(np.array, tree)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, tree, {"count": jnp.ones(())}, {})
        for _ in range(5):
            tree = step(tree)
    again, _, _ = restore(tmp_path, 1, state={"count": jnp.ones(())})
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(wanted), strict=True):
        assert np.array_equal(a, b)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert committed_steps(tmp_path) == [3, 4]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest() == 4


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
        assert checkpoints.latest() == 3
        assert not (tmp_path / "9").exists()
        checkpoints.save(9, tree, optimizer_state(tree), {})
    assert committed_steps(tmp_path) == [3, 9]
    assert_same(restore(tmp_path, 9)[0], tree)


def other(**leaves: Any) -> dict[str, Any]:
    tree = trainable()
    new = {name: leaf for name, leaf in {**tree["new"][1], **leaves}.items() if leaf is not None}
    return {**tree, "new": [{}, new]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (other(norm=jnp.zeros((2, 2, 4))), r"new\.1\.norm has shape \(2, 2, 3\).*\(2, 2, 4\)"),
        (other(norm=jnp.zeros((2, 2, 3), jnp.bfloat16)), r"new\.1\.norm has dtype float32"),
        (other(k=jnp.zeros((2, 2, 3))), r"has no new\.1\.k, which this run trains"),
        (other(norm=None), r"has new\.1\.norm, which this run lacks"),
    ],
)
def test_another_tree_is_refused(tmp_path: Path, tree: Any, message: str) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        restore(tmp_path, 1, tree)


def test_another_optimizer_state_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"optimizer: has inner_states.*which this run lacks"):
        restore(tmp_path, 1, state={"momentum": jnp.zeros(3)})




def uncompressed_flip(step: Path) -> None:
    """Another value, stored properly: what a flipped bit in memory or on disk comes to."""
    import tensorstore

    leaf = step / "trainable" / "new.1.norm"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{leaf}/"}}
    array = tensorstore.open(spec, open=True, read=True, write=True).result()
    array[0, 0, 0].write(np.float32(array[0, 0, 0].read().result() + 1e-6)).result()


DAMAGE = {
    "a leaf cut short": lambda step: truncate(next((step / "trainable/new.1.q").glob("0*"))),
    "a leaf gone": lambda step: next((step / "trainable/new.1.q").glob("0*")).unlink(),
    "a leaf's directory gone": lambda step: shutil.rmtree(step / "trainable/new.1.norm"),
    "an item gone": lambda step: shutil.rmtree(step / "optimizer"),
    "the tree's record": lambda step: truncate(step / "trainable/_METADATA"),
    "the meta item": lambda step: truncate(step / "meta/metadata"),
    "a value": uncompressed_flip,
}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_found_and_the_step_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "2")
    with pytest.raises(UserError, match=rf"{tmp_path}/2: .*is damaged.*Remove this dir") as raised:
        restore(tmp_path, 2)
    if damage in ("a leaf cut short", "a value"):
        assert "trainable new.1." in str(raised.value)
    restore(tmp_path, 1)
    shutil.rmtree(tmp_path / "2")  # the mend that the message names
    with Checkpoints(tmp_path, 5) as checkpoints:
        assert checkpoints.latest() == 1


def test_a_save_that_cannot_be_written_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, state = save(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, 2) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(UserError, match="could not be written.*No space.*from step 1"):
            checkpoints.save(2, tree, state, {})
