"""A directory that `save_to_disk` of the package `datasets` wrote, to rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamapro_jax.data.readers.packages import data_package
from llamapro_jax.errors import UserError, nearest
from llamapro_jax.files import read_json

_SPLITS_FILE = "dataset_dict.json"
_STATE_FILE = "state.json"
_STRINGS = ("string", "large_string", "string_view")


def is_datasets_directory(path: Path) -> bool:
    return (path / _SPLITS_FILE).is_file() or (path / _STATE_FILE).is_file()


def data_files(path: Path, split: str) -> list[Path]:
    """The files that decide the rows of the split. Raises UserError when there are none."""
    directory = _split_directory(path, split)
    data_package("datasets", str(path))
    state = read_json(directory / _STATE_FILE)
    with _errors(directory):
        stored = [one["filename"] for one in state["_data_files"]]
    names = [_STATE_FILE, "dataset_info.json", *stored]
    return sorted(directory / name for name in names)


def count_rows(path: Path, split: str, field: str | None) -> int:
    """How many rows the split has.

    Raises UserError when it cannot be read or `field` (None: no matter) is no column of strings.
    """
    dataset = _load(path, split)
    if field is not None:
        if field not in dataset.column_names:
            raise UserError(
                f"{path}: has no column {field!r}, only "
                f"{', '.join(map(repr, dataset.column_names))}; set `field` to the one that holds "
                f"the document.{nearest(field, dataset.column_names)}"
            )
        kind = getattr(dataset.features[field], "dtype", dataset.features[field])
        if kind not in _STRINGS:
            raise UserError(
                f"{path}: the column {field!r} is {kind}, not a string; set `field` to the one "
                "that holds the document."
            )
    return len(dataset)


def read_rows(
    path: Path, split: str, field: str | None, start: int, stop: int
) -> Iterator[tuple[str, Any]]:
    """The rows [start, stop): place, and the value of `field` or (None) the row as a dict."""
    with _errors(path):
        dataset = _load(path, split)
        if field is not None:
            dataset = dataset.select_columns([field])
        for index, row in enumerate(dataset.select(range(start, stop)), start=start):
            yield f"{path}: row {index}", row if field is None else row[field]


def _split_directory(path: Path, split: str) -> Path:
    if (path / _SPLITS_FILE).is_file():
        known = read_json(path / _SPLITS_FILE)["splits"]
        if split not in known:
            raise UserError(
                f"{path}: has no split {split!r}, only {', '.join(known)}.{nearest(split, known)}"
            )
        return path / split
    if not (path / _STATE_FILE).is_file():
        raise UserError(
            f"{path}: is not a directory that `save_to_disk` of the package datasets wrote (no "
            f"{_STATE_FILE} or {_SPLITS_FILE} in it); save the data set there, or set another kind."
        )
    own = read_json(path / _STATE_FILE).get("_split")
    # Only a data set that was a split knows its name; `train` is what a configuration has if unset.
    if split not in (own, "train"):
        raise UserError(
            f"{path}: is a single data set, not several splits of which one is {split!r}; remove "
            "`split`, or name the directory that holds the splits."
        )
    return path


def _load(path: Path, split: str) -> Any:
    datasets = data_package("datasets", str(path))
    directory = _split_directory(path, split)
    with _errors(directory):
        return datasets.load_from_disk(str(directory)).with_format(None)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Arrow's and the package's own errors as UserError."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path}: is damaged or incomplete ({reason}); save the data set again."
        ) from None
