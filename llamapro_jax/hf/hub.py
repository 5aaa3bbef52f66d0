"""Where a model is: a directory, or a hub id whose files `huggingface_hub` brings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from llamapro_jax.errors import UserError
from llamapro_jax.local_copies import fetched

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Not *.safetensors: Mistral's repositories hold the same weights again, consolidated.
PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
BIN_PATTERNS = ["pytorch_model*.bin"]
# Named by what is in it: SHA-1 as Git takes it, or SHA-256 of a file that Git LFS keeps.
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
TOKENIZER_PATTERNS = ["*token*.json", "config.json", "tokenizer.model", "*.jinja"]


def resolve(path: str, allow_bin: bool = False, patterns: Sequence[str] = PATTERNS) -> Path:
    """A local directory for `path`: itself, the local copy of a remote one, or the snapshot of
    the hub id `org/name@revision`.

    patterns: of the files that are wanted; `TOKENIZER_PATTERNS` leave out the weights.
    Raises UserError when neither exists, naming the login command for a gated repository.
    """
    wanted = [*patterns, *(BIN_PATTERNS if allow_bin else ())]
    local = fetched(path, only=wanted)
    if local.is_dir():
        check_links(local)
        return local
    if local.exists():
        raise UserError(f"{path}: is a file; name the directory of a model.")
    if path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such directory (and no hub id like org/name@revision).")
    return _download(path, wanted)


def check_links(directory: Path) -> None:
    """Raises UserError when a file that a model is made of is a link out of `directory`.

    Who unpacks an archive or mounts a bucket of somebody else's would otherwise hand on, with the
    next export, whatever file of the own machine the link names.
    """
    wanted = (*PATTERNS, *BIN_PATTERNS)
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if any(fnmatch(entry.name, pattern) for pattern in wanted):
            check_link(directory, entry)


def check_link(directory: Path, file: Path) -> None:
    """Raises UserError when `file` is a link that leads out of `directory`.

    A link to a blob of a hub cache is allowed: that is what all files of a snapshot are.
    """
    if not file.is_symlink():
        return
    target = file.resolve()
    if target.is_relative_to(directory.resolve()) or is_blob(target):
        return
    raise UserError(
        f"{file}: is a link to {target}, outside of {directory}; put the file itself there, or "
        "name the directory it lies in."
    )


def is_blob(path: Path) -> bool:
    """Whether `path` is laid out as the hub's cache lays out the content of its files."""
    above = path.parent
    return bool(
        BLOB.fullmatch(path.name)
        and above.name == "blobs"
        and above.parent.name.startswith(("models--", "datasets--", "spaces--"))
    )


def _download(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(
            f"{hub_id}: is gated. Accept its licence on its page, then run `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{hub_id}: the repository has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{hub_id}: no such directory, and no such repository on the hub; "
            "for a private one run `hf auth login`."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{hub_id}: no such directory here, the hub cannot be reached, and the files are not "
            f"in its cache ({type(error).__name__}). Download them where there is a network with "
            f"`hf download {name}` (for a gated or private one, after `hf auth login`)."
        ) from None
