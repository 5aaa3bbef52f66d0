"""The architecture that a configuration trains, without its weights.

A model that is on disk says itself what it is. Of one that is not there yet, `architecture` in the
configuration says which published model it is made of, and how many blocks are inserted; `train`
checks that against the real one.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from llamapro_jax.config import ArchitectureConfig, RunConfig
from llamapro_jax.errors import UserError, nearest
from llamapro_jax.expansion import ExpansionPlan, spread
from llamapro_jax.files import read_json
from llamapro_jax.hf.config import parse, parse_plan, read_config
from llamapro_jax.local_copies import fetched
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.remote import as_path

_PUBLISHED = Path(__file__).parent / "architectures"


def published() -> list[str]:
    """Names of the models whose config.json comes with this package."""
    return sorted(path.stem for path in _PUBLISHED.glob("*.json"))


def described(architecture: ArchitectureConfig) -> tuple[ModelConfig, ExpansionPlan]:
    """The model that `llamapro expand --blocks` makes of the base. Raises UserError."""
    base = architecture.base
    if base in published():
        path = _PUBLISHED / f"{base}.json"
    else:
        path = Path(base).expanduser()
        path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"architecture.base: {base!r} is neither a config.json, nor a directory with one, nor "
            f"one of {', '.join(published())}.{nearest(base, published())}"
        )
    values = read_json(path)
    config = parse(values, str(path))
    plan = parse_plan(values, config, str(path))
    if architecture.blocks:
        insertions = spread(config.num_blocks, architecture.blocks, architecture.per_group)
        plan = plan.expand(insertions)
    return replace(config, num_blocks=plan.num_blocks), plan


def of_run(run: RunConfig) -> tuple[ModelConfig, ExpansionPlan]:
    """Of the model on disk, or as the configuration describes it. No weights are read.

    Raises UserError when the model is not here and nothing describes it, or when the two differ.
    """
    directory = as_path(run.model)
    if (directory / "config.json").is_file():
        _, config, plan = read_config(fetched(run.model, only=("config.json",)))
        check_described(run, config, plan)
        return config, plan
    if run.architecture is None:
        raise UserError(
            f"model: {run.model} is not here. To plan for it, say what it will be: "
            f"architecture.base={published()[0]} architecture.blocks=8 (the base is one of "
            f"{', '.join(published())}, or the path of a config.json)."
        )
    return described(run.architecture)


def check_described(run: RunConfig, config: ModelConfig, plan: ExpansionPlan) -> None:
    """Raises UserError when the model is another than the configuration describes."""
    if run.architecture is None:
        return
    expected, expected_plan = described(run.architecture)
    differ = [
        f"{field.name} is {getattr(config, field.name)}, not {getattr(expected, field.name)}"
        for field in fields(ModelConfig)
        if getattr(config, field.name) != getattr(expected, field.name)
    ]
    if not differ and expected_plan.new_depths != plan.new_depths:
        differ = [
            f"its new blocks stand at {list(plan.new_depths)}, not at "
            f"{list(expected_plan.new_depths)}"
        ]
    if differ:
        raise UserError(
            f"architecture: {run.model} is not {run.architecture.base} with "
            f"{run.architecture.blocks} new blocks: {'; '.join(differ)}. Correct one of them, or "
            "leave architecture out."
        )


def check_length(run: RunConfig, config: ModelConfig) -> None:
    """Raises UserError when rows are longer than the model was made for."""
    length, longest = run.data.sequence_length, config.max_position_embeddings
    if length > longest:
        raise UserError(
            f"data.sequence_length is {length}, but {run.model} was made for at most {longest} "
            "positions (max_position_embeddings); take at most that."
        )
