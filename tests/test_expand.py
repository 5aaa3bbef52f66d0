"""Grown models compute what their base did, to the bit; the proof finds every way to fail."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import read_torch, write_tiny
from safetensors.numpy import load_file, save_file

from llamapro_jax import load
from llamapro_jax.convert import convert
from llamapro_jax.delta import apply_delta, write_delta
from llamapro_jax.errors import UserError
from llamapro_jax.expand import expand
from llamapro_jax.export import export
from llamapro_jax.files import read_json, write_json
from llamapro_jax.inspect import as_text, describe
from llamapro_jax.model.llama import hidden_states, logits
from llamapro_jax.model.params import load_params
from llamapro_jax.proof import prove_identity
from llamapro_jax.sources import Source, altered_by, base_is_original, open_source
from llamapro_jax.views import Strength, Until

PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "8 of 32": (32, {"blocks": 8}),
    "two a group": (8, {"blocks": 4, "per_group": 2}),
    "arbitrary": (5, {"positions": [0, 3, 4]}),
    "not dividing": (7, {"blocks": 3}),
    "one": (3, {"blocks": 1}),
    "all": (3, {"blocks": 3}),
}


def whole_logits(source: Source, tokens_BT: np.ndarray, with_new: bool = True) -> np.ndarray:
    """Logits by the compiled forward pass over the segments, float32."""
    params = load_params(source, lambda stack, weight: np.float32)
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    @jax.jit
    def run(params: Any) -> jax.Array:
        x_BTD = hidden_states(
            params,
            tokens_BT,
            positions,
            jnp.ones_like(positions),
            config=source.config,
            segments=source.plan.segments,
            dtype=jnp.float32,
            with_new=with_new,
        )
        return logits(params, x_BTD)

    return np.asarray(run(params))


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)


def tokens(vocab: int = 101) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab, (2, 24), dtype=np.int32)


@pytest.mark.parametrize("plan", PLANS)
def test_the_grown_model_is_the_base_to_the_bit(plan: str, tmp_path: Path) -> None:
    layers, options = PLANS[plan]
    source = write_tiny(tmp_path / "hf", num_hidden_layers=layers, dtype=ml_dtypes.bfloat16)
    proof = expand(str(source), tmp_path / "pro", to="flax", **options)
    assert proof is not None and proof.logits == 64 * 101
    base, grown = open_source(str(source)), open_source(str(tmp_path / "pro"))
    expected = whole_logits(base, tokens())
    assert np.abs(expected).max() > 0.5
    np.testing.assert_array_equal(bits(whole_logits(grown, tokens())), bits(expected))
    np.testing.assert_array_equal(bits(whole_logits(grown, tokens(), False)), bits(expected))


@pytest.mark.parametrize("plan", ["8 of 32", "arbitrary", "two a group"])
@pytest.mark.parametrize("kind", ["llama", "tied", "mistral", "biases"])
def test_it_is_the_same_in_transformers(plan: str, kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layers, options = PLANS[plan]
    changes: dict[str, Any] = {
        "llama": {},
        "tied": {"tie_word_embeddings": True},
        "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 7},
        "biases": {"attention_bias": True, "mlp_bias": True},
    }[kind]
    if kind == "mistral":
        changes["model_type"] = "mistral"
    source = write_tiny(tmp_path / "hf", num_hidden_layers=layers, **changes)
    expand(str(source), tmp_path / "pro", **options)
    ids = torch.from_numpy(tokens()).long()
    with torch.no_grad():
        base = read_torch(source)(ids).logits.numpy()
        model = read_torch(tmp_path / "pro")
        grown = model(ids).logits.numpy()
    assert model.config.num_hidden_layers > layers
    np.testing.assert_array_equal(bits(grown), bits(base))


def test_flax_and_hugging_face_are_the_same_model(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", dtype=np.float16)
    convert(str(source), tmp_path / "flax")
    expand(str(tmp_path / "flax"), tmp_path / "a", blocks=2)
    expand(str(source), tmp_path / "b", blocks=2)
    expand(str(source), tmp_path / "c", blocks=2, to="flax")
    digests = {open_source(str(tmp_path / n)).fingerprint().digest for n in "abc"}
    assert len(digests) == 1
    assert (tmp_path / "b" / "model.safetensors").is_file()
    assert (tmp_path / "c" / "params").is_dir()


def test_growing_again_keeps_every_earlier_generation(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "one", blocks=2)
    expand(str(tmp_path / "one"), tmp_path / "two", positions=[1, 2], to="flax")
    zero, one = open_source(str(source)), open_source(str(tmp_path / "one"))
    two = open_source(str(tmp_path / "two"))
    assert two.plan.generation == 2 and two.plan.num_new == 2
    assert Until(two, 1).fingerprint() == one.fingerprint()
    assert Until(two, 0).fingerprint() == zero.fingerprint()
    assert [entry["verb"] for entry in two.lineage] == ["expand", "expand"]
    assert two.lineage[1]["base_digest"] == one.fingerprint().digest
    np.testing.assert_array_equal(
        bits(whole_logits(Until(two, 0), tokens())), bits(whole_logits(zero, tokens()))
    )


def spoiled(source: Path, name: str, change: Any) -> None:
    arrays = load_file(source / "model.safetensors")
    arrays[name] = change(arrays[name].copy())
    save_file(arrays, source / "model.safetensors")


def nudge(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] += 0.5
    return array


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.2.self_attn.o_proj.weight", "o_proj.weight is not zero in a new block"),
        ("model.layers.2.mlp.down_proj.weight", "down_proj.weight is not zero in a new block"),
        ("model.layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight is no copy of .*s.1."),
        ("model.layers.2.input_layernorm.weight", "input_layernorm.weight is no copy of"),
        ("model.layers.3.mlp.up_proj.weight", "of 6,464 logits differ"),
        ("model.norm.weight", "logits differ"),
        ("lm_head.weight", "logits differ"),
    ],
)
def test_the_proof_finds_one_changed_tensor(tensor: str, message: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2)
    spoiled(tmp_path / "pro", tensor, nudge)
    with pytest.raises(UserError, match=message):
        prove_identity(open_source(str(source)), open_source(str(tmp_path / "pro")))


def test_a_source_block_that_is_zero_is_refused(tmp_path: Path) -> None:
    """Both factors of a path zero: such a block would never train."""
    source = write_tiny(tmp_path / "hf")
    spoiled(source, "model.layers.1.mlp.up_proj.weight", np.zeros_like)
    with pytest.raises(UserError, match="would never train"):
        expand(str(source), tmp_path / "pro", blocks=2)
    assert not (tmp_path / "pro").exists()


def test_a_failed_proof_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny(tmp_path / "hf")

    def fails(*sources: Any) -> None:
        raise UserError("differs")

    monkeypatch.setattr("llamapro_jax.expand.prove_identity", fails)
    with pytest.raises(UserError, match="differs"):
        expand(str(source), tmp_path / "pro", blocks=2)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert expand(str(source), tmp_path / "pro", blocks=2, prove=False) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 5}, "--blocks 5 is larger than the model, which has 4 blocks"),
        ({"blocks": 2, "per_group": 0}, "--per-group is 0"),
        ({}, "say how many blocks"),
        ({"blocks": 2, "positions": [1]}, "leave out --blocks"),
        ({"positions": [4]}, "blocks 0 to 3"),
    ],
)
def test_bad_plans_leave_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        expand(str(source), tmp_path / "pro", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_plan_that_does_not_fit_its_model_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2)
    values = read_json(tmp_path / "pro" / "config.json")
    values["llamapro"]["base_blocks"] = 5
    write_json(tmp_path / "pro" / "config.json", values)
    with pytest.raises(UserError, match="num_hidden_layers is 6, but the expansion plan has 7"):
        open_source(str(tmp_path / "pro"))


def test_without_a_tokenizer_there_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tiny(tmp_path / "hf")
    with caplog.at_level(logging.WARNING):
        proof = expand(str(source), tmp_path / "pro", blocks=2)
    assert proof is not None and proof.random_tokens
    assert any("proof uses random ids" in record.message for record in caplog.records)


def train_by_hand(directory: Path) -> None:
    """Gives the projections of the new blocks values, as a training would."""
    rng = np.random.default_rng(3)
    source = open_source(str(directory))
    for depth in source.plan.new_depths:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            spoiled(
                directory,
                f"model.layers.{depth}.{name}.weight",
                lambda a: (0.2 * rng.standard_normal(a.shape)).astype(a.dtype),
            )


def test_strength_trades_new_for_old(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2)
    train_by_hand(tmp_path / "pro")
    base, pro = open_source(str(source)), open_source(str(tmp_path / "pro"))
    off, full = whole_logits(base, tokens()), whole_logits(pro, tokens())
    np.testing.assert_array_equal(bits(whole_logits(Strength(pro, 0.0), tokens())), bits(off))
    np.testing.assert_array_equal(bits(whole_logits(Strength(pro, 1.0), tokens())), bits(full))
    half = whole_logits(Strength(pro, 0.5), tokens())
    assert 0 < np.abs(half - off).mean() < np.abs(full - off).mean()
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            Strength(pro, strength)
    with pytest.raises(UserError, match="has no new blocks"):
        Strength(base, 0.5)


def test_export_casts_only_when_asked_to(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2)
    train_by_hand(tmp_path / "pro")
    assert export(str(tmp_path / "pro"), tmp_path / "same").largest_difference == 0
    cast = export(str(tmp_path / "pro"), tmp_path / "cast", dtype="bfloat16")
    assert cast.dtype == "bfloat16" and 0 < cast.largest_difference < 1
    assert read_json(tmp_path / "cast" / "config.json")["torch_dtype"] == "bfloat16"
    with pytest.raises(UserError, match="--dtype is 'int8'"):
        export(str(tmp_path / "pro"), tmp_path / "x", dtype="int8")
    off = export(str(tmp_path / "pro"), tmp_path / "base", generation=0)
    assert off.parameters == describe(str(source))["parameters"]
    assert (
        open_source(str(tmp_path / "base")).fingerprint() == open_source(str(source)).fingerprint()
    )


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    spoiled(source, "model.norm.weight", lambda a: a * 1e6)
    with pytest.raises(UserError, match="model.norm.weight does not fit into float16"):
        export(str(source), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny(tmp_path / "hf")
    monkeypatch.setattr("llamapro_jax.export.compare_logits", lambda *a: (10, 3, 0.1))
    with pytest.raises(UserError, match="3 logits of the files differ"):
        export(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_delta_gives_the_model_back_on_its_own_base_only(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", dtype=np.float16)
    convert(str(source), tmp_path / "flax")
    expand(str(source), tmp_path / "pro", blocks=2)
    train_by_hand(tmp_path / "pro")
    count = write_delta(str(tmp_path / "pro"), tmp_path / "delta")
    assert count == describe(str(tmp_path / "pro"))["new_parameters"]
    expected = open_source(str(tmp_path / "pro")).fingerprint()
    for base in ("hf", "flax"):
        assert apply_delta(str(tmp_path / base), tmp_path / "delta", tmp_path / f"on {base}") == (
            expected
        )
    other = write_tiny(tmp_path / "other", dtype=np.float16, seed=1)
    with pytest.raises(UserError, match="is not the base of .*delta: its fingerprint"):
        apply_delta(str(other), tmp_path / "delta", tmp_path / "x")
    deeper = write_tiny(tmp_path / "deeper", dtype=np.float16, num_hidden_layers=5)
    with pytest.raises(UserError, match="has 5 blocks"):
        apply_delta(str(deeper), tmp_path / "delta", tmp_path / "x")
    with pytest.raises(UserError, match="has no new blocks"):
        write_delta(str(source), tmp_path / "x")
    with pytest.raises(UserError, match="delta.json: no such file"):
        apply_delta(str(source), tmp_path / "pro", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_delta_of_a_trained_base_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2)
    values = read_json(tmp_path / "pro" / "config.json")
    values["llamapro"]["lineage"].append(
        {"verb": "train", "source": "x", "trainable": ["all"], "steps": 5}
    )
    write_json(tmp_path / "pro" / "config.json", values)
    with pytest.raises(UserError, match="more than the new blocks was trained"):
        write_delta(str(tmp_path / "pro"), tmp_path / "delta")


def test_a_flipped_bit_of_a_delta_is_found(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2)
    write_delta(str(tmp_path / "pro"), tmp_path / "delta")
    spoiled(tmp_path / "delta", "model.layers.2.mlp.up_proj.weight", nudge)
    with pytest.raises(UserError, match="delta: is not what was written"):
        apply_delta(str(source), tmp_path / "delta", tmp_path / "x")
    values = read_json(tmp_path / "delta" / "delta.json")
    write_json(tmp_path / "delta" / "delta.json", {**values, "version": 2})
    with pytest.raises(UserError, match="version 2; this release reads 1"):
        apply_delta(str(source), tmp_path / "delta", tmp_path / "x")


def test_a_flipped_bit_of_a_flax_checkpoint_is_found_by_every_verb(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2, to="flax")
    expand(str(source), tmp_path / "delta of", blocks=2)
    write_delta(str(tmp_path / "delta of"), tmp_path / "delta")
    convert(str(source), tmp_path / "flax")
    for model in ("pro", "flax"):
        chunk = sorted((tmp_path / model / "params" / "base.up").glob("2.*"))[0]
        raw = bytearray(chunk.read_bytes())
        raw[100] ^= 4
        chunk.write_bytes(raw)
    pro, flax = str(tmp_path / "pro"), str(tmp_path / "flax")
    for verb in (
        lambda: export(pro, tmp_path / "x"),
        lambda: expand(flax, tmp_path / "x", blocks=1),
        lambda: apply_delta(flax, tmp_path / "delta", tmp_path / "x"),
        lambda: load(pro),
    ):
        with pytest.raises(UserError, match=r"base\.up: .*mlp.up_proj.weight is not what was"):
            verb()
    assert not (tmp_path / "x").exists()


def test_the_card_names_a_hub_id_and_no_directory(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "bf" / "base")
    expand(str(source), tmp_path / "pro", blocks=2)
    export(str(tmp_path / "pro"), tmp_path / "out", licence="mit", shard_bytes=20_000)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:" not in card and "license: mit" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_an_earlier_generation_has_its_own_history(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "one", blocks=2)
    values = read_json(tmp_path / "one" / "config.json")
    training = {"verb": "train", "source": "x", "trainable": ["all"], "steps": 5}
    values["llamapro"]["lineage"].append(training)
    write_json(tmp_path / "one" / "config.json", values)
    expand(str(tmp_path / "one"), tmp_path / "two", blocks=2)
    two = open_source(str(tmp_path / "two"))
    assert base_is_original(two)  # generation 1 as it was when generation 2 came
    assert altered_by(two, 0) == training
    assert [entry["verb"] for entry in Until(two, 1).lineage] == ["expand", "train"]
    assert altered_by(Until(two, 1), 0) == training
    assert not base_is_original(Until(two, 1))
    export(str(tmp_path / "two"), tmp_path / "zero", generation=0)
    exported = read_json(tmp_path / "zero" / "config.json")["llamapro"]
    assert exported["generations"] == []
    assert [entry["verb"] for entry in exported["lineage"]] == ["train", "export"]


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        ([{"source": "x"}], "an entry needs verb and source"),
        ([{"verb": "train", "source": "x", "steps": 1}], "it needs trainable"),
        ("x", "an entry needs verb"),
    ],
)
def test_a_malformed_lineage_is_refused(lineage: Any, message: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    expand(str(source), tmp_path / "pro", blocks=2)
    values = read_json(tmp_path / "pro" / "config.json")
    values["llamapro"]["lineage"] = lineage
    write_json(tmp_path / "pro" / "config.json", values)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "pro"))


def test_layer_types_do_not_outlive_the_number_of_layers(tmp_path: Path) -> None:
    """transformers refuses a config.json whose layer_types are fewer than its layers."""
    transformers = pytest.importorskip("transformers")
    source = write_tiny(tmp_path / "hf", layer_types=["full_attention"] * 4)
    expand(str(source), tmp_path / "pro", blocks=2)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "pro").num_hidden_layers == 6


def test_inspect_shows_each_block(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", dtype=np.float16)
    expand(str(source), tmp_path / "pro", blocks=2)
    shown = describe(str(tmp_path / "pro"))
    assert [b["stack"] for b in shown["blocks"]] == ["base", "base", "new"] * 2
    assert [b["copied_from"] for b in shown["blocks"]] == [None, None, 1, None, None, 4]
    assert shown["bytes"] == 2 * shown["parameters"]
    assert shown["new_parameters"] == 2 * shown["blocks"][2]["parameters"]
    text = as_text(shown)
    assert "2 new blocks with" in text and len(text.splitlines()) >= 10
