"""Grow, train, grow again, train again, tune all of it: what must stay has stayed, to the bit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import read_torch
from runs import run_config, write_model, write_texts

from llamapro_jax import load
from llamapro_jax.delta import apply_delta, write_delta
from llamapro_jax.errors import UserError
from llamapro_jax.expand import expand
from llamapro_jax.export import export
from llamapro_jax.inspect import describe
from llamapro_jax.model.weights import Tensor, block_weights
from llamapro_jax.sources import base_is_original, open_source
from llamapro_jax.training.loop import train
from llamapro_jax.views import Until

# 32 of them: below about 24, with weights as small as these, XLA compiles a whole loop over blocks
# as one kernel with matrix products of its own (docs/decisions.md), which rounds otherwise.
TOKENS = np.random.default_rng(1).integers(3, 280, (2, 32), dtype=np.int32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base (bfloat16) -> model -> run one -> model two -> run two, 20 steps each."""
    place = tmp_path_factory.mktemp("progressive")
    write_texts(place / "texts")
    write_model(place, dtype=ml_dtypes.bfloat16)
    train(run_config(place / "model", place / "texts", place / "one", training__steps=20))
    expand(str(place / "one"), place / "grown", positions=[2, 5])
    train(run_config(place / "grown", place / "texts", place / "two", training__steps=20))
    return place


def test_a_run_grown_again_computes_what_it_did(place: Path) -> None:
    """What grows is the run in its base's dtype, as its export is."""
    export(str(place / "one"), place / "exported one")
    expected = load(str(place / "exported one")).logits(TOKENS)
    grown = load(str(place / "grown")).logits(TOKENS)
    np.testing.assert_array_equal(np.asarray(grown), np.asarray(expected))
    assert np.abs(np.asarray(expected)).max() > 0.5


def test_only_the_second_generation_trained(place: Path) -> None:
    base, one = open_source(str(place / "base")), open_source(str(place / "one"))
    before, two = open_source(str(place / "grown")), open_source(str(place / "two"))
    assert [b.generation for b in two.plan.blocks] == [0, 0, 1, 2, 0, 0, 1, 2]
    assert Until(two, 1).fingerprint() == one.fingerprint()
    assert Until(two, 0).fingerprint() == base.fingerprint()
    changed = before.fingerprint().difference(two.fingerprint())
    new = {Tensor(w, d).name for d in two.plan.new_depths for w in block_weights(two.config)}
    assert set(changed) == new


@pytest.mark.parametrize(("generation", "same_as"), [(0, "base"), (1, "one")])
def test_an_earlier_generation_comes_back_bit_for_bit(
    place: Path, generation: int, same_as: str
) -> None:
    export(str(place / same_as), place / f"as {generation}")
    expected = load(str(place / f"as {generation}")).logits(TOKENS)
    earlier = load(str(place / "two"), generation=generation).logits(TOKENS)
    np.testing.assert_array_equal(np.asarray(earlier), np.asarray(expected))
    now = load(str(place / "two")).logits(TOKENS)
    assert not np.array_equal(np.asarray(earlier), np.asarray(now))


def test_transformers_reads_the_export_of_two_generations(place: Path) -> None:
    torch = pytest.importorskip("torch")
    done = export(str(place / "two"), place / "exported two")
    assert done.dtype == "bfloat16" and done.largest_difference == 0
    with torch.no_grad():
        theirs = read_torch(place / "exported two")(torch.from_numpy(TOKENS).long()).logits
    ours = load(str(place / "exported two")).logits(TOKENS)
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=1e-4)


def test_the_second_generation_alone_goes_onto_the_first(place: Path) -> None:
    export(str(place / "one"), place / "first")
    write_delta(str(place / "two"), place / "delta")
    written = apply_delta(str(place / "first"), place / "delta", place / "applied")
    assert written == open_source(str(place / "two")).fingerprint()
    with pytest.raises(UserError, match="generations"):
        apply_delta(str(place / "base"), place / "delta", place / "x")


def test_a_float32_export_has_what_was_trained(place: Path) -> None:
    """A cast starts from the float32 that trained, not from its copy in the base's bfloat16."""
    export(str(place / "one"), place / "wide", dtype="float32")
    wide, masters = open_source(str(place / "wide")), open_source(str(place / "one"), masters=True)
    for depth in masters.plan.new_depths:
        for weight in block_weights(masters.config):
            tensor = Tensor(weight, depth)
            np.testing.assert_array_equal(wide.read(tensor), masters.read(tensor))


def test_tuning_all_of_a_run_needs_no_export_between(place: Path) -> None:
    """LLaMA Pro -> Instruct: `model:` is the run itself, in the precision it was trained in."""
    config = run_config(
        place / "one", place / "texts", place / "instruct", trainable="all", training__steps=3
    )
    train(config)
    tuned = open_source(str(place / "instruct"))
    assert base_is_original(open_source(str(place / "one"))) and not base_is_original(tuned)
    assert not describe(str(place / "instruct"))["base_is_original"]
    before = open_source(str(place / "one")).fingerprint()
    assert before.difference(tuned.fingerprint())  # the base too has moved
    masters = open_source(str(place / "one"), masters=True)
    depth = masters.plan.new_depths[0]
    (q,) = (w for w in block_weights(masters.config) if w.name == "q")
    assert masters.read(Tensor(q, depth)).dtype == np.float32
