"""Single bits of checkpoints flipped: each is refused, or changes no value that is restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_files import OPTIMIZER, TRAINABLE, committed_steps
from llamapro_jax.checkpoint_restore import Restored, _restore, abstract
from llamapro_jax.errors import UserError

# Small, so that the bits of the descriptions are a good part of all; two chunks and one.
SHAPES = {"q": (2, 2, 16, 24), "down": (1, 2, 24, 16), "norm": (2, 2, 16)}


def state(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    leaves = {k: jnp.asarray(rng.standard_normal(v, np.float32)) for k, v in SHAPES.items()}
    tree = {"base": [{}], "new": [leaves]}
    moments = jax.tree.map(lambda leaf: leaf * 0.5, tree)
    adam, *rest = optax.adam(1e-3).init(tree)
    return tree, (adam._replace(mu=moments, nu=tree, count=adam.count + seed), *rest)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Restored]:
    """A step on disk, and as it is restored when nothing is wrong with it."""
    directory = tmp_path_factory.mktemp("flips")
    tree, optimizer = state(3)
    with Checkpoints(directory, 2) as checkpoints:
        checkpoints.save(3, tree, optimizer, {"seconds": 12.5, "model_digest": "0f" * 32})
    wanted = {TRAINABLE: abstract(tree), OPTIMIZER: abstract(optimizer)}
    restored, problem = _restore(directory / "3", wanted)
    assert restored is not None and problem is None
    return directory, restored


def values(restored: Restored) -> Iterator[Any]:
    """All of it that comparing to the bit takes."""
    yield restored.step
    yield restored.meta
    for leaf in jax.tree.leaves((restored.trainable, restored.optimizer)):
        yield leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def outcome(directory: Path, clean: Restored, file: Path, bit: int) -> str:
    """ "refused" or "no effect"; anything else is an error."""
    wanted = {TRAINABLE: abstract(clean.trainable), OPTIMIZER: abstract(clean.optimizer)}
    flip(file, bit)
    try:
        restored, problem = _restore(directory / "3", wanted)
    except UserError:
        return "refused"
    finally:
        flip(file, bit)
    if problem is not None:
        return "refused"
    assert restored is not None
    assert list(values(restored)) == list(values(clean)), f"accepted: bit {bit} of {file}"
    return "no effect"


def drawn(directory: Path, number: int, seed: int) -> list[tuple[Path, int]]:
    """Bits of all files: half of them from a file drawn alike, half from a byte drawn alike."""
    draw = random.Random(seed)
    files = sorted(file for file in (directory / "3").rglob("*") if file.stat().st_size)
    files = [file for file in files if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    chosen = draw.choices(files, k=number // 2) + draw.choices(files, sizes, k=number // 2)
    return [(file, draw.randrange(file.stat().st_size * 8)) for file in chosen]


def check(saved: tuple[Path, Restored], number: int, seed: int) -> None:
    directory, clean = saved
    counts = {"refused": 0, "no effect": 0}
    for file, bit in drawn(directory, number, seed):
        counts[outcome(directory, clean, file, bit)] += 1
    # What holds values is most of the bytes; Orbax's own files are not read.
    assert counts["refused"] > number / 2 and counts["no effect"]
    assert committed_steps(directory) == [3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_is_refused_or_without_effect(saved: tuple[Path, Restored]) -> None:
    check(saved, 60, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_1000_flipped_bits_are_refused_or_without_effect(saved: tuple[Path, Restored]) -> None:
    check(saved, 1000, seed=1)


@pytest.mark.parametrize("where", ["first", "last"])
def test_the_commit_file_is_what_makes_a_step(saved: tuple[Path, Restored], where: str) -> None:
    """Its contents are of no use; a flipped bit in them is without effect."""
    directory, clean = saved
    file = directory / "3" / "commit_success.txt"
    bit = 0 if where == "first" else file.stat().st_size * 8 - 1
    assert outcome(directory, clean, file, bit) == "no effect"
