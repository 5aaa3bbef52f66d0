"""What the tests of training share: a small expanded model with a tokenizer, texts, a run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from checkpoints import write_tiny

from llamapro_jax.compilation_cache import AUTO, directory
from llamapro_jax.config import RunConfig
from llamapro_jax.expand import expand
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.hf.tokenizer import train_tokenizer
from llamapro_jax.metrics import read_metrics
from llamapro_jax.typed_yaml import load

VOCABULARY = 300
# What two runs of the same bits differ in.
TIMES = ("tokens_per_second", "useful_flops_per_second", "seconds")


def text(seed: int, lines: int = 200) -> str:
    """Lines of words, so that there is something to learn."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    return "\n".join(" ".join(rng.choices(words, k=8)) + "." for _ in range(lines)) + "\n"


def write_model(directory: Path, *, expanded: bool = True, **changes: Any) -> Path:
    """A random model of four blocks (and two new ones) with a real tokenizer."""
    base = write_tiny(directory / "base", vocab_size=VOCABULARY + 20, **changes)
    train_tokenizer([text(0)], VOCABULARY, base)
    if expanded:
        expand(str(base), directory / "model", blocks=2, to="flax", prove=False)
        return directory / "model"
    return base


def write_texts(directory: Path) -> dict[str, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for seed, name in enumerate(("train", "old", "held"), start=1):
        paths[name] = directory / f"{name}.txt"
        paths[name].write_text(text(seed, 200 if name == "train" else 30))
    return paths


@contextmanager
def shared_programs() -> Iterator[str]:
    """While entered, all programs are kept where runs keep theirs, and taken from there.

    That directory is one for all tests of a session (see conftest.py): many train the same model.
    Yields it.
    """
    place = directory(AUTO)
    assert place is not None
    cache: dict[str, Any] = {
        "jax_compilation_cache_dir": place,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in cache.items():
        jax.config.update(name, value)
    try:
        yield place
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def settings(model: Path, texts: Path, output: Path) -> dict[str, Any]:
    """Settings by their path, of a run that takes seconds."""
    source = {"name": "words", "path": str(texts / "train.txt")}
    held_out = [
        {"name": name, "path": str(texts / f"{name}.txt")} for name in ("old", "held")
    ]
    return {
        "model": str(model),
        "output": str(output),
        "compute_dtype": "float32",
        "data.sequence_length": 32,
        "data.batch_size": 4,
        "data.sources": [source],
        "data.eval": held_out,
        "training.steps": 8,
        "training.log_every": 2,
        "training.eval_every": 4,
        "training.save_every": 4,
        "optimizer.learning_rate": 0.01,
        "tracking.tensorboard": False,
    }


def overrides(values: dict[str, Any]) -> list[str]:
    import json

    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    ]


def run_config(model: Path, texts: Path, output: Path, **changes: Any) -> RunConfig:
    """`changes`: settings by path, with `__` for a dot."""
    values = settings(model, texts, output)
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return load(RunConfig, None, overrides(values))


def digests(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run)]


def saved_arrays(run: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, of what trains and of the optimizer."""
    found = {}
    for item in ("trainable", "optimizer"):
        directory = run / "checkpoints" / str(step) / item
        arrays = StackedArrays(directory)
        for leaf in sorted(d.parent.name for d in directory.glob("*/.zarray")):
            found[f"{item}/{leaf}"] = arrays.read(leaf).tobytes()
    return found


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Both have the same bits in the checkpoint of `step`, and the same log."""
    arrays = saved_arrays(one, step)
    assert len(arrays) > 30
    assert saved_arrays(other, step) == arrays
    assert log_lines(one) == log_lines(other)
