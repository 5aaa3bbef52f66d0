"""A prepared data set for people: its counts, and rows as text with what trains and what does not.

The text of a data set is not to be trusted: whatever a terminal could obey is shown escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from llamapro_jax.data.preparation.prepare import TOKENIZER_DIRECTORY, read_fingerprint
from llamapro_jax.data.records import SPLIT, open_builder, open_split, read_record
from llamapro_jax.data.rows import DTYPES, Row, complete_row, targets_and_weights
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

ROWS = 3
BAD_RECORDS = 3
_BRACKETS = ("\u27e6", "\u27e7")
_PLAIN_BRACKETS = ("[[", "]]")
# By (trained, special).
_STYLES = {
    (True, False): "green",
    (True, True): "bold green",
    (False, False): "dim",
    (False, True): "dim cyan",
}


def describe(
    path: str,
    *,
    split: str | None = None,
    rows: int = ROWS,
    row: int | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """The data set at `path` and some of its rows. Plain JSON values.

    split: such as `train` or `validation[:10%]`; by default `train`, else the first.
    rows: how many to decode, spread evenly over the split; 0 needs no tokenizer.
    row: decode this one alone, counted from 0.
    tokenizer: a directory; by default the data set's own `tokenizer/`.

    Raises UserError: no data set of tokens, no such split or row, no tokenizer, another one than
    the data were prepared with, token ids that it does not have, damaged records.
    """
    builder = open_builder(path)
    features = builder.info.features
    _check_features(features, path)
    fingerprint = _own_fingerprint(builder.data_path)
    splits = {
        name: _counts(info.num_examples, fingerprint, name)
        for name, info in builder.info.splits.items()
    }
    split = split or (SPLIT if SPLIT in splits else next(iter(splits), SPLIT))
    source = open_split(builder, path, split)
    indices = _indices(path, split, len(source), rows, row)
    decoded = []
    if indices:
        own = Path(builder.data_path) / TOKENIZER_DIRECTORY
        decoder = _tokenizer(path, own, tokenizer, fingerprint)
        for index in indices:
            where = f"{path}, row {index} of {split}"
            arrays = _arrays(read_record(source, index, path), where)
            decoded.append({"row": index, **_decoded(arrays, decoder, where)})
    return {
        "path": path,
        "kind": "data set",
        "sequence_length": features["tokens"].shape[0],
        "features": [name for name in DTYPES if name in features],
        "splits": splits,
        # Without the hash of each input file, of which there may be a hundred thousand.
        "fingerprint": fingerprint and {k: v for k, v in fingerprint.items() if k != "files"},
        "split": split,
        "split_rows": len(source),
        "rows": decoded,
    }


def _check_features(features: Any, path: str) -> None:
    if "tokens" not in features:
        raise UserError(
            f"{path}: is a TFDS data set without the feature 'tokens', it has only "
            f"{', '.join(sorted(features))}. Make rows of it with `llamapro prepare`."
        )
    for name in (name for name in DTYPES if name in features):
        feature = features[name]
        whole = np.issubdtype(feature.np_dtype, np.integer) or feature.np_dtype == np.bool_
        if len(feature.shape) != 1 or not whole:
            raise UserError(
                f"{path}: {name!r} is {np.dtype(feature.np_dtype).name} of shape "
                f"{tuple(feature.shape)}; a row has integers [T] there."
            )


def _own_fingerprint(directory: str | Path) -> dict[str, Any] | None:
    """What `llamapro prepare` recorded; None where another program's file has the same name."""
    record = read_fingerprint(directory)
    return record if isinstance(record, dict) and "tokenizer" in record else None


def _counts(rows: int, fingerprint: Mapping[str, Any] | None, split: str) -> dict[str, Any]:
    """Of a split: rows, and what was counted when it was prepared, with the shares of it."""
    counts = (fingerprint or {}).get("splits", {}).get(split)
    if not counts:
        return {"rows": rows}
    names = ("documents", "bytes", "tokens", "targets", "turns_cut", "dropped")
    return {
        "rows": rows,
        **{name: counts[name] for name in names},
        "padding_share": 1 - counts["tokens"] / (rows * fingerprint["sequence_length"]),
        "target_share": counts["targets"] / counts["tokens"],
    }


def _indices(path: str, split: str, count: int, rows: int, row: int | None) -> list[int]:
    if row is not None:
        if not 0 <= row < count:
            raise UserError(
                f"{path}: has no row {row}; split {split!r} has {count:,} rows, 0 to {count - 1}."
            )
        return [row]
    if rows < 0:
        raise UserError(f"--rows {rows}: must be 0 or more.")
    rows = min(rows, count)
    return [i * count // rows for i in range(rows)]


def _tokenizer(
    path: str, own: Path, given: str | None, fingerprint: Mapping[str, Any] | None
) -> Tokenizer:
    """The one named, else the data set's own; the one that the data were prepared with."""
    if given is None and not find_tokenizer(own):
        raise UserError(
            f"{path}: has no {TOKENIZER_DIRECTORY}/ to decode rows with. Name the tokenizer's "
            "directory with --tokenizer, or pass --rows 0 for the counts alone."
        )
    tokenizer = load_tokenizer(own if given is None else Path(given).expanduser())
    prepared_with = (fingerprint or {}).get("tokenizer", tokenizer.fingerprint)
    if tokenizer.fingerprint != prepared_with:
        raise UserError(
            f"{path}: was prepared with tokenizer {prepared_with[:12]}, {tokenizer.source} is "
            f"{tokenizer.fingerprint[:12]}; name the one that it was prepared with."
        )
    return tokenizer


def _arrays(record: Mapping[str, Any], where: str) -> Row:
    features = {name: np.asarray(record[name]) for name in DTYPES if name in record}
    lengths = {name: len(array) for name, array in features.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{where}: its features differ in length ({lengths}); write it again.")
    # Before the cast to int32, which would wrap.
    if features["tokens"].size and int(features["tokens"].max()) > np.iinfo(np.int32).max:
        raise UserError(f"{where}: {int(features['tokens'].max())} is too large for a token id.")
    return complete_row(features)


def _decoded(row: Row, tokenizer: Tokenizer, where: str) -> dict[str, Any]:
    """The segments of a row in order, each as spans of text; padding is only counted."""
    tokens_T, segment_ids_T = row["tokens"], row["segment_ids"]
    unknown = next((int(i) for i in tokens_T if not _known(tokenizer, int(i))), None)
    if unknown is not None:
        raise UserError(
            f"{where}: token {unknown} is not in the tokenizer {tokenizer.source}, which has "
            f"{tokenizer.vocab_size:,}; name with --tokenizer the one that the data were made with."
        )
    _, weights_BT = targets_and_weights({name: array[None] for name, array in row.items()})
    counts_T = np.roll(weights_BT[0], 1)  # at the token that is predicted; the last weight is 0
    starts = np.flatnonzero(np.diff(segment_ids_T, prepend=segment_ids_T[:1] - 1))
    segments = []
    for start, stop in zip(starts, [*starts[1:], len(tokens_T)], strict=True):
        if segment_ids_T[start] != 0:
            ids, mask = tokens_T[start:stop].tolist(), row["loss_mask"][start:stop].tolist()
            segments.append(
                {
                    "segment": int(segment_ids_T[start]),
                    "tokens": int(stop - start),
                    "targets": int(counts_T[start:stop].sum()),
                    "spans": _spans(ids, mask, tokenizer),
                }
            )
    used = sum(segment["tokens"] for segment in segments)
    return {
        "tokens": used,
        "targets": sum(segment["targets"] for segment in segments),
        "padding": len(tokens_T) - used,
        "segments": segments,
    }


def _known(tokenizer: Tokenizer, token: int) -> bool:
    return token >= 0 and tokenizer.token_of(token) is not None


def _spans(ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The text of a segment, joined where neighbours are alike.

    `trained` is the loss mask; of a character that is several tokens it is that of the last.
    `special` tokens come by their names.
    """
    spans: list[dict[str, Any]] = []
    for text, trained, special in _pieces(ids, mask, tokenizer):
        kind = {"trained": trained, "special": special}
        if spans and not special and spans[-1].items() >= kind.items():
            spans[-1]["text"] += text
        elif text:
            spans.append({"text": text, **kind})
    return spans


def _pieces(
    ids: list[int], mask: list[bool], tokenizer: Tokenizer
) -> Iterator[tuple[str, bool, bool]]:
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    stream = tokenizer.stream_decoder(skip_special=False)
    if names and ids[0] not in names:
        # Within a document a space at the begin is one; only after a special token (and at the
        # begin of a text) is it SentencePiece's own, which decoding takes away.
        stream.push(next(iter(names)))
    for i, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if token in names:
            yield stream.flush(), mask[max(i - 1, 0)], False
            yield names[token], trained, True
            stream = tokenizer.stream_decoder(skip_special=False)
        else:
            yield stream.push(token), trained, False
    yield stream.flush(), mask[-1], False


def print_description(description: Mapping[str, Any], console: Console) -> None:
    """For people: in colour where the console has it, with brackets round what is masked else."""
    page = _Page(console)
    length = description["sequence_length"]
    page.line(f"{description['path']}: rows of {length or 'any number of'} tokens", "bold")
    for name, counts in description["splits"].items():
        page.line(f"  {name}: {', '.join(_facts(counts))}")
    for line in _bad_records(description["fingerprint"]):
        page.line(f"  {line}")
    if description["rows"]:
        page.line()
        page.legend()
    for row in description["rows"]:
        _print_row(row, description, page)


def _facts(counts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{counts['rows']:,} rows"
    if "tokens" not in counts:
        return
    yield f"{counts['documents']:,} documents"
    if counts["bytes"]:
        yield f"{counts['bytes']:,} bytes"
    yield f"{counts['tokens']:,} tokens"
    yield f"{counts['target_share']:.1%} of them count for the loss"
    yield f"{counts['padding_share']:.2%} of the rows is padding"
    if counts["dropped"]:
        yield f"{counts['dropped']:,} conversations dropped (their first exchange is too long)"
    if counts["turns_cut"]:
        yield f"{counts['turns_cut']:,} turns cut (of conversations longer than a row)"


def _bad_records(fingerprint: Mapping[str, Any] | None) -> Iterator[str]:
    if fingerprint is None:
        yield "made by others: what went in was not counted"
        return
    bad = fingerprint.get("bad", 0)
    yield f"{bad:,} bad records left out" + (", the first:" if bad else "")
    for record in fingerprint.get("bad_records", [])[:BAD_RECORDS]:
        yield f"  {record['where']}: {record['why']}"


def _print_row(row: Mapping[str, Any], description: Mapping[str, Any], page: _Page) -> None:
    count = len(row["segments"])
    page.line()
    page.line(
        f"row {row['row']} of {description['split_rows']:,} in {description['split']}: "
        f"{row['tokens']} tokens in {count} segment{'s' * (count != 1)}, "
        f"{row['targets']} count for the loss, {row['padding']} padding",
        "bold",
    )
    for segment in row["segments"]:
        page.line(
            f"segment {segment['segment']}: {segment['tokens']} tokens, "
            f"{segment['targets']} count for the loss",
            "bold",
        )
        page.spans(segment["spans"])
    if row["padding"]:
        page.line(f"padding: {row['padding']} tokens", "bold")


class _Page:
    """Lines on a console. Nothing gets there but through here, so that all of it is harmless."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._colours = console.color_system is not None and not console.no_color
        encodes = _encodable("".join(_BRACKETS), console.encoding) == "".join(_BRACKETS)
        self._brackets = _BRACKETS if encodes else _PLAIN_BRACKETS

    def line(self, text: str = "", style: str = "") -> None:
        self._print(Text(self._harmless(text).replace("\n", "\\n"), style))

    def legend(self) -> None:
        if self._colours:
            self._print(
                Text.assemble(
                    ("trained", _STYLES[True, False]),
                    ", ",
                    ("special token", _STYLES[True, True]),
                    ", ",
                    ("masked: does not count for the loss", _STYLES[False, False]),
                )
            )
        else:
            self.line(f"masked, does not count for the loss: {'...'.join(self._brackets)}")

    def spans(self, spans: list[dict[str, Any]]) -> None:
        """Each line after a bar, so that no text can pass for a line of ours."""
        text, masked = Text(), False
        for span in spans:
            if not self._colours and span["trained"] == masked:
                text.append(self._brackets[masked])
                masked = not masked
            style = _STYLES[span["trained"], span["special"]] if self._colours else ""
            text.append(self._harmless(self._unbracketed(span["text"])), style)
        if masked:
            text.append(self._brackets[True])
        for line in text.split("\n", allow_blank=True):
            self._print(Text("| ") + line)

    def _unbracketed(self, text: str) -> str:
        """Brackets of the text itself escaped, where they would pass for ours."""
        if not self._colours and self._brackets == _BRACKETS:
            for bracket in _BRACKETS:
                text = text.replace(bracket, _escaped(bracket))
        return text

    def _print(self, text: Text) -> None:
        # Lines are as long as they are in a file or a pipe, and a terminal folds them itself.
        self._console.print(text, soft_wrap=True, highlight=False)

    def _harmless(self, text: str) -> str:
        """Control characters, invisible ones and all spaces but the space escaped; not newlines."""
        shown = (c if c.isprintable() or c == "\n" else _escaped(c) for c in text)
        return _encodable("".join(shown), self._console.encoding)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)
