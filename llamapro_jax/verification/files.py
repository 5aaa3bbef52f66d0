"""Whole files against the hashes that are known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llamapro_jax import manifest
from llamapro_jax.hf.hub import check_link, is_blob
from llamapro_jax.verification.findings import Findings, progress

_BLOCK = 2**22


@dataclass(frozen=True)
class _Known:
    """The hash that a file should have. git: as Git names a blob, by SHA-1 with its length."""

    file: Path
    digest: str
    git: bool = False


def check_files(
    findings: Findings, directory: Path, *, complete: bool = True, written: bool = True
) -> set[str]:
    """Compares files with SHA256SUMS and with their names in a hub cache.

    complete: SHA256SUMS lists all files, so that others are noted. written: what wrote the
    directory wrote a SHA256SUMS too, so that without one, or with an empty one, it lost it.
    Returns the names of those that are what they should be.
    """
    known: list[_Known] = []
    with findings.collecting(directory / manifest.FILE):
        sums = manifest.read_manifest(directory)
        known += [_Known(directory / name, digest) for name, digest in sums.items()]
        if not sums and written:
            findings.problem(directory / manifest.FILE, None, "no hashes", "those of the files")
        if sums and complete:
            _note_unlisted(findings, directory, set(sums))
    known += _blobs(directory)
    present = []
    for one in known:
        if not one.file.is_file():
            findings.problem(one.file, None, "no file", f"SHA-256 {one.digest}")
            continue
        with findings.collecting(one.file):
            check_link(directory, one.file)
            present.append(one)
    good = set()
    with progress("files", sum(one.file.stat().st_size for one in present)) as done:
        for one in present:
            with findings.collecting(one.file):
                digest = _digest(one, done)
                findings.count("files")
                kind = "Git SHA-1" if one.git else "SHA-256"
                if findings.compare(one.file, kind, digest, one.digest):
                    good.add(one.file.relative_to(directory).as_posix())
    return good


def _note_unlisted(findings: Findings, directory: Path, listed: set[str]) -> None:
    names = (entry.name for entry in sorted(directory.iterdir()) if entry.is_file())
    ignored = (*manifest.NOT_LISTED, ".gitattributes")
    unlisted = [name for name in names if name not in listed and name not in ignored]
    if unlisted:
        findings.notes.append(f"not in {manifest.FILE}, so not verified: {', '.join(unlisted)}")


def _blobs(directory: Path) -> Iterator[_Known]:
    """The files of a snapshot of a hub cache, which are links to blobs named by their hash."""
    for file in sorted(directory.iterdir()):
        target = file.resolve()
        if file.is_symlink() and is_blob(target) and target.is_file():
            yield _Known(file, target.name, git=len(target.name) == 40)


def _digest(known: _Known, done: Callable[[int], None]) -> str:
    size = known.file.stat().st_size
    digest = hashlib.sha1(f"blob {size}\0".encode()) if known.git else hashlib.sha256()
    with known.file.open("rb") as data:
        while block := data.read(_BLOCK):
            digest.update(block)
            done(len(block))
    return digest.hexdigest()
