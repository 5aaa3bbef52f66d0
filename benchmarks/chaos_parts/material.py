"""What the campaign trains: a small expanded model, its texts, and the settings of a run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.config import RunConfig
from llamapro_jax.expand import expand
from llamapro_jax.files import atomic_directory, write_json
from llamapro_jax.hf.config import parse
from llamapro_jax.hf.safetensors import Planned, SafetensorsWriter
from llamapro_jax.hf.tokenizer import train_tokenizer
from llamapro_jax.model.weights import tensors
from llamapro_jax.typed_yaml import load

# Of a run. One epoch of the text is about 13 steps: a bad record is met within so many.
STEPS, SAVE_EVERY, EVAL_EVERY, KEEP = 48, 2, 5, 3
DEVICES = 4
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
VOCABULARY = 300
# Large enough that an array's file is larger than the log: see `disk.limit_files`.
ARCHITECTURE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY + 20,
    "hidden_size": 64,
    "intermediate_size": 512,
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
HELD_OUT = ("old", "held")


@dataclass(frozen=True)
class Material:
    """Where everything lies that all runs of a campaign share."""

    directory: Path

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def compiled(self) -> Path:
        return self.directory / "compiled"

    def text(self, name: str) -> Path:
        return self.directory / "texts" / f"{name}.txt"

    def write(self) -> None:
        """Unless it is there."""
        if not self.model.is_dir():
            with atomic_directory(self.directory / "base") as base:
                _write_base(base)
            expand(str(self.directory / "base"), self.model, blocks=2, to="flax", prove=False)
        for seed, name in enumerate(("train", *HELD_OUT), start=1):
            self.text(name).parent.mkdir(exist_ok=True)
            # The second held-out text is long: an evaluation takes long enough to be hit.
            self.text(name).write_text(_text(seed, {"train": 200, "old": 30, "held": 200}[name]))

    def settings(self, output: Path | str, **changes: Any) -> dict[str, Any]:
        """Settings by their path; `changes` have `__` for a dot."""
        held_out = [{"name": name, "path": str(self.text(name))} for name in HELD_OUT]
        values = {
            "model": str(self.model),
            "output": str(output),
            "compute_dtype": "float32",
            "compilation_cache": str(self.compiled),
            "data.sequence_length": 32,
            "data.batch_size": 8,
            "data.sources": [{"name": "words", "path": str(self.text("train"))}],
            "data.eval": held_out,
            "mesh.data": 2,
            "mesh.fsdp": 2,
            "training.steps": STEPS,
            "training.log_every": 1,
            "training.eval_every": EVAL_EVERY,
            "training.save_every": SAVE_EVERY,
            "training.keep": KEEP,
            "optimizer.learning_rate": 0.01,
            "tracking.tensorboard": False,
        }
        return values | {name.replace("__", "."): value for name, value in changes.items()}


def overrides(settings: dict[str, Any]) -> list[str]:
    """As `llamapro train` takes them."""
    import json

    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]


def config(settings: dict[str, Any]) -> RunConfig:
    return load(RunConfig, None, overrides(settings))


def _text(seed: int, lines: int) -> str:
    draw = random.Random(seed)
    return "".join(f"{' '.join(draw.choices(WORDS, k=8))}.\n" for _ in range(lines))


def _write_base(directory: Path) -> None:
    write_json(directory / "config.json", ARCHITECTURE)
    architecture = parse(ARCHITECTURE)
    draw = np.random.default_rng(0)
    planned = [
        Planned(tensor.name, tensor.weight.hf_shape(architecture), np.dtype(np.float32))
        for tensor in tensors(architecture)
    ]
    writer = SafetensorsWriter(directory, planned, 2**40)
    for tensor in planned:
        scale, centre = (0.2, 0.0) if len(tensor.shape) > 1 else (0.1, 1.0)
        array = centre + scale * draw.standard_normal(tensor.shape, np.float32)
        writer.write(tensor.name, array.astype(np.float32))
    writer.close()
    train_tokenizer([_text(0, 200)], VOCABULARY, directory)
