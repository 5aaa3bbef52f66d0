"""A prepared data set: every record is read, and the counts of its fingerprint are counted anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.data.columns import Columns
from llamapro_jax.data.preparation.identity import Identity
from llamapro_jax.data.preparation.prepare import (
    FINGERPRINT_FILE,
    TOKENIZER_DIRECTORY,
    read_fingerprint,
)
from llamapro_jax.data.records import open_builder
from llamapro_jax.data.rows import complete_row
from llamapro_jax.hf.tokenizer import load_tokenizer
from llamapro_jax.verification.files import check_files
from llamapro_jax.verification.findings import Findings, progress

_AT_ONCE = 256
_OPTIONS = ("kind", "field", "split", "template", "held_out", "pieces")


def verify_data_set(findings: Findings, directory: Path) -> None:
    """Reads all shards of all splits. Raises UserError when it cannot be opened at all."""
    builder = open_builder(str(directory))
    directory = Path(builder.data_path)
    record = None
    with findings.collecting(directory / FINGERPRINT_FILE):
        record = read_fingerprint(directory)
        if record is None:
            findings.notes.append(f"has no {FINGERPRINT_FILE} of `llamapro prepare`")
    if record is not None:
        _check_record(findings, directory, record)
    check_files(findings, directory, written=record is not None)
    features = builder.info.features
    if "tokens" not in features or len(features["tokens"].shape) != 1:
        findings.problem(directory, "features", list(features), "tokens [T]")
        return
    length = features["tokens"].shape[0]
    listed = set()
    for split, info in builder.info.splits.items():
        try:
            files = [Path(file) for file in info.filepaths]
        except (ValueError, KeyError, IndexError) as error:  # its pattern of names is malformed
            findings.problem(directory / "dataset_info.json", split, _first_line(error), "files")
            continue
        listed |= {file.name for file in files}
        _check_split(findings, directory, builder, split, files, length, record)
    for file in sorted(directory.glob("*.array_record*")):
        if file.name not in listed:
            findings.problem(file, None, "a shard", "none, as dataset_info.json says")


def _check_record(findings: Findings, directory: Path, record: Mapping[str, Any]) -> None:
    """That fingerprint.json is as it was written, and the tokenizer the one it names."""
    path = directory / FINGERPRINT_FILE
    try:
        options = {name: record[name] for name in _OPTIONS}
        files = dict(record["files"])
        identity = Identity(record["tokenizer"], record["sequence_length"], options, files)
        digest = identity.digest
    except (KeyError, TypeError, ValueError) as error:
        findings.problem(path, None, f"{type(error).__name__}: {error}", "all that prepare records")
    else:
        findings.compare(path, "fingerprint", record["fingerprint"], digest)
    if (directory / TOKENIZER_DIRECTORY).is_dir():
        with findings.collecting(directory / TOKENIZER_DIRECTORY):
            found = load_tokenizer(directory / TOKENIZER_DIRECTORY).fingerprint
            findings.compare(
                directory / TOKENIZER_DIRECTORY, "fingerprint", found, record["tokenizer"]
            )


def _check_split(
    findings: Findings,
    directory: Path,
    builder: Any,
    split: str,
    files: Sequence[Path],
    length: int,
    record: Mapping[str, Any] | None,
) -> None:
    missing = [file for file in files if not file.is_file()]
    for file in missing:
        findings.problem(file, None, "no file", "a shard, as dataset_info.json says")
    if missing:
        return
    try:
        records = builder.as_data_source(split=split).data_source
        columns = Columns(builder.info.features, length)
        count = len(records)
    except (RuntimeError, ValueError, OSError) as error:
        findings.problem(directory, split, _first_line(error), "a split that can be opened")
        return
    findings.compare(directory, f"{split}: rows", count, builder.info.splits[split].num_examples)
    counts = {"rows": count, "tokens": 0, "targets": 0, "largest_token": 0}
    bad: list[tuple[int, str]] = []
    with progress(f"rows of {split}", count) as done:
        for start in range(0, count, _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, count))
            for row in _read(records, columns, indices, bad):
                _add(counts, row)
            done(len(indices))
    findings.count("rows", count)
    for first, last, why in _ranges(bad):
        rows = f"row {first}" if first == last else f"rows {first} to {last}"
        findings.problem(directory, f"{split}: {rows}", why, "a record that can be read")
    if record is not None and not bad:
        recorded = record.get("splits", {}).get(split, record)
        for name, found in counts.items():
            if name in recorded:
                findings.compare(directory, f"{split}: {name}", found, recorded[name])


def _read(
    records: Any, columns: Columns, indices: Sequence[int], bad: list[tuple[int, str]]
) -> Iterator[dict[str, np.ndarray]]:
    """The rows that can be read, as [n, T] together or one by one; `bad` gets the others."""
    try:
        yield complete_row(columns.decode(records.__getitems__(indices)))
        return
    except (RuntimeError, ValueError, OSError) as error:
        if len(indices) == 1:
            bad.append((indices[0], _first_line(error)))
            return
    for index in indices:
        yield from _read(records, columns, [index], bad)


def _add(counts: dict[str, int], rows: Mapping[str, np.ndarray]) -> None:
    counts["tokens"] += int((rows["segment_ids"] > 0).sum())
    counts["targets"] += int(((rows["positions"] > 0) & rows["loss_mask"]).sum())
    counts["largest_token"] = max(counts["largest_token"], int(rows["tokens"].max(initial=0)))


def _ranges(bad: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int, str]]:
    """Neighbours as one, with the reason of the first: a truncated shard loses thousands."""
    start = 0
    for i in range(1, len(bad) + 1):
        if i == len(bad) or bad[i][0] != bad[i - 1][0] + 1:
            yield bad[start][0], bad[i - 1][0], bad[start][1]
            start = i


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
