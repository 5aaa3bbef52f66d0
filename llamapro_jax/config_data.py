"""The data section of a run's configuration: its texts, and the shape of a batch."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Literal

from llamapro_jax.config_rules import Problems, names, not_empty, positive
from llamapro_jax.typed_yaml import option

_SLICE = re.compile(r"(\w+)(?:\[(?:(\d+)(%?))?:(?:(\d+)(%?))?\])?")

Kind = Literal["text", "code", "chat", "tfds", "datasets"]

ROWS = "rows"
"""The weight of a source that is in proportion to its number of rows."""

DEFAULT_FIELD = "text"
DEFAULT_TEMPLATE = "llama_pro"

_PATH = (
    "Files or a directory of them; or the directory of a TFDS or a Hugging Face data set, or the "
    "name of a TFDS one. A URL such as `gs://...` is copied to this host first."
)
_KIND = (
    "`text`: UTF-8 files, JSONL, Parquet; `code`: source files; `chat`: conversations, of which "
    "what the assistant says counts; `tfds`: a data set in ArrayRecord, prepared (tokens) or with "
    "text in it; `datasets`: a directory that Hugging Face's `save_to_disk` wrote. All but rows of "
    "tokens are tokenised and packed first; docs/data.md says how."
)
_FIELD = (
    "Where a document is: the field of a line of JSONL, the column of Parquet or `datasets`, the "
    "feature of a TFDS example without tokens. Of kind `text`, `tfds` and `datasets`."
)
_TEMPLATE = (
    "How a conversation becomes text, of kind `chat`: `llama_pro` (`<|user|>`, `<|assistant|>`), "
    "`tokenizer` (the model's own) or the path of a `.jinja` file."
)
_SPLIT = (
    "The split of a TFDS or Hugging Face data set; of other kinds, such as `train[:90%]`, that "
    "part of the rows."
)


def content_problems(entry: SourceConfig | EvalSourceConfig) -> Problems:
    """An option that nothing reads with this kind is a problem: it would be believed to act."""
    yield from not_empty(entry, "path", "split", "field", "template")
    if entry.field != DEFAULT_FIELD and entry.kind in ("code", "chat"):
        yield "field", f"is {entry.field!r}, which kind {entry.kind!r} does not read; remove it."
    if entry.template != DEFAULT_TEMPLATE and entry.kind != "chat":
        yield (
            "template",
            f"is {entry.template!r}, which kind {entry.kind!r} does not read; set kind to 'chat', "
            "or remove it.",
        )


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A training text."""

    name: str = option("What the log calls this text.")
    path: str = option(_PATH)
    weight: float | Literal["rows"] = option(
        "Its share of the rows, relative to the others of the list; `rows`: in proportion to its "
        "number of rows, so that one epoch passes over each once (then all of the list say so).",
        1.0,
    )
    kind: Kind = option(_KIND, "text")
    field: str = option(_FIELD, DEFAULT_FIELD)
    template: str = option(_TEMPLATE, DEFAULT_TEMPLATE)
    split: str = option(_SPLIT, "train")

    def problems(self) -> Problems:
        yield from content_problems(self)
        if self.weight != ROWS:
            yield from positive(self, "weight")


@dataclasses.dataclass(frozen=True)
class EvalSourceConfig:
    """A held-out text."""

    name: str = option("What the log and the report call this text.")
    path: str = option(_PATH)
    kind: Kind = option("As for a source.", "text")
    field: str = option("As for a source.", DEFAULT_FIELD)
    template: str = option("As for a source.", DEFAULT_TEMPLATE)
    split: str = option(
        f"{_SPLIT} One that overlaps with a source's split of the same path is refused.", "train"
    )

    def problems(self) -> Problems:
        yield from content_problems(self)


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """General text that is repeated while a new domain is learned, against forgetting."""

    share: float = option("Its share of all rows; the sources have the rest.")
    sources: tuple[SourceConfig, ...] = option("The general texts, as data.sources.")

    def problems(self) -> Problems:
        if not 0 < self.share < 1:
            yield (
                "share",
                f"must be above 0 and below 1, is {self.share}; null for data.replay means none.",
            )
        if not self.sources:
            yield "sources", "names no text to replay; give at least one."
        yield from _weights("sources", self.sources)


def _weights(field: str, sources: Sequence[SourceConfig]) -> Problems:
    by_rows = [source.weight == ROWS for source in sources]
    if any(by_rows) and not all(by_rows):
        number = by_rows.index(False)
        yield (
            f"{field}.{number}.weight",
            f"{sources[number].weight} stands beside a weight 'rows'; in one list all are 'rows', "
            "or none.",
        )


def _part(split: str) -> tuple[str, str | None, float, float] | None:
    """Name, unit (None: the whole), start and stop of a split; None of one that is not plain."""
    match = _SLICE.fullmatch(split)
    if match is None:
        return None
    name, start, start_unit, stop, stop_unit = match.groups()
    units = {unit for unit in (start_unit, stop_unit) if unit is not None}
    if len(units) > 1:
        return None
    return name, next(iter(units), None), int(start or 0), int(stop) if stop else math.inf


def _overlap(source: SourceConfig, held_out: EvalSourceConfig) -> bool:
    """Whether both read one path, and their splits can be seen to have rows in common.

    Seen is what `name`, `name[A:B]` and `name[A%:B%]` say. Rows are not compared with per cent.
    """
    if os.path.realpath(source.path) != os.path.realpath(held_out.path):
        return False
    one, other = _part(source.split), _part(held_out.split)
    if one is None or other is None:
        return source.split == held_out.split
    (name, unit, start, stop), (other_name, other_unit, other_start, other_stop) = one, other
    if name != other_name:
        return False
    if None in (unit, other_unit):
        return True
    return unit == other_unit and max(start, other_start) < min(stop, other_stop)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training and held-out texts, and the shape of a batch."""

    sequence_length: int = option("Tokens in a row.")
    batch_size: int = option("Rows in a step, over all devices and microbatches.")
    sources: tuple[SourceConfig, ...] = option("The training texts.")
    replay: ReplayConfig | None = option(
        "General text mixed in at a given share, against forgetting; null: none.", None
    )
    eval: tuple[EvalSourceConfig, ...] = option("The held-out texts.", ())
    cache_directory: str | None = option(
        "Where tokenised text is kept, to be shared by runs, a path or a URL; null: inside the run "
        "directory.",
        None,
    )

    @property
    def replayed(self) -> tuple[SourceConfig, ...]:
        """The texts of `replay`, none without it."""
        return self.replay.sources if self.replay else ()

    def problems(self) -> Problems:
        yield from positive(self, "sequence_length", "batch_size")
        if not self.sources:
            yield "sources", "names no text to train on; give at least one."
        yield from _weights("sources", self.sources)
        yield from names("sources", self.sources)
        yield from names("replay.sources", self.replayed)
        trained = {source.name for source in self.sources}
        for i, source in enumerate(self.replayed):
            if source.name in trained:
                yield (
                    f"replay.sources.{i}.name",
                    f"{source.name!r} is a name in sources too; give it another one.",
                )
        yield from names("eval", self.eval)
        for i, entry in enumerate(self.eval):
            for source in (*self.sources, *self.replayed):
                if _overlap(source, entry):
                    what = f"{entry.path!r} ({entry.split})"
                    by = f"{source.name} has {source.path!r} ({source.split})"
                    yield (
                        f"eval.{i}.path",
                        f"{what} is trained on: {by}; name a text that is held out.",
                    )
                    break
