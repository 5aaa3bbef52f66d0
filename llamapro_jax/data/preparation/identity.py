"""What decides the rows of a prepared data set: the tokenizer, the options, every input file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llamapro_jax.data.readers.documents import Content
from llamapro_jax.errors import UserError
from llamapro_jax.manifest import sha256_of

# Raise it when the same text would give other rows than before.
_FORMAT = 1
# Options with these values are not in the hash, so that a new option changes no old one.
_DEFAULTS: dict[str, Any] = {
    "kind": "text",
    "field": "text",
    "split": "train",
    "template": None,
    "held_out": 0.0,
    "pieces": 1,
}
_MANY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Identity:
    """options: by their names in `fingerprint.json`; files: SHA-256 by the path in the source."""

    tokenizer: str
    sequence_length: int
    options: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The hash that names the data set."""
        decides = {
            "format": _FORMAT,
            "tokenizer": self.tokenizer,
            "sequence_length": self.sequence_length,
            "files": dict(self.files),
            **{name: value for name, value in self.options.items() if value != _DEFAULTS[name]},
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What `fingerprint.json` says of it."""
        return {
            "fingerprint": self.digest,
            "format": _FORMAT,
            "tokenizer": self.tokenizer,
            "sequence_length": self.sequence_length,
            **self.options,
            "files": dict(self.files),
        }


def identify(
    content: Content,
    tokenizer: str,
    sequence_length: int,
    template: str | None,
    held_out: float,
    files: Sequence[Path],
    pieces: int,
) -> Identity:
    """Reads all files, with several threads. tokenizer, template: their fingerprints."""
    fieldless, splitless = ("code", "chat"), ("text", "code")
    options = {
        "kind": content.kind,
        "field": _DEFAULTS["field"] if content.kind in fieldless else content.field,
        "split": _DEFAULTS["split"] if content.kind in splitless else content.split,
        "template": template,
        "held_out": held_out,
        "pieces": pieces,
    }
    names = _names(Path(content.path), files)
    total = sum(file.stat().st_size for file in files)
    if total >= _MANY_BYTES:
        print(
            f"{content.path}: checksums of {len(files):,} files, {total / 2**30:,.1f} GiB",
            file=sys.stderr,
            flush=True,
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = dict(zip(names, threads.map(sha256_of, files), strict=True))
    return Identity(tokenizer, sequence_length, options, digests)


def differences(record: Mapping[str, Any], identity: Identity) -> str:
    """In words, how the data set with this `fingerprint.json` differs from what is asked for."""
    wanted = identity.record()
    found = []
    if record.get("tokenizer") != wanted["tokenizer"]:
        found.append(
            f"tokenizer is {str(record.get('tokenizer'))[:12]}, not {wanted['tokenizer'][:12]}"
        )
    for name in ("format", "sequence_length", *_DEFAULTS):
        before, now = record.get(name, _DEFAULTS.get(name)), wanted[name]
        if before != now and name not in ("pieces", "template"):
            found.append(f"{name} is {before!r}, not {now!r}")
    if record.get("template") != wanted["template"]:
        found.append("the chat template is another")
    found += _other_files(record.get("files", {}), identity.files)
    return "; ".join(found) or "its text is cut into other pieces"


def _other_files(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    changed = [name for name in now if name in before and before[name] != now[name]]
    new = [name for name in now if name not in before]
    gone = [name for name in before if name not in now]
    for names, what in ((changed, "changed"), (new, "not in it"), (gone, "no longer there")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'} {what}"


def states(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Size and time of change of each file, to see whether it changes while it is read."""
    return [(found.st_size, found.st_mtime_ns) for found in map(os.stat, files)]


def check_states(files: Sequence[Path], before: Sequence[tuple[int, int]]) -> None:
    """Raises UserError when a file is not as it was when `states` gave `before`."""
    for file, old in zip(files, before, strict=True):
        if not file.exists() or states([file]) != [old]:
            raise UserError(
                f"{file}: was changed or removed while it was prepared; prepare it again when it "
                "stays as it is."
            )


def _names(path: Path, files: Sequence[Path]) -> list[str]:
    """Of a directory the paths within it; of a single file its name."""
    if path.is_dir():
        return [file.relative_to(path).as_posix() for file in files]
    if len(files) == 1:
        return [files[0].name]
    above = os.path.commonpath(files)
    return [file.relative_to(above).as_posix() for file in files]
