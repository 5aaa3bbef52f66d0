"""Our logits against those of transformers (torch, float32) on small random checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import write_torch

from llamapro_jax.sources import open_hf

torch = pytest.importorskip("torch")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
CASES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "head dim": {"head_dim": 12},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "sliding window": {**MISTRAL, "sliding_window": 5},
    "no window": {**MISTRAL, "sliding_window": None},
    "odd vocabulary": {"vocab_size": 97},
    "shards": {"shard": "20KB"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "eps": {"rms_norm_eps": 0.1},
}


def our_logits(path: Any, tokens: np.ndarray) -> np.ndarray:
    from llamapro_jax import load

    return np.asarray(load(str(path)).logits(tokens))


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case: str, tmp_path: Any) -> None:
    model = write_torch(tmp_path / "model", **CASES[case])
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(1).integers(0, vocab, (2, 33), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    ours = our_logits(tmp_path / "model", tokens)
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    assert np.abs(expected).max() > 0.5  # the comparison means something
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_every_case_makes_a_difference(tmp_path: Any) -> None:
    """The options above reach the file: the configurations that we read are all different."""
    seen = {}
    for case, changes in CASES.items():
        write_torch(tmp_path / case, **changes)
        source = open_hf(str(tmp_path / case))
        dtypes = {stored.dtype.name for stored in source.weights.tensors.values()}
        files = len({stored.file for stored in source.weights.tensors.values()})
        seen[case] = (source.config, frozenset(dtypes), files > 1)
    assert len(set(seen.values())) == len(CASES)
