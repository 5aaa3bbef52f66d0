"""The Python interface: open a model, take logits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_tiny
from models import disturbed, english, expand_to, random_model, save, write_with_tokenizer

import llamapro_jax
from llamapro_jax import UserError, generate
from llamapro_jax.evaluation import texts as evaluate
from llamapro_jax.expansion import Insertion, spread
from llamapro_jax.model import api
from llamapro_jax.model.api import load
from llamapro_jax.sampling import Sampling
from llamapro_jax.sinks import copy
from llamapro_jax.sources import altered_by, open_hf, open_source
from llamapro_jax.views import Expanded, Strength

TOKENS = np.random.default_rng(3).integers(0, 101, (2, 9), dtype=np.int32)


def bits(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint32)


def test_logits_take_any_integers_and_are_float32(tmp_path: Path) -> None:
    model = llamapro_jax.load(str(write_tiny(tmp_path / "model")))
    expected = model.logits(TOKENS)
    assert expected.shape == (2, 9, 101) and expected.dtype == jnp.float32
    for tokens in (TOKENS.astype(np.int64), TOKENS.tolist(), jnp.asarray(TOKENS)):
        np.testing.assert_array_equal(bits(model.logits(tokens)), bits(expected))


def test_logits_at_a_position_depend_on_earlier_tokens_alone(tmp_path: Path) -> None:
    model = random_model(tmp_path, spread(4, 2))
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 101
    before, after = np.asarray(model.logits(TOKENS)), np.asarray(model.logits(changed))
    np.testing.assert_array_equal(bits(before[:, :5]), bits(after[:, :5]))
    assert (before[:, 5:] != after[:, 5:]).any(axis=(0, 2)).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"shape \[3\].*\[B, T\]"),
        (np.zeros((2, 0), np.int32), r"shape \[2, 0\]"),
        ([[1, 2], [3]], "differ in length"),
        ([[1.0, 2.0]], "float64; they must be integers"),
        ([[1, 101]], "id 101 is not in the vocabulary, which has 101"),
        ([[-1, 5]], "id -1 is not"),
    ],
)
def test_bad_tokens_are_refused(tokens: Any, message: str, tmp_path: Path) -> None:
    model = load(str(write_tiny(tmp_path / "model")))
    with pytest.raises(UserError, match=message):
        model.logits(tokens)


def test_a_shape_compiles_once_for_all_models_of_its_sizes(tmp_path: Path) -> None:
    first = load(str(write_tiny(tmp_path / "a", seed=0)))
    second = load(str(write_tiny(tmp_path / "b", seed=1)))
    first.logits(TOKENS)
    programs = api._logits._cache_size()
    assert not np.array_equal(first.logits(TOKENS), second.logits(TOKENS))
    assert api._logits._cache_size() == programs
    first.logits(TOKENS[:, :5])
    assert api._logits._cache_size() == programs + 1


def test_dtype_is_that_of_the_parameters_and_of_the_computation(tmp_path: Path) -> None:
    path = str(write_tiny(tmp_path / "model"))
    exact, rough = load(path), load(path, dtype="bfloat16")
    assert exact.params["embed"].dtype == jnp.float32
    assert rough.params["base"][0]["q"].dtype == jnp.bfloat16
    difference = np.abs(np.asarray(exact.logits(TOKENS)) - np.asarray(rough.logits(TOKENS)))
    assert rough.logits(TOKENS).dtype == jnp.float32 and 1e-4 < difference.max() < 1
    with pytest.raises(UserError, match="dtype is 'int8'; it must be one of float32, bfloat16"):
        load(path, dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_float32_on_every_device(dtype: str, tmp_path: Path) -> None:
    """What a program asks of the device: by default TPUs and GPUs round float32 factors."""
    model = load(str(write_tiny(tmp_path / "model")), dtype=dtype)
    program = generate.Program(model.config, model.plan.segments, model.dtype, True)
    static = {"config": model.config, "segments": model.plan.segments, "dtype": model.dtype}
    x_BTD, head_VD = jnp.zeros((1, 4, 32), model.dtype), model.params["embed"]
    batch = {name: TOKENS for name in ("tokens", "positions", "segment_ids")}
    draw = Sampling().draw(101)
    lowered = {
        "logits": api._logits.lower(model.params, TOKENS, with_new=True, **static),
        "prefill": generate._prefill.lower(program, model.params, TOKENS[:1], 9, draw),
        "states": evaluate._states.lower(model.params, batch, 1.0, with_new=True, **static),
        "compare": evaluate._compare.lower(x_BTD, head_VD, x_BTD, head_VD, TOKENS[:1, :4]),
    }
    for name, one in lowered.items():
        products = [line for line in one.as_text().splitlines() if "dot_general" in line]
        exact = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
        assert products and exact == [dtype == "float32"] * len(products), name


@pytest.mark.parametrize("insertions", [spread(4, 2), spread(4, 1), spread(4, 4, 2)])
def test_without_its_new_blocks_it_is_the_base_to_the_bit(
    insertions: tuple[Insertion, ...], tmp_path: Path
) -> None:
    model = random_model(tmp_path, insertions)
    base = load(str(tmp_path / "base"))
    off = model.logits(TOKENS, new_blocks=False)
    np.testing.assert_array_equal(bits(off), bits(base.logits(TOKENS)))
    assert not np.array_equal(off, model.logits(TOKENS))


def test_formats_and_generations_give_the_same_logits(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    grown = expand_to(base, tmp_path / "grown")
    copy(open_hf(str(grown)), tmp_path / "flax", "flax", lineage=(), progress=False)
    expected = bits(load(str(base)).logits(TOKENS))
    for path in ("grown", "flax"):
        model = load(str(tmp_path / path))
        assert model.plan.num_new == 2 and model.config.num_blocks == 6
        np.testing.assert_array_equal(bits(model.logits(TOKENS)), expected)
        before = load(str(tmp_path / path), generation=0)
        assert before.plan.num_new == 0 and before.config.num_blocks == 4
        np.testing.assert_array_equal(bits(before.logits(TOKENS)), expected)
    with pytest.raises(UserError, match="generation 2 does not exist; this model has 0 to 1"):
        load(str(grown), generation=2)


def test_strength_scales_what_the_new_blocks_add(tmp_path: Path) -> None:
    grown = expand_to(write_tiny(tmp_path / "base"), tmp_path / "grown")
    model = disturbed(load(str(grown)))
    path = save(model, tmp_path / "model")
    half = load(str(path), strength=0.5)
    assert isinstance(half.source, Strength)
    whole = load(str(path)).params["new"][1]["o"]
    np.testing.assert_array_equal(half.params["new"][1]["o"], whole * 0.5)
    np.testing.assert_array_equal(half.params["new"][1]["q"], model.params["new"][1]["q"])
    off = load(str(path), strength=0.0).logits(TOKENS)
    np.testing.assert_array_equal(bits(off), bits(model.logits(TOKENS, new_blocks=False)))
    with pytest.raises(UserError, match="strength is 1.5; it must be between 0 and 1"):
        load(str(path), strength=1.5)
    with pytest.raises(UserError, match="has no new blocks"):
        load(str(path), strength=0.5, generation=0)


def test_tokenizer_is_none_when_there_is_none(tmp_path: Path) -> None:
    without = load(str(write_tiny(tmp_path / "without")))
    assert without.tokenizer is None
    with pytest.raises(UserError, match="looked for tokenizer.json and tokenizer.model"):
        without.require_tokenizer()
    with pytest.raises(UserError, match="looked for tokenizer.json and tokenizer.model"):
        without.generate("the cat")
    model = load(str(write_with_tokenizer(tmp_path / "with")))
    text = english(1, 20)
    assert model.require_tokenizer().decode(model.tokenizer.encode(text)) == text


def test_a_base_that_was_trained_too_is_not_passed_off_as_the_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_tiny(tmp_path / "base")
    model = load(str(expand_to(base, tmp_path / "all", trained=("all",))))
    with pytest.raises(UserError, match=r"trainable: all\), so .* not the original; load .*base"):
        model.logits(TOKENS, new_blocks=False)
    with pytest.raises(UserError, match="not the original"):
        model.generate([1, 2], new_blocks=False)
    with caplog.at_level(logging.WARNING):
        load(str(tmp_path / "all"), generation=0)
    assert "changed generation 0 too" in caplog.text
    new = expand_to(base, tmp_path / "new", trained=("new",))
    caplog.clear()
    assert load(str(new), generation=0).base_altered_by is None and not caplog.records


def test_which_training_altered_which_generation(tmp_path: Path) -> None:
    first = expand_to(write_tiny(tmp_path / "base"), tmp_path / "first", trained=("new",))
    second = expand_to(first, tmp_path / "second", spread(6, 1), trained=("all",))
    source = open_source(str(expand_to(second, tmp_path / "third", spread(7, 1))))
    entry = source.lineage[3]
    assert entry["trainable"] == ["all"] and source.plan.generation == 3
    assert altered_by(source, 0) == altered_by(source, 1) == entry
    assert altered_by(source, 2) is None and altered_by(source, 3) is None
    # Without new blocks everything that trained is the model itself.
    assert altered_by(Expanded(open_hf(str(tmp_path / "base")), spread(4, 1)), -1) is None
