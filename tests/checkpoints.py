"""Small random Hugging Face checkpoints for tests, made by transformers itself or by our table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.files import write_json
from llamapro_jax.hf.config import parse
from llamapro_jax.hf.safetensors import Planned, SafetensorsWriter
from llamapro_jax.model.weights import tensors

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_tiny(
    directory: Path,
    *,
    dtype: Any = np.float32,
    shard_bytes: int = 2**40,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A checkpoint of random weights, by the table alone: needs no torch. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {**TINY, **changes}
    values = {key: value for key, value in values.items() if value != "absent"}
    write_json(directory / "config.json", values)
    config = parse(values)
    rng = np.random.default_rng(seed)
    planned = [
        Planned(t.name, t.weight.hf_shape(config), np.dtype(dtype)) for t in tensors(config)
    ]
    writer = SafetensorsWriter(directory, planned, shard_bytes)
    for tensor in planned:
        scale = 0.3 if len(tensor.shape) > 1 else 0.1
        centre = 1.0 if tensor.name.endswith("norm.weight") else 0.0
        array = centre + scale * rng.standard_normal(tensor.shape, np.float32)
        writer.write(tensor.name, array.astype(dtype))
    writer.close()
    return directory


def write_torch(
    directory: Path, *, dtype: str = "float32", shard: str = "5GB", **changes: Any
) -> Any:
    """The same made and saved by transformers with torch. Returns the torch model in float32."""
    import torch
    import transformers

    values = {**TINY, **changes}
    values = {key: value for key, value in values.items() if value != "absent"}
    torch.manual_seed(0)
    kind = values.pop("architectures")[0]
    config_class = getattr(transformers, kind.replace("ForCausalLM", "Config"))
    values.pop("model_type")
    values.pop("torch_dtype")
    config = config_class(**values)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than transformers' own start, so that a wrong weight shows in the logits.
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    return read_torch(directory)


def read_torch(directory: Path) -> Any:
    """The checkpoint as transformers reads it, in float32.

    Read again rather than cast back: a cast of the module rounds its rope frequencies too.
    """
    import torch
    import transformers

    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
