"""The configuration of `llamapro prepare CONFIG [key.path=value ...]`.

Relative paths are relative to the directory that the command runs in. `docs/configuration.md` is
generated from this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llamapro_jax import typed_yaml
from llamapro_jax.config_data import DEFAULT_FIELD, DEFAULT_TEMPLATE, Kind, content_problems
from llamapro_jax.config_rules import Problems, names, not_empty, positive
from llamapro_jax.typed_yaml import option


@dataclasses.dataclass(frozen=True)
class PrepareSourceConfig:
    """A source that becomes one data set."""

    name: str = option("The name of its data set in the output directory.")
    path: str = option("As for a source of a run; a TFDS data set has text in it.")
    kind: Kind = option("As for a source of a run.", "text")
    field: str = option("As for a source of a run.", DEFAULT_FIELD)
    split: str = option(
        "The split to read of a TFDS or Hugging Face data set; files have none.", "train"
    )
    template: str = option("As for a source of a run.", DEFAULT_TEMPLATE)
    held_out: float = option(
        "Share of the documents that go to the split `validation`, by a hash of their content.", 0.0
    )
    max_bad: float = option(
        "Largest share of the records that may be bad: they are left out and counted; 0: the first "
        "one ends it.",
        0.0,
    )

    def problems(self) -> Problems:
        yield from content_problems(self)
        if self.split != "train" and self.kind in ("text", "code"):
            yield (
                "split",
                f"is {self.split!r}, which kind {self.kind!r} does not read; remove it.",
            )
        for name in ("held_out", "max_bad"):
            if not 0 <= getattr(self, name) < 1:
                yield name, f"must be at least 0 and below 1, is {getattr(self, name)}."


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Texts, and the tokenizer that makes data sets of them."""

    output: str = option("The directory in which each source becomes the data set `output/NAME`.")
    tokenizer: str = option(
        "A directory with tokenizer.json or tokenizer.model, such as the model's; or a hub id "
        "(`org/name@revision`)."
    )
    sequence_length: int = option("Tokens in a row.")
    sources: tuple[PrepareSourceConfig, ...] = option("What is prepared, one after the other.")
    workers: int | None = option(
        "Processes that tokenise; null: one a core. The rows do not depend on it.", None
    )

    def problems(self) -> Problems:
        yield from not_empty(self, "output", "tokenizer")
        yield from positive(self, "workers")
        if self.sequence_length < 2:
            yield "sequence_length", f"must be at least 2, is {self.sequence_length}."
        if not self.sources:
            yield "sources", "names nothing to prepare; give at least one."
        yield from names("sources", self.sources)

    def target(self, source: PrepareSourceConfig) -> Path:
        """The directory of a source's data set."""
        return Path(self.output) / source.name


def load_prepare_config(path: str | Path, overrides: Sequence[str] = ()) -> PrepareConfig:
    """The configuration in a YAML file, changed by `key.path=value` overrides.

    Raises UserError that lists all problems, each with its file and line or its override.
    """
    return typed_yaml.load(PrepareConfig, path, list(overrides))
