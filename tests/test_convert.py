"""Hugging Face to Flax and back: every byte, and every way in which a source can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import TINY, write_tiny
from safetensors.numpy import load_file, save_file

from llamapro_jax.convert import convert
from llamapro_jax.errors import UserError
from llamapro_jax.export import export
from llamapro_jax.files import read_json, write_json
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.model.weights import tensors
from llamapro_jax.sources import open_flax, open_hf

DTYPES = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def tensor_bytes(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Every tensor of a directory as (dtype, shape, bytes)."""
    result = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, array in load_file(file).items():
            result[name] = (array.dtype.name, array.shape, array.tobytes())
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [2**40, 8000])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "head_dim": 6}],
    ids=["plain", "tied", "biases"],
)
def test_convert_then_export_returns_every_byte(
    tmp_path: Path, dtype: str, shard_bytes: int, changes: dict[str, Any]
) -> None:
    source = write_tiny(
        tmp_path / "hf", dtype=DTYPES[dtype], shard_bytes=shard_bytes, **changes
    )
    convert(str(source), tmp_path / "flax")
    done = export(str(tmp_path / "flax"), tmp_path / "out", shard_bytes=shard_bytes)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    assert done.largest_difference == 0 and done.dtype == np.dtype(DTYPES[dtype]).name
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*")) == sorted(
        p.name for p in source.glob("*.safetensors*")
    )


def test_orbax_restores_what_was_streamed(tmp_path: Path) -> None:
    """The arrays written row by row are an ordinary Orbax checkpoint."""
    source = write_tiny(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    convert(str(source), tmp_path / "flax")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    tree = ocp.Checkpointer(handler).restore((tmp_path / "flax" / "params").resolve())
    assert sorted(tree) == ["base", "embed", "final_norm", "head"]
    q = np.asarray(tree["base"]["q"])
    assert q.shape == (4, 32, 4, 8) and q.dtype == ml_dtypes.bfloat16
    stored = load_file(source / "model.safetensors")["model.layers.2.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q[2].reshape(32, 32).T, stored)


def test_the_fingerprint_is_that_of_the_source(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", shard_bytes=8000)
    written = convert(str(source), tmp_path / "flax")
    assert written == Fingerprint.read(tmp_path / "flax") == open_hf(str(source)).fingerprint()
    assert set(written.tensors) == {t.name for t in tensors(open_hf(str(source)).config)}


def test_a_changed_bit_changes_the_fingerprint(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    before = open_hf(str(source)).fingerprint()
    arrays = load_file(source / "model.safetensors")
    arrays["model.layers.1.mlp.up_proj.weight"].view(np.uint32)[3, 3] ^= 1
    save_file(arrays, source / "model.safetensors")
    after = open_hf(str(source)).fingerprint()
    assert before.difference(after) == ["model.layers.1.mlp.up_proj.weight"]
    assert before.digest != after.digest


def test_pickled_weights_only_when_asked_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = write_tiny(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    arrays = load_file(source / "model.safetensors")
    state = {n: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for n, a in arrays.items()}
    torch.save(state, source / "pytorch_model.bin")
    expected = tensor_bytes(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--allow-bin"):
        convert(str(source), tmp_path / "flax")
    convert(str(source), tmp_path / "flax", allow_bin=True)
    export(str(tmp_path / "flax"), tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == expected


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = write_tiny(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as weights only"):
        convert(str(source), tmp_path / "flax", allow_bin=True)
    assert not marker.exists()


def edit(source: Path, **changes: Any) -> None:
    values = {**read_json(source / "config.json"), **changes}
    write_json(source / "config.json", {k: v for k, v in values.items() if v != "absent"})


def with_tensors(source: Path, change: Any) -> None:
    arrays = load_file(source / "model.safetensors")
    change(arrays)
    save_file(arrays, source / "model.safetensors")


def truncate(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def rename(arrays: dict[str, Any]) -> None:
    arrays["model.layers.1.self_attn.x_proj.weight"] = arrays.pop(
        "model.layers.1.self_attn.q_proj.weight"
    )


def transpose(arrays: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)


def widen(arrays: dict[str, Any]) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    arrays[name] = arrays[name].astype(np.float16)


def integers(arrays: dict[str, Any]) -> None:
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int32)


def drop(arrays: dict[str, Any]) -> None:
    del arrays["model.layers.2.mlp.down_proj.weight"]


def another_head(arrays: dict[str, Any]) -> None:
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1


YARN = {"rope_type": "yarn", "factor": 2.0}
WRONG: dict[str, tuple[Any, str]] = {
    "truncated": (truncate, "model.safetensors: cannot be read .*truncated"),
    "missing": (lambda s: (s / "model.safetensors").unlink(), "has neither model.safetensors"),
    "renamed": (lambda s: with_tensors(s, rename), r"no tensor \S+\.1\.self_attn\.q_proj"),
    "shape": (lambda s: with_tensors(s, transpose), r"up_proj.weight has shape \[32, 48\]"),
    "mixed": (lambda s: with_tensors(s, widen), r"\.3\.mlp\.up_proj.weight has dtype float16"),
    "dtype": (lambda s: with_tensors(s, integers), "model.norm.weight has dtype I32; supported"),
    "lost": (lambda s: with_tensors(s, drop), r"has no tensor model\.layers\.2\.mlp\.down_proj"),
    "too many": (lambda s: edit(s, num_hidden_layers=3), r"\.3\.\S+ is not one of .*3 layers"),
    "too few": (lambda s: edit(s, num_hidden_layers=5), r"no tensor model\.layers\.4\."),
    "tied": (
        lambda s: (with_tensors(s, another_head), edit(s, tie_word_embeddings=True)),
        "lm_head.weight differs from the embedding",
    ),
    "architecture": (
        lambda s: edit(s, architectures=["GemmaForCausalLM"]),
        "'GemmaForCausalLM' is not supported; supported: LlamaForCausalLM, MistralForCausalLM",
    ),
    "no architecture": (lambda s: edit(s, architectures="absent"), "architectures is None"),
    "rope": (lambda s: edit(s, rope_scaling=YARN), "rope type 'yarn' is not supported; supported"),
    "activation": (lambda s: edit(s, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "text": (lambda s: edit(s, hidden_size="32"), "hidden_size is '32'; it must be int"),
    "negative": (lambda s: edit(s, hidden_size=-1), "hidden_size is -1; it must be positive"),
    "heads": (lambda s: edit(s, num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
    "no size": (lambda s: edit(s, vocab_size="absent"), "has no 'vocab_size'"),
    "quantized": (lambda s: edit(s, quantization_config={"bits": 4}), "is quantized"),
    "no config": (lambda s: (s / "config.json").unlink(), "config.json: no such file"),
    "not json": (lambda s: (s / "config.json").write_text("{,"), "config.json:1: is not JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_source_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    spoil, message = WRONG[case]
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(str(source), tmp_path / "flax")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", shard_bytes=8000)
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: no such file"):
        convert(str(source), tmp_path / "flax")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ""])
def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    source = write_tiny(tmp_path / "hf", shard_bytes=8000)
    index = source / "model.safetensors.index.json"
    values = read_json(index)
    values["weight_map"]["model.norm.weight"] = name
    write_json(index, values)
    with pytest.raises(UserError, match="must be a plain file name"):
        convert(str(source), tmp_path / "flax")


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", shard_bytes=8000)
    index = source / "model.safetensors.index.json"
    values = read_json(index)
    values["weight_map"]["model.norm.weight"] = "model-00001-of-00001.safetensors"
    write_json(index, values)
    shutil.copy(source / values["weight_map"]["model.embed_tokens.weight"],
                source / "model-00001-of-00001.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="has no tensor model.norm.weight|is also in"):
        convert(str(source), tmp_path / "flax")


def test_a_destination_in_use_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "precious").write_text("mine")
    with pytest.raises(UserError, match="flax: is not empty"):
        convert("no/such@source", tmp_path / "flax")
    assert (tmp_path / "flax" / "precious").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "hf")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamapro_jax.flax_checkpoint.StackedWriter.write", full)
    with pytest.raises(OSError):
        convert(str(source), tmp_path / "flax")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


LLAMA_2_7B_KEYS = {
    "_name_or_path", "architectures", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pretraining_tp",
    "rms_norm_eps", "rope_scaling", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache", "vocab_size",
}  # fmt: skip


def test_the_keys_of_llama_2_7b_are_enough(tmp_path: Path) -> None:
    """Its own config.json has neither rope_theta nor head_dim: transformers' defaults hold."""
    values = {
        **TINY,
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
    }
    del values["rope_theta"]
    assert set(values) == LLAMA_2_7B_KEYS
    changes = {k: v for k, v in values.items() if TINY.get(k) != v} | {"rope_theta": "absent"}
    config = open_hf(str(write_tiny(tmp_path / "hf", **changes))).config
    assert config.rope_theta == 10000.0 and config.head_dim == 8
    assert not config.attention_bias and not config.mlp_bias and config.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"rope_theta": 5e5}, "rope_theta", 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta", 5e5),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps", 1e-3),
        ({"rms_norm_eps": "absent"}, "rms_norm_eps", 1e-6),
        ({"head_dim": 16}, "head_dim", 16),
        ({"num_key_value_heads": "absent"}, "num_kv_heads", 4),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window", 4096),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": None},
            "sliding_window",
            None,
        ),
    ],
)
def test_each_key_is_read_or_takes_its_documented_default(
    tmp_path: Path, changes: dict[str, Any], field: str, expected: Any
) -> None:
    config = open_hf(str(write_tiny(tmp_path / "hf", **changes))).config
    assert getattr(config, field) == expected


def test_rope_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_tensors(source, lambda arrays: arrays.update({name: np.ones(4, np.float32)}))
    written = convert(str(source), tmp_path / "flax")
    assert name not in written.tensors


def test_a_tied_head_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf", tie_word_embeddings=True)
    embed = "model.embed_tokens.weight"
    with_tensors(source, lambda arrays: arrays.update({"lm_head.weight": arrays[embed].copy()}))
    convert(str(source), tmp_path / "flax")
    export(str(tmp_path / "flax"), tmp_path / "out")
    assert "lm_head.weight" not in tensor_bytes(tmp_path / "out")


def test_a_flax_checkpoint_that_lost_a_row_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    convert(str(source), tmp_path / "flax")
    shutil.rmtree(tmp_path / "flax" / "params" / "base.up")
    with pytest.raises(UserError, match="base.up: cannot be read"):
        open_flax(str(tmp_path / "flax"))


def test_a_lost_chunk_is_not_read_as_zeros(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    convert(str(source), tmp_path / "flax")
    chunk = next((tmp_path / "flax" / "params" / "base.up").glob("2.*"))
    chunk.unlink()
    with pytest.raises(UserError, match="base.up: cannot be read.*damaged"):
        export(str(tmp_path / "flax"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_fingerprint_file_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "hf")
    convert(str(source), tmp_path / "flax")
    path = tmp_path / "flax" / "fingerprint.json"
    values = json.loads(path.read_text())
    values["tensors"]["model.norm.weight"]["sha256"] = "0" * 64
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="was changed after it was written"):
        open_flax(str(tmp_path / "flax")).fingerprint()
