"""Sizes, steps and learning rates of the quickstart, and the configurations of its five runs.

Chosen by the sweep in docs/quickstart.md so that the whole takes minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro_jax import __version__
from llamapro_jax.config import (
    DataConfig,
    EvalSourceConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
    TrainingConfig,
)

DOMAINS = ("prose", "code")
REPLAYED = 0.1


@dataclass(frozen=True)
class Settings:
    """What decides the numbers. learning_rates: of the runs base, pro, replay, full and instruct.

    held_out: share of the documents that is held out. evaluated: most rows of each held-out text
    that are measured at the end. new: blocks inserted into the `blocks` of the base.
    """

    vocabulary: int
    hidden: int
    feed_forward: int
    blocks: int
    heads: int
    new: int
    length: int
    batch: int
    base_steps: int
    steps: int
    learning_rates: tuple[float, float, float, float, float]
    held_out: float
    evaluated: int
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, as JSON. The text is that of this Python's library."""
        values = dataclasses.asdict(self)
        values["learning_rates"] = list(self.learning_rates)
        return {**values, "python": platform.python_version(), "llamapro_jax": __version__}

    def model_config(self) -> dict[str, Any]:
        """config.json of the base, in LLaMA 2's own keys."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 4 * self.length,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


FULL = Settings(
    vocabulary=2048,
    hidden=128,
    feed_forward=352,
    blocks=6,
    heads=2,
    new=3,
    length=128,
    batch=8,
    base_steps=400,
    steps=150,
    learning_rates=(3e-3, 5e-3, 5e-3, 3e-4, 1e-3),
    held_out=0.04,
    evaluated=160,
)

# For tests of the path alone: too little training for the thresholds to mean anything.
TINY = Settings(
    vocabulary=512,
    hidden=32,
    feed_forward=64,
    blocks=2,
    heads=2,
    new=1,
    length=128,  # the shortest that most conversations fit into
    batch=8,
    base_steps=12,
    steps=6,
    learning_rates=(1e-2, 5e-3, 5e-3, 2e-3, 1e-2),
    held_out=0.04,
    evaluated=16,
)

RUNS = ("base", "pro", "replay", "full", "instruct")


@dataclass(frozen=True)
class Places:
    """Where things lie under the output directory."""

    out: Path

    def text(self, name: str) -> Path:
        return self.out / "texts" / f"{name}.jsonl"

    def model(self, name: str) -> Path:
        return self.out / "models" / name

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def config(self, name: str) -> Path:
        return self.out / "configs" / f"{name}.yaml"

    def evaluation(self, name: str) -> Path:
        return self.out / "evaluations" / f"{name}.json"


def run_config(name: str, settings: Settings, places: Places) -> RunConfig:
    """The configuration of one of RUNS."""
    base = name == "base"
    model = {"base": "random", "full": "base"}.get(name, "expanded")
    start = places.run("pro") if name == "instruct" else places.model(model)
    steps = settings.base_steps if base else settings.steps
    code = SourceConfig("code", _text(places, "code_train"), 1 - REPLAYED)
    sources = {
        "base": (SourceConfig("prose-and-some-code", _text(places, "base_train")),),
        "replay": (code, SourceConfig("prose", _text(places, "prose_train"), REPLAYED)),
        "instruct": (SourceConfig("chat", _text(places, "chat_train"), kind="chat"),),
    }.get(name, (dataclasses.replace(code, weight=1.0),))
    held_out = [EvalSourceConfig(d, _text(places, f"{d}_heldout")) for d in DOMAINS]
    if name == "instruct":
        held_out.append(EvalSourceConfig("chat", _text(places, "chat_heldout"), kind="chat"))
    return RunConfig(
        model=os.fspath(start),
        output=os.fspath(places.run(name)),
        trainable=("all",) if name in ("base", "full", "instruct") else ("new",),
        compute_dtype="float32",
        seed=settings.seed,
        data=DataConfig(
            sequence_length=settings.length,
            batch_size=settings.batch,
            sources=sources,
            eval=tuple(held_out),
            cache_directory=os.fspath(places.out / "data"),
        ),
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rates[RUNS.index(name)], final_ratio=0.1
        ),
        training=TrainingConfig(
            steps=steps,
            log_every=max(steps // 20, 1),
            eval_every=None if base else max(steps // 3, 1),
            eval_batches=8,
            save_every=max(steps // 2, 1),
            keep=1,
        ),
        tracking=TrackingConfig(tensorboard=False),
    )


def _text(places: Places, name: str) -> str:
    return os.fspath(places.text(name))
