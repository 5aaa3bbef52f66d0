"""What is evaluated beside a model: its strengths, its new blocks off, the base it came from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.model.api import Model, OpenedModel, open_model
from llamapro_jax.model.weights import BLOCK_BY_NAME
from llamapro_jax.remote import as_path
from llamapro_jax.sources import open_source
from llamapro_jax.training import run_directory
from llamapro_jax.views import Strength

log = logging.getLogger(__name__)

ON, OFF, BASE, MODEL = "new blocks on", "new blocks off", "base", "model"


def scaled(new: Sequence[dict[str, jax.Array]], strength: Any) -> list[dict[str, jax.Array]]:
    """The leaves of the new blocks, with what they add times `strength` (a float32 scalar)."""

    def one(name: str, leaf: jax.Array) -> jax.Array:
        if not BLOCK_BY_NAME[name].zeroed:
            return leaf
        return (leaf.astype(jnp.float32) * strength).astype(leaf.dtype)

    return [{name: one(name, leaf) for name, leaf in leaves.items()} for leaves in new]


@dataclass(frozen=True)
class Setting:
    """One row of the table for each text. strength None: a model without such a factor."""

    label: str
    model: Model
    strength: float | None = None

    @property
    def factor(self) -> float:
        """What the new blocks add is times this."""
        return 1.0 if self.strength is None else self.strength

    def at_strength(self) -> tuple[Model, bool]:
        """The model with its factor in the parameters, and whether its new blocks run."""
        if self.factor == 1:
            return self.model, True
        # Without its new blocks it is the original: to the bit, and sooner done.
        if self.factor == 0 and self.model.base_altered_by is None:
            return self.model, False
        new = scaled(self.model.params["new"], np.float32(self.factor))
        return replace(self.model, params={**self.model.params, "new": new}), True


@dataclass(frozen=True)
class Comparison:
    """What is computed: the settings, and the one they are compared with (None: nothing is)."""

    settings: tuple[Setting, ...]
    base: Setting | None


def recorded_original(model: OpenedModel) -> OpenedModel | None:
    """The model before the first training that changed more than the new blocks.

    None, with a warning, when it cannot be opened. Raises UserError when it is another one now.
    """
    entry, run = model.base_altered_by, model.source.path
    if entry is None:
        return None
    path, verified = str(entry["source"]), False
    if run_directory.is_run(run) and model.source.lineage[-1]["source"] == path:
        # The run knows the whole path, and its source has checked what lies there.
        path, verified = run_directory.RunRecord.read(as_path(run)).model, True
    try:
        source = open_source(path)
    except UserError as error:
        log.warning(
            "%s: was trained beyond its new blocks, and the model before that cannot be opened "
            "(%s); forgetting is not measured. Name the original with --base.",
            *(run, error),
        )
        return None
    digest = entry.get("base_digest")
    if not verified and digest is not None and source.fingerprint().digest != digest:
        raise UserError(
            f"{path}: is not the model that {run} was trained from (its fingerprint differs); put "
            "that back, or name the original with --base."
        )
    generation = max(model.plan.generation - 1, 0)
    return open_model(path, dtype=model.dtype.name, generation=generation)


def compare(model: Model, strengths: Sequence[float] | None, base: Model | None) -> Comparison:
    """The model at each strength (None: 1 and 0), and `base` where there is one."""
    grown = model.plan.generation > 0
    if not grown:
        settings = [Setting(MODEL, model)]
    else:
        settings = [
            Setting(_label(model, s), model, s)
            for s in dict.fromkeys((1.0, 0.0) if strengths is None else strengths)
        ]
    if base is not None:
        reference = Setting(BASE, base)
        return Comparison((*settings, reference), reference)
    if not grown or model.base_altered_by is not None:
        return Comparison(tuple(settings), None)
    return Comparison(tuple(settings), Setting(OFF, model, 0.0))


def _label(model: Model, strength: float) -> str:
    if strength == 1:
        return ON
    if strength == 0:
        altered = model.base_altered_by is not None
        return f"{OFF} (trained too: not the original)" if altered else OFF
    return f"strength {strength:g}"


def check_strengths(model: OpenedModel, strengths: Sequence[float] | None) -> None:
    """Raises UserError for strengths that this model cannot be evaluated at."""
    if isinstance(model.source, Strength):
        raise UserError(
            f"{model.source.path}: is loaded at strength {model.source.strength}; load it without, "
            "and give the strengths to evaluate."
        )
    if strengths is not None and not model.plan.generation:
        raise UserError(f"{model.source.path}: has no new blocks, so strength means nothing.")
    for strength in strengths or ():
        if not 0 <= strength <= 1:
            raise UserError(f"strength is {strength}; it must be between 0 and 1.")


def check_base(model: OpenedModel, base: OpenedModel) -> None:
    """Raises UserError when the two have different vocabularies or tokenizers."""
    ours, theirs = model.config.vocab_size, base.config.vocab_size
    if ours != theirs:
        raise UserError(
            f"{base.source.path}: has a vocabulary of {theirs}, {model.source.path} one of {ours}; "
            "name the model that it grew from."
        )
    first, second = model.tokenizer, base.tokenizer
    if first is not None and second is not None and first.fingerprint != second.fingerprint:
        raise UserError(
            f"{base.source.path}: has another tokenizer than {model.source.path}; name the model "
            "that it grew from."
        )
