"""`SHA256SUMS`: the hash of each file of a directory, as `sha256sum -c SHA256SUMS` reads it too.

It tells damage on the way from what was written. It is no signature: who can change the files can
write it anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_write

FILE = "SHA256SUMS"
# People write their own model card over it.
NOT_LISTED = (FILE, "README.md")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256_of(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def write_manifest(directory: Path, but: str | None = None) -> None:
    """Hashes all files of `directory` but the model card and locks, and writes SHA256SUMS.

    but: a directory in it whose files have hashes of their own.
    """
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    names = sorted(p.as_posix() for p in paths if _is_listed(p) and p.parts[0] != but)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing frees Python's lock
        sums = threads.map(sha256_of, [directory / name for name in names])
        lines = [f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True)]
    atomic_write(directory / FILE, "".join(lines))


def _is_listed(file: Path) -> bool:
    return file.name not in NOT_LISTED and not file.name.startswith(".")


def read_manifest(directory: Path) -> dict[str, str]:
    """SHA-256 by name; empty without a SHA256SUMS.

    Raises UserError when it is malformed, or a name in it leaves the directory.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    sums: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}).") from None
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}:{number}: is not a SHA-256, two spaces and a file name.")
        name = match[2]
        if name.startswith("/") or ".." in Path(name).parts:
            raise UserError(f"{path}:{number}: {name!r} is not in this directory.")
        sums[name] = match[1]
    return sums
