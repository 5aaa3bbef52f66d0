"""A source to a prepared data set: tokenise, pack, write, once for each content and tokenizer.

A data set is a TFDS directory in ArrayRecord with the splits `train` and, of a source with a
`held_out` share, `validation`; `fingerprint.json` with what went in and the counts; and
`tokenizer/`. Each piece of the source becomes one shard, so the bytes do not depend on how many
processes make them, or on whether a run was killed in between.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from llamapro_jax.data.chat import ChatTemplate
from llamapro_jax.data.preparation.identity import (
    Identity,
    check_states,
    differences,
    identify,
    states,
)
from llamapro_jax.data.preparation.places import with_lines
from llamapro_jax.data.preparation.processes import available_cores, make_pieces
from llamapro_jax.data.preparation.progress import Display
from llamapro_jax.data.preparation.shards import Counts, Recipe, Seen, Tokenizer, good_or_bad
from llamapro_jax.data.preparation.work import Result, Work, working
from llamapro_jax.data.readers.documents import Bad, Content, Piece, input_files, pieces
from llamapro_jax.data.records import SPLIT, write_metadata
from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json, require_new_directory, write_json
from llamapro_jax.hf.tokenizer import Tokenizer as ModelTokenizer
from llamapro_jax.hf.tokenizer import with_template, write_tokenizer
from llamapro_jax.local_copies import scratch, upload
from llamapro_jax.manifest import write_manifest
from llamapro_jax.remote import RemotePath, sizes

__all__ = ["Preparation", "Tokenizer", "fingerprint", "prepare", "prepare_in", "read_fingerprint"]

FINGERPRINT_FILE = "fingerprint.json"
TOKENIZER_DIRECTORY = "tokenizer"
# A share of bad records is judged before the end only when so many were read.
_RECORDS_TO_JUDGE = 1000
_RECORDS_LOOKED_AT = 10
# Of each data set that was ever prepared.
_KEYS = {"fingerprint", "tokenizer", "documents", "bytes", "tokens", "targets", "largest_token"}


@dataclasses.dataclass(frozen=True)
class Preparation:
    """One source that is to become one data set. Made, it is checked; `run` does the work.

    target: the directory of the data set. cache: instead, where `STEM-HASH` is made. template: of
    kind `chat`, as `ChatTemplate.load` takes it. held_out: share of the documents that go to the
    split `validation`, by a hash of their content. max_bad: largest share of the records that may
    be bad; with 0 the first one ends it. workers: processes; None: one a core. label: what
    messages call it.

    Raises UserError for a source that is absent or of another kind, and a template that cannot be
    used.
    """

    content: Content
    tokenizer: Tokenizer
    sequence_length: int
    target: Path | None = None
    cache: Path | None = None
    template: str = "llama_pro"
    held_out: float = 0.0
    max_bad: float = 0.0
    workers: int | None = 1
    label: str | None = None

    def __post_init__(self) -> None:
        if (self.target is None) == (self.cache is None):
            raise ValueError("exactly one of target and cache is needed")
        if self.content.kind == "chat":
            _ = self._chat_template
        _ = self.pieces

    @cached_property
    def files(self) -> list[Path]:
        return input_files(self.content)

    @cached_property
    def pieces(self) -> list[Piece]:
        return pieces(self.content)

    @cached_property
    def _states(self) -> list[tuple[int, int]]:
        return states(self.files)

    @cached_property
    def identity(self) -> Identity:
        """Reads all files of the source."""
        _ = self._states  # as they are before they are read
        return identify(
            self.content,
            self.tokenizer.fingerprint,
            self.sequence_length,
            self._chat_template.fingerprint if self._chat_template else None,
            self.held_out,
            self.files,
            len(self.pieces),
        )

    @cached_property
    def directory(self) -> Path:
        """Of the data set."""
        if self.target is not None:
            return self.target
        assert self.cache is not None
        name = Path(self.content.path).resolve().stem
        stem = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "text"
        return self.cache / f"{stem}-{self.identity.digest[:12]}"

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        if self.content.kind != "chat":
            return None
        return ChatTemplate.load(self.template, self.tokenizer)

    def is_done(self) -> bool:
        """Whether the data set is there. Raises UserError when another is in its place."""
        record = read_fingerprint(self.directory)
        if record is None:
            require_new_directory(self.directory)
            return False
        if record.get("fingerprint") != self.identity.digest:
            raise UserError(
                f"{self.directory}: was prepared differently: "
                f"{differences(record, self.identity)}. Remove it, or name another output."
            )
        if "bad" in record:
            first = [Bad(**bad) for bad in record["bad_records"][:1]]
            self._check_bad(record["bad"], record["records"], first)
        return True

    def check_beginning(self) -> None:
        """Looks at the first records: a field that none has is found now and not in hours.

        Raises UserError when the first is bad and none may be, and when all of some are.
        """
        first = list(islice(good_or_bad(self.pieces[0]), _RECORDS_LOOKED_AT))
        bad = [one for one in first if isinstance(one, Bad)]
        if bad and (self.max_bad == 0 or len(bad) == len(first)):
            raise UserError(
                f"{bad[0].where}: {bad[0].why}{self._leaving_out(len(bad), len(first))}"
            )

    def run(self) -> Path:
        """Makes the data set unless it is there; what was finished before is not made again.

        Memory is bounded: by a batch and the largest document, in each process. Raises UserError
        for bad records beyond `max_bad`, files that cannot be read or change meanwhile, a source
        without text, another data set in its place, and a second process that prepares it.
        """
        if self.is_done():
            return self.directory
        with working(self.directory, self.identity.digest, self.cache is not None) as work:
            if self.is_done():  # by another process, while this one waited
                work.drop_if_empty()
                return self.directory
            results = self._make(work)
            check_states(self.files, self._states)
            self._finish(work, results)
        return self.directory

    def _make(self, work: Work) -> list[Result]:
        """The results of all pieces, in order."""
        count = len(self.pieces)
        results = work.results(count)
        tasks = [(i, piece) for i, piece in enumerate(self.pieces) if i not in results]
        recipe = Recipe(self.tokenizer, self.sequence_length, self.template, self.held_out)
        workers = available_cores() if self.workers is None else self.workers
        label = self.label or Path(self.content.path).name
        seen = Seen()
        with Display(label, sum(piece.bytes for piece in self.pieces)) as display:

            def report(more: Seen) -> None:
                seen.add(more)
                self._check_seen(seen)
                display.add(more)

            for index in sorted(results):
                seen.add(results[index].seen)
                display.done_before(results[index].seen)
            results |= make_pieces(tasks, work, recipe, workers, report)
            ordered = [results[index] for index in range(count)]
            total = _total_seen(ordered)
            self._check_bad(total.bad, total.records, total.bad_records)
        return ordered

    def _check_seen(self, seen: Seen) -> None:
        """Ends it early, when so many are bad that all which are left would have to be good."""
        if self.max_bad == 0 or seen.records >= _RECORDS_TO_JUDGE:
            total_bytes = sum(piece.bytes for piece in self.pieces)
            expected = seen.records * max(1.0, total_bytes / max(1, seen.bytes))
            self._check_bad(seen.bad, expected, seen.bad_records)

    def _check_bad(self, bad: int, records: float, bad_records: Sequence[Bad]) -> None:
        if bad <= self.max_bad * records:
            return
        (first,) = with_lines(bad_records[:1])
        message = f"{first.where}: {first.why}"
        if self.max_bad > 0:
            raise UserError(
                f"{self.content.path}: {bad:,} of its records are bad, of {records:,.0f}, which is "
                f"more than max_bad allows ({self.max_bad:g}); the first: {message}"
            )
        raise UserError(message + self._leaving_out(bad, records))

    def _leaving_out(self, bad: int, records: float) -> str:
        """How to go on without the bad records, where others are good."""
        if bad >= records:
            return ""
        if self.target is not None:
            return " (max_bad is the share of bad records that may be left out)"
        return (
            " (to leave bad records out, prepare this source with `llamapro prepare`, whose "
            "max_bad is the share that may be bad)"
        )

    def _finish(self, work: Work, results: list[Result]) -> None:
        splits: dict[str, Counts] = {}
        shards = {}
        for split in results[0].counts if results else ():
            found = [(i, result.counts[split]) for i, result in enumerate(results)]
            found = [(i, counts) for i, counts in found if counts.rows]
            work.name_shards(split, [i for i, _ in found])
            splits[split] = _total([result.counts[split] for result in results])
            if found:
                shards[split] = [(counts.rows, counts.stored_bytes) for _, counts in found]
        if SPLIT not in shards:
            work.remove()
            raise self._nothing_to_train_on(splits)
        write_metadata(work.data, self.sequence_length, shards)
        if isinstance(self.tokenizer, ModelTokenizer):
            write_tokenizer(self.tokenizer, work.data / TOKENIZER_DIRECTORY)
            if self._chat_template is not None:
                with_template(work.data / TOKENIZER_DIRECTORY, self._chat_template.text)
        record = {
            **self.identity.record(),
            **dataclasses.asdict(_total(list(splits.values()))),
            "splits": {split: dataclasses.asdict(counts) for split, counts in splits.items()},
            **_bad_record(_total_seen(results)),
        }
        write_json(work.data / FINGERPRINT_FILE, record)
        write_manifest(work.data)
        work.publish(self.directory)

    def _nothing_to_train_on(self, splits: Mapping[str, Counts]) -> UserError:
        where, total = self.content.path, _total(list(splits.values()))
        if total.rows:
            return UserError(
                f"{where}: held_out is {self.held_out:g}, which leaves none of its "
                f"{total.documents} documents to train on; lower it."
            )
        why = f": {total.dropped:,} conversations are longer than a row" if total.dropped else ""
        return UserError(f"{where}: holds no text{why}; name a source that is not empty.")


def prepare(
    content: Content,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    target: str | Path | None = None,
    cache: str | Path | None = None,
    template: str = "llama_pro",
    held_out: float = 0.0,
    max_bad: float = 0.0,
    workers: int | None = 1,
    label: str | None = None,
) -> Path:
    """The directory of the prepared data set; it is made unless it is there.

    Arguments and errors are those of `Preparation` and its `run`.
    """
    return Preparation(
        content,
        tokenizer,
        sequence_length,
        None if target is None else Path(target),
        None if cache is None else Path(cache),
        template,
        held_out,
        max_bad,
        workers,
        label,
    ).run()


def prepare_in(
    cache: Path | RemotePath,
    content: Content,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    template: str = "llama_pro",
    label: str | None = None,
) -> Path | RemotePath:
    """`prepare` in a cache. For a remote one it is made here and copied there, once for all."""
    if isinstance(cache, Path):
        return prepare(
            content, tokenizer, sequence_length, cache=cache, template=template, label=label
        )
    with scratch() as directory:
        made = Preparation(
            content, tokenizer, sequence_length, None, directory, template, label=label
        )
        target = cache / made.directory.name
        if not (target / FINGERPRINT_FILE).is_file():
            here = made.run()
            upload(here, target, sizes(here), last=FINGERPRINT_FILE)
    return target


def fingerprint(
    content: Content,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    template: str = "llama_pro",
    held_out: float = 0.0,
) -> str:
    """The `fingerprint` that `prepare` records, without preparing anything. Reads all files."""
    unused = Path()
    preparation = Preparation(
        content, tokenizer, sequence_length, unused, template=template, held_out=held_out
    )
    return preparation.identity.digest


def read_fingerprint(directory: str | Path) -> dict[str, Any] | None:
    """The content of a prepared data set's `fingerprint.json`; None for one made by others.

    Another program's file of the same name counts as none.
    """
    file = Path(directory) / FINGERPRINT_FILE
    record = read_json(file) if file.is_file() else None
    return record if isinstance(record, dict) and record.keys() >= _KEYS else None


def _total(counts: list[Counts]) -> Counts:
    total = Counts()
    for one in counts:
        total.add(one)
    return total


def _total_seen(results: list[Result]) -> Seen:
    total = Seen()
    for result in results:
        total.add(result.seen)
    return total


def _bad_record(seen: Seen) -> dict[str, Any]:
    kept = with_lines(seen.bad_records)
    return {
        "records": seen.records,
        "bad": seen.bad,
        "bad_records": [{"where": bad.where, "why": bad.why} for bad in kept],
    }
