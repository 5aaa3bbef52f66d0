"""Local copies of remote directories, for what only reads local files: `fetched(place)`.

They lie in `llamapro_jax/remote` of XDG_CACHE_HOME (or `~/.cache`), under the names that they have
in the store, and are kept: the next call copies what is another file in the store by then, and
nothing twice. Each file is compared with the size and the MD5 that the store has of it. Processes
of one host wait for each other; every host has copies of its own.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json, write_json
from llamapro_jax.remote import RemotePath, Unreachable, as_path, has_arrays, is_remote

THREADS = 8
_ATTEMPTS = 3
_MANY_BYTES = 2**30
# What tells one content of an object from another, as the stores call it.
_TAGS = ("generation", "ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created")


def root() -> Path:
    """Where the copies are."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llamapro_jax" / "remote"


def fetched(
    place: str | Path,
    *,
    only: Collection[str] = ("*",),
    without: Collection[str] = (),
    fresh: bool = False,
) -> Path:
    """The local copy of a remote directory or file; of a local one, itself.

    only: patterns of the names at the top of the directory. without: names at the top of it that
    are left out. fresh: copy everything anew, and keep nothing that the store has not.
    Raises UserError when there is nothing, or no room for it, and Unreachable.
    """
    path = as_path(place)
    if isinstance(path, Path):
        return path
    target = root() / path.scheme / str(path).partition("://")[2]
    with _locked(path):
        files = _in_store(path, without)
        record = _recorded(path)
        missing = {
            name: info
            for name, info in files.items()
            if any(fnmatch(_top(name), pattern) for pattern in only)
            and (
                fresh
                or record.get(name) != _tag(info)
                or not _is_there(_within(target, name), info)
            )
        }
        _check_room(path, target, missing)
        # The record may have been lost, and a directory above or below this one has its own.
        here = set(record) | (_copied(target) if fresh else set())
        gone = {name for name in here - set(files) if _top(name) not in without}
        for name in gone:
            _within(target, name).unlink(missing_ok=True)
        kept = {name: record[name] for name in set(record) - gone - set(missing)}
        if kept != record:
            write_json(_record_file(path), kept)  # before a file of it changes
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda name: _fetch(path, name, _within(target, name)), missing))
        if missing:
            new = {name: _tag(info) for name, info in missing.items()}
            write_json(_record_file(path), {**kept, **new})
    return target


def path_here(place: str) -> str:
    """`place` as it is, or where the local copy of it is when it is a URL."""
    return str(fetched(place)) if is_remote(place) else place


def opened(place: str | Path, arrays: str, without: Collection[str] = ()) -> tuple[Path, Any]:
    """The directory of a model or a run to read its small files from, and where its arrays are.

    arrays: their directory in it. Of a store that TensorStore reads, they stay where they are.
    without: names in it that nobody reads.
    """
    path = as_path(place)
    if isinstance(path, Path):
        return path, path / arrays
    if has_arrays(path):
        return fetched(path, without=(arrays, *without)), path / arrays
    directory = fetched(path, without=without)
    return directory, directory / arrays


def upload(directory: Path, target: RemotePath, names: Iterable[str], last: str = "") -> None:
    """Copies files of a local directory; `last` when all others are there."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as threads:
        first = (name for name in names if name != last)
        list(threads.map(lambda name: (target / name).put(directory / name), first))
    if last in names:
        (target / last).put(directory / last)


@contextmanager
def brought(directory: Path | RemotePath, matching: str) -> Iterator[Path | RemotePath]:
    """For as long as the context lasts: `directory` itself where TensorStore reads it, else a local
    one of that name with the files that match; `bring` adds others."""
    if has_arrays(directory):
        yield directory
        return
    with scratch() as above:
        copy = above / directory.name
        names = (name for name in directory.files() if ".." not in name.split("/"))
        bring(directory, copy, [name for name in names if fnmatch(name, matching)])
        yield copy


def bring(directory: Path | RemotePath, copy: Path | RemotePath, names: Iterable[str]) -> None:
    """Files of a directory that are not in its copy yet. One that the store lost stays missing."""
    if copy == directory:
        return

    def one(name: str) -> None:
        with suppress(FileNotFoundError):
            _copy(directory / name, copy / name)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(one, [name for name in names if not (copy / name).is_file()]))


_SCRATCH, _LOCK = ".scratch-", "lock"
_scratches: set[Path] = set()


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for what goes to a store as soon as it is made, or comes from it for a moment.

    Those that processes left which were killed are removed.
    """
    root().mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with (root() / ".scratch").open("ab") as one_at_a_time:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            for left in set(root().glob(f"{_SCRATCH}*")) - _scratches:
                _remove_of_the_dead(left)
            directory = Path(tempfile.mkdtemp(dir=root(), prefix=_SCRATCH))
            _scratches.add(directory)
            held.callback(_scratches.discard, directory)
            held.callback(shutil.rmtree, directory, ignore_errors=True)
            lock = held.enter_context((directory / _LOCK).open("ab"))
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        files = directory / "files"
        files.mkdir()
        yield files


def _remove_of_the_dead(directory: Path) -> None:
    with suppress(OSError), (directory / _LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
        shutil.rmtree(directory, ignore_errors=True)


def _in_store(path: RemotePath, without: Collection[str]) -> dict[str, dict[str, Any]]:
    """Size and more of each file of the directory; of a single file under the name ''."""
    # What lies in a store may have any name, and is not to leave the directory of its copy.
    found = {
        name: info
        for name, info in path.files(without).items()
        if ".." not in name.split("/") and "\0" not in name
    }
    if not found:
        if path.is_file():
            return {"": path.info()}
        raise UserError(
            f"{path}: no such directory: the store has nothing under this name. Mend the name, or "
            "copy it there first."
        )
    return found


def _top(name: str) -> str:
    return name.partition("/")[0]


def _within(target: Path, name: str) -> Path:
    return target / name if name else target


def _tag(info: Mapping[str, Any]) -> str:
    found = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return f"{info['size']} {found}"


def _copied(target: Path) -> set[str]:
    """The names of all files that are here, but for those that are only coming."""
    files = (file for file in target.rglob("*") if not file.is_dir())
    return {
        file.relative_to(target).as_posix() for file in files if not file.name.startswith(".tmp-")
    }


def _is_there(file: Path, info: Mapping[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == info["size"]


def _check_room(path: RemotePath, target: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    needed = sum(info["size"] for info in files.values())
    above = next(parent for parent in (root(), *root().parents) if parent.is_dir())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise UserError(
            f"{path}: its local copy takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free "
            f"in {above}. Set XDG_CACHE_HOME to a larger disk, or mount the bucket (GCS FUSE) and "
            "name it there."
        )
    if needed >= _MANY_BYTES:
        print(f"{path}: copying {needed / 1e9:.3g} GB to {target}", file=sys.stderr, flush=True)


def _fetch(path: RemotePath, name: str, file: Path) -> None:
    source = path / name if name else path
    try:
        _copy(source, file)
    except FileNotFoundError:
        raise UserError(f"{source}: was removed while it was copied; run it again.") from None


def _copy(source: RemotePath, file: Path) -> None:
    """Raises FileNotFoundError, and Unreachable when what came is not what the store has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".tmp-{file.name}")
    try:
        for _ in range(_ATTEMPTS):
            info = source.info()
            source.get(part)
            if part.stat().st_size == info["size"] and _md5(info) in (None, _md5_of(part)):
                os.replace(part, file)
                return
    finally:
        part.unlink(missing_ok=True)
    raise Unreachable(
        f"{source}: its copy is not what the store says it is, {_ATTEMPTS} times; it may be "
        "written just now. Run it again."
    )


def _md5(info: Mapping[str, Any]) -> str | None:
    """In hex, where the store has it."""
    if md5 := info.get("md5Hash"):
        return base64.b64decode(md5).hex()
    etag = str(info.get("ETag", "")).strip('"')
    # That of an object that came in parts, or encrypted, is another.
    plain = re.fullmatch(r"[0-9a-f]{32}", etag) and not info.get("SSEKMSKeyId")
    return etag if plain else None


def _md5_of(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "md5").hexdigest()


# ------------------------------------------------------------------- what is here already


def _record_file(path: RemotePath) -> Path:
    return root() / ".records" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"


def _recorded(path: RemotePath) -> dict[str, str]:
    try:
        record = read_json(_record_file(path))
    except UserError:  # there is none, or it was cut short
        return {}
    return record if isinstance(record, dict) else {}


@contextmanager
def _locked(path: RemotePath) -> Iterator[None]:
    """Of the processes of this host one at a time."""
    file = _record_file(path).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
