"""Files that are either whole or absent: write beside, then rename."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.remote import RemotePath, as_path

# A writer has its lock long before its temporary directory is this old (in seconds).
_UNLOCKED_AGE = 60
# A tokenizer.json of 250,000 tokens has 35 MB; nothing else comes near.
LARGEST_JSON = 2**28
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# A URL that has become a local path.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")


def require_new_directory(path: Path) -> None:
    """Raises UserError unless `path` is an empty directory, or absent where one can be made."""
    if _URL.match(str(path)):
        raise UserError(
            f"{path}: is remote, and only training writes there. Name a local directory, and copy "
            "it when it is done, such as with `gcloud storage cp -r`."
        )
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise UserError(f"{path}: {above} is a file, not a directory; name another place.")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path}: is not a directory; name a new one.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: is not empty; name a new directory or remove this one first.")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write into, renamed to `path` when the block ends well.

    When the block raises, the temporary directory is removed and `path` is as it was. What a
    writer of the same `path` left that was killed on this host is removed first.
    Raises UserError when `path` exists and is not an empty directory.
    """
    path = Path(path)
    require_new_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Locks are not shared between hosts on every file system, so that each minds its own.
    prefix = f".tmp-{path.name}-{socket.gethostname()}-"
    _remove_abandoned(path.parent, prefix)
    temporary = path.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        with _lock(temporary):
            yield temporary
            if path.is_dir():
                path.rmdir()
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Whether this process has the lock of `directory`, which the kernel frees when it dies."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another has it, or the file system knows no locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the temporary directories whose writer is dead."""
    for entry in parent.iterdir():
        if not (entry.name.startswith(prefix) and entry.is_dir()):
            continue
        # Another process may do the same at the same time, or end its own work.
        with suppress(FileNotFoundError):
            young = time.time() - entry.stat().st_mtime < _UNLOCKED_AGE
            with _lock(entry) as abandoned:
                if abandoned and not young:
                    shutil.rmtree(entry, ignore_errors=True)


def atomic_write(path: str | Path | RemotePath, data: str | bytes) -> None:
    """Writes `data` to `path` so that a reader sees the old content or the new, never a part."""
    path = as_path(path)
    raw = data.encode() if isinstance(data, str) else data
    if isinstance(path, RemotePath):  # where a file appears whole
        path.write_bytes(raw)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_bytes(raw)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path | RemotePath, value: Any) -> None:
    """`value` as indented JSON, written atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path | RemotePath) -> Any:
    """The JSON in `path`. Raises UserError with the file, and the line when it is malformed.

    Malformed are also a key with two values, of which readers take one or the other, nesting that
    no reader follows, and a file beyond `LARGEST_JSON`.
    """
    path = as_path(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(
                f"{path}: is larger than {LARGEST_JSON:,} bytes, which no such file is; fetch it "
                "again."
            )
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise UserError(f"{path}: is JSON that cannot be read ({error}).") from None


def parse_json(text: str) -> Any:
    """`json.loads`, but ValueError for a key with two values and for half of a surrogate pair."""
    value = json.loads(text, object_pairs_hook=_unique)
    # Only an escape can bring one, and it could not be written again.
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise ValueError(f"the key {key!r} is there twice, with different values")
    return values


def check_format(description: Any, expected: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless `description` is of the expected format and version."""
    if not isinstance(description, dict) or description.get("format") != expected["format"]:
        raise UserError(f"{path}: is not the description of a {expected['format']}.")
    if description.get("version") != expected["version"]:
        raise UserError(
            f"{path}: has version {description.get('version')!r}; this release reads "
            f"{expected['version']}. Install a newer llamapro_jax."
        )
