"""Files that are either whole or absent: write beside, then rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError


def require_new_directory(path: Path) -> None:
    """Raises UserError unless `path` is absent or an empty directory."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path}: is not a directory; name a new one.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: is not empty; name a new directory or remove this one first.")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write into, renamed to `path` when the block ends well.

    When the block raises, the temporary directory is removed and `path` is as it was.
    Raises UserError when `path` exists and is not an empty directory.
    """
    path = Path(path)
    require_new_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Writes `data` to `path` so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, written atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON in `path`. Raises UserError with the file, and the line when it is malformed."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON ({error.msg}).") from None


def check_format(description: Any, expected: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless `description` is of the expected format and version."""
    if not isinstance(description, dict) or description.get("format") != expected["format"]:
        raise UserError(f"{path}: is not the description of a {expected['format']}.")
    if description.get("version") != expected["version"]:
        raise UserError(
            f"{path}: has version {description.get('version')!r}; this release reads "
            f"{expected['version']}. Install a newer llamapro_jax."
        )
