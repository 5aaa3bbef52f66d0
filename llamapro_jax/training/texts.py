"""The texts of a run: checked before anything is read, prepared, opened and mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from llamapro_jax.checkpoint_files import Directory
from llamapro_jax.config import EvalSourceConfig, RunConfig, SourceConfig
from llamapro_jax.data.chat import ChatTemplate
from llamapro_jax.data.dataset import (
    Rows,
    content_of,
    digest_of_rows,
    open_rows,
    open_source,
    prepared_template,
)
from llamapro_jax.data.mixture import Mixture, exact, parts
from llamapro_jax.data.preparation.prepare import fingerprint
from llamapro_jax.data.readers.documents import pieces
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import Tokenizer
from llamapro_jax.remote import is_remote
from llamapro_jax.training.run_directory import DATA


@dataclass(frozen=True)
class Data:
    """The texts of a run. rows: of each, by its place such as "sources.NAME" or "eval.NAME"."""

    mixture: Mixture
    rows: dict[str, Rows]

    @property
    def held_out(self) -> dict[str, Rows]:
        of_eval = ((where.partition("."), rows) for where, rows in self.rows.items())
        return {name: rows for (kind, _, name), rows in of_eval if kind == "eval"}

    @property
    def fingerprints(self) -> dict[str, str]:
        """What each text is recognised by, by its place."""
        return {where: one.digest for where, one in self.rows.items()}

    def passes(self, steps: int) -> str:
        """Of each training text its rows, its share of all, and how often so many steps pass over
        it, a line each."""
        mixture = self.mixture
        lines = []
        for name, rows, part in zip(mixture.names, mixture.lengths, mixture.shares, strict=True):
            share = float(part)
            passes = share * steps * mixture.batch_size / rows
            lines.append(f"{name}: {rows:,} rows, {share:.1%} of the batches, {passes:.2f} passes")
        return "\n".join(lines)


def _training_entries(config: RunConfig) -> list[tuple[str, SourceConfig]]:
    of_sources = [(f"sources.{entry.name}", entry) for entry in config.data.sources]
    return of_sources + [(f"replay.{entry.name}", entry) for entry in config.data.replayed]


def _entries(config: RunConfig) -> list[tuple[str, SourceConfig | EvalSourceConfig]]:
    of_eval = [(f"eval.{entry.name}", entry) for entry in config.data.eval]
    return [*_training_entries(config), *of_eval]


def check_texts(config: RunConfig, tokenizer: Tokenizer | None) -> str | None:
    """The chat template of the conversations that the run trains on; None when there are none.

    Raises UserError for a text that is absent or cannot be read as its kind, a chat template that
    cannot be trained with, and conversations with several of them. Reads no text.
    """
    trained: dict[str, str] = {}
    for where, entry in _entries(config):
        try:
            content = content_of(entry)
            if content is not None:
                pieces(content)
            template = _template(entry, tokenizer)
        except UserError as error:
            raise UserError(f"data.{where}: {error}") from None
        if template is not None and not where.startswith("eval."):
            trained[where] = template
    first = next(iter(trained), None)
    for where, template in trained.items():
        if template != trained[first]:
            raise UserError(
                f"data.{where}: its conversations have another chat template than those of "
                f"data.{first}, and a model is to speak one; prepare both with the same."
            )
    return trained[first] if first else None


def _template(entry: SourceConfig | EvalSourceConfig, tokenizer: Tokenizer | None) -> str | None:
    if entry.kind == "chat" and tokenizer is not None:
        return ChatTemplate.load(entry.template, tokenizer).text
    return prepared_template(entry) if entry.kind == "tfds" else None


def fingerprints(config: RunConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What each text is recognised by, without preparing it. Reads all files of texts.

    Without a tokenizer only rows of tokens are recognised.
    """
    found = {}
    for where, entry in _entries(config):
        content = content_of(entry)
        if content is None:
            found[where] = digest_of_rows(entry.path)
        elif tokenizer is not None:
            length, template = config.data.sequence_length, entry.template
            found[where] = fingerprint(content, tokenizer, length, template=template)
    return found


def open_data(
    config: RunConfig, directory: Directory, vocab_size: int, tokenizer: Tokenizer | None
) -> Data:
    """Prepares the texts, unless they are prepared already, and opens all rows.

    directory: of the run, where the prepared ones go when the configuration names no other.
    """
    rows: dict[str, Rows] = {}
    # What is ready is opened first: it may be of another tokenizer, and preparing takes long.
    entries = _entries(config)
    for where, entry in sorted(entries, key=lambda item: content_of(item[1]) is not None):
        rows[where] = open_source(
            entry,
            tokenizer=tokenizer,
            sequence_length=config.data.sequence_length,
            vocab_size=vocab_size,
            cache_directory=config.data.cache_directory or directory / DATA,
        )
    return _mixed(config, {where: rows[where] for where, _ in entries})


def open_prepared(
    config: RunConfig, places: Mapping[str, tuple[str, str]], vocab_size: int
) -> Data:
    """What another process of the run prepared: path and split of each text.

    Raises UserError when this process does not see it.
    """
    rows: dict[str, Rows] = {}
    for where, entry in _entries(config):
        path, split = places[where]
        if path != entry.path and not is_remote(path) and not Path(path).is_dir():
            raise UserError(
                f"data.{where}: process 0 prepared its text in {path}, which this process does "
                "not see; set data.cache_directory to a directory on a file system that all hosts "
                "share, or to null."
            )
        rows[where] = open_rows(
            path,
            sequence_length=config.data.sequence_length,
            vocab_size=vocab_size,
            split=split,
            name=entry.name,
        )
    return _mixed(config, rows)


def _mixed(config: RunConfig, rows: dict[str, Rows]) -> Data:
    """The mixture: replayed texts have exactly their share of the rows, the sources the rest."""
    replay = config.data.replay
    share = exact(replay.share) if replay else Fraction(0)
    lengths = {where: len(one) for where, one in rows.items()}
    entries = _training_entries(config)
    own, replayed = entries[: len(config.data.sources)], entries[len(config.data.sources) :]
    weights = [
        weight
        for group, part in ((own, 1 - share), (replayed, share))
        for weight in parts([e.weight for _, e in group], [lengths[w] for w, _ in group], part)
    ]
    training = [
        (entry.name, rows[where], weight)
        for (where, entry), weight in zip(entries, weights, strict=True)
    ]
    return Data(Mixture(training, config.data.batch_size, config.seed), rows)
