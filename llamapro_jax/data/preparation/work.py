"""The directory in which a data set is made: finished shards survive a kill, and one writes."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from llamapro_jax.data.preparation.shards import Counts, Recipe, Report, Seen, make_shards
from llamapro_jax.data.readers.documents import Bad, Piece
from llamapro_jax.data.records import shard_name
from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json, write_json

_SUFFIX = ".preparing"


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one piece: counts of each split, and what was seen of the source."""

    counts: dict[str, Counts]
    seen: Seen

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        seen = Seen(**value["seen"])
        seen.bad_records = [Bad(**bad) for bad in value["seen"]["bad_records"]]
        return cls({split: Counts(**c) for split, c in value["counts"].items()}, seen)


@dataclasses.dataclass(frozen=True)
class Work:
    """`.NAME-HASH.preparing` beside the data set NAME.

    data/ becomes the data set; pieces/N.json stands when the shards of piece N are whole and on
    disk; unfinished-HOST/ has what is being written on a host.
    """

    directory: Path

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def recipe(self) -> Path:
        """Where the processes of this host find what to do."""
        return self._unfinished / "recipe"

    @property
    def _unfinished(self) -> Path:
        return self.directory / f"unfinished-{socket.gethostname()}"

    def _marker(self, index: int) -> Path:
        return self.directory / "pieces" / f"{index}.json"

    def begin(self) -> None:
        """Removes what a killed process did not finish. Only for who has the lock."""
        shutil.rmtree(self._unfinished, ignore_errors=True)
        for directory in (self.data, self._unfinished, self._marker(0).parent):
            directory.mkdir(exist_ok=True)

    def results(self, count: int) -> dict[int, Result]:
        """Of the pieces below `count` that are finished."""
        markers = ((index, self._marker(index)) for index in range(count))
        return {i: Result.from_json(read_json(file)) for i, file in markers if file.is_file()}

    def finish_piece(self, index: int, piece: Piece, recipe: Recipe, report: Report) -> Result:
        """Makes the shards of one piece; after this they are there whatever happens."""
        files: dict[str, Path] = {}

        def file_of(split: str) -> Path:
            files[split] = self._unfinished / _shard_of_piece(split, index)
            return files[split]

        result = Result(*make_shards(piece, recipe, file_of, report))
        for file in files.values():
            if file.exists():
                _sync(file)
                os.replace(file, self.data / file.name)
        _sync(self.data)
        marker = self._unfinished / self._marker(index).name
        write_json(marker, result.to_json())
        _sync(marker)
        os.replace(marker, self._marker(index))
        return result

    def name_shards(self, split: str, indices: list[int]) -> None:
        """Gives the shards of these pieces their places in the split, without gaps.

        Upwards, no name is taken by a shard that has still to move. A second time, after a kill
        in between, it goes on.
        """
        for place, index in enumerate(indices):
            before = self.data / _shard_of_piece(split, index)
            if before.exists():
                os.replace(before, self.data / shard_name(split, place))

    def publish(self, target: Path) -> None:
        """The data set appears, whole; the rest goes."""
        for file in self.data.rglob("*"):
            _sync(file)
        if target.is_dir():
            target.rmdir()
        os.replace(self.data, target)
        _sync(target.parent)
        self.remove()

    def has_shards(self) -> bool:
        return self.data.is_dir() and any(self.data.iterdir())

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def drop_if_empty(self) -> None:
        """After a failure: what is worth nothing to a second try does not stay."""
        if not self.has_shards():
            self.remove()


@contextmanager
def working(target: Path, digest: str, wait: bool) -> Iterator[Work]:
    """The work directory of a data set, for one process of this host at a time.

    Raises UserError when another has it, unless `wait`: then it waits for the other to end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Work(target.parent / f".{target.name}-{digest[:12]}{_SUFFIX}")
    _see_to_others(target, work.directory)
    lock = _take(work.directory, target, wait)
    try:
        work.begin()
        yield work
    except BaseException:
        work.drop_if_empty()
        raise
    finally:
        lock.close()


def _shard_of_piece(split: str, index: int) -> str:
    return f"piece-{index}.{split}"


def _take(directory: Path, target: Path, wait: bool) -> BinaryIO:
    told = False
    while True:
        directory.mkdir(exist_ok=True)
        try:
            file = (directory / "lock").open("ab")
        except FileNotFoundError:  # its owner ended, and has just removed it
            continue
        try:
            _flock(file, wait=wait and told)
            if _is(file, directory / "lock"):
                return file
        except BlockingIOError:
            if not wait:
                file.close()
                raise UserError(
                    f"{target}: another process prepares it; wait until it ends or stop it, or "
                    "name another output."
                ) from None
            told = True
            print(f"{target}: another process prepares it; waiting", file=sys.stderr, flush=True)
        file.close()


def _flock(file: BinaryIO, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass  # A file system without locks: it goes on unguarded, and shards appear whole.


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _see_to_others(target: Path, own: Path) -> None:
    """What stands beside `target` from preparing it of other files or with other options.

    Finished shards may be hours of work, so that they are only reported; the rest is removed.
    Raises UserError when a process is at it.
    """
    name = re.compile(re.escape(f".{target.name}-") + "[0-9a-f]{12}" + re.escape(_SUFFIX))
    for entry in sorted(target.parent.iterdir()):
        if entry == own or not name.fullmatch(entry.name):
            continue
        with _take(entry, target, wait=False):
            if Work(entry).has_shards():
                print(
                    f"{target}: unfinished shards of other files or options lie in {entry}; give "
                    f"these again to go on with them, or remove them: rm -r {entry}",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                Work(entry).remove()


def _sync(path: Path) -> None:
    """What was written is on the disk, not in memory alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
