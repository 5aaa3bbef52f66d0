"""Directories that are named by a URL: `gs://bucket/path`, and whatever else fsspec knows.

The one module that knows of fsspec. `as_path` gives a `pathlib.Path` or, for a URL, a `RemotePath`
with as much of its interface as is needed. An object store has neither directories nor renames: a
name is there, whole, as soon as it is written, and what consists of several objects is there when
the one that is written last is. Nothing is believed that was listed before.

Every request that fails for a reason that may pass (5xx, 429, a connection that broke) is sent
again, after 1, 2, 4, ... seconds. What stays wrong is a `Unreachable`, which is never taken for a
file that is missing or damaged.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from llamapro_jax.errors import UserError

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://+(.*)")
# Where Orbax and TensorStore write and read arrays by themselves. Orbax takes any other URL for a
# local path: also s3://, of which TensorStore alone has a driver.
_ARRAY_DRIVERS = {"gs": "gcs"}
_SAME = {"gcs": "gs", "s3a": "s3"}
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
_EXTRAS = {"gcsfs": "'llamapro_jax[gcs]'", "s3fs": "'llamapro_jax[s3]'"}
# Known to fsspec, but a file can be seen half written there, or nobody else sees it, or none can be
# written.
_NO_OBJECT_STORES = frozenset(
    "memory local hdfs webhdfs arrow_hdfs dbfs ftp sftp ssh smb http https github zip tar".split()
)

ATTEMPTS = 5
FIRST_DELAY = 1.0
_PASSING = {408, 429, *range(500, 600)}
_CREDENTIALS = {
    "gs": "Sign in with `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS to a service account's key, or give the machine's service "
    "account the role Storage Object Admin (to read: Storage Object Viewer) on the bucket.",
    "s3": "Run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of somebody "
    "who may list, read, write and delete objects of the bucket.",
}
_REFUSED = re.compile(
    r"\b40[13]\b|forbidden|unauthori[sz]ed|access.?denied|permission.?denied|credential|anonymous",
    re.IGNORECASE,
)


class Unreachable(UserError, OSError):
    """A directory cannot be used: no package, no permission, no answer, no room or handles here.

    It says nothing about what lies there.
    """


def is_remote(place: Any) -> bool:
    """Whether `place` is a URL."""
    text = str(place)
    return _URL.match(text) is not None and not text.startswith("file://")


def as_path(place: str | Path | RemotePath) -> Path | RemotePath:
    """The path of a place that a user named. Raises Unreachable where its package is missing."""
    if isinstance(place, RemotePath):
        return place
    if is_remote(place):
        return RemotePath(str(place))
    return Path(str(place).removeprefix("file://")).expanduser()


class RemotePath:
    """A name under a URL. Its methods do what those of `pathlib.Path` do."""

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        assert match is not None, url
        self.scheme = _SAME.get(match[1], match[1])
        self._rest = str(PurePosixPath(match[2])).strip("/")
        self._files = _filesystem(self.scheme, str(self))
        # As the store itself names it, which may be without the host.
        self._name = self._files._strip_protocol(str(self)).rstrip("/")

    def __str__(self) -> str:
        return f"{self.scheme}://{self._rest}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self._rest).name

    @property
    def parent(self) -> RemotePath:
        return RemotePath(f"{self.scheme}://{PurePosixPath(self._rest).parent}")

    @property
    def bucket(self) -> str:
        return self._rest.partition("/")[0]

    @property
    def within_bucket(self) -> str:
        return self._rest.partition("/")[2]

    def absolute(self) -> RemotePath:
        return self

    # ----------------------------------------------------------- looking

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        # Not fsspec's own `exists` and `isfile`: to them whatever fails is a file that is missing.
        try:
            return self.info()["type"]
        except FileNotFoundError:
            return None

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> SimpleNamespace:
        """With `st_size` alone."""
        return SimpleNamespace(st_size=self.info()["size"])

    def iterdir(self) -> Iterator[RemotePath]:
        with suppress(FileNotFoundError):  # an empty directory is none at all
            names = map(self._within, self._ask("ls", detail=False))
            yield from (self / name for name in names if name)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        for name in self._retried(lambda: self._files.glob(f"{self}/{pattern}")):
            yield self / self._within(name)

    def files(self, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
        """All files below, by their names within, as fsspec describes them, at this moment.

        without: names of directories in this one that are passed over.
        """
        if without:
            found = {}
            for path in self.iterdir():
                if path.name not in without:
                    info = path.info()
                    if info["type"] == "file":
                        found[path.name] = info
                    else:
                        below = path.files().items()
                        found |= {f"{path.name}/{name}": info for name, info in below}
            return dict(sorted(found.items()))
        try:
            found = self._ask("find", detail=True)
        except FileNotFoundError:
            return {}
        # Names that end with a slash are what some programs put in the place of directories.
        names = (
            (self._within(name), info) for name, info in sorted(found.items()) if name[-1] != "/"
        )
        return {name: info for name, info in names if name}

    def info(self) -> dict[str, Any]:
        return self._ask("info")

    # ----------------------------------------------------------- reading and writing

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> None:
        """Readers see the old content or the new."""
        self._ask("pipe_file", data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def get(self, file: Path) -> None:
        """Copies it to a local file."""
        self._ask("get_file", str(file))

    def put(self, file: Path) -> None:
        """Copies a local file to it."""
        self._retried(lambda: self._files.put_file(str(file), str(self)))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Directories are there when something is in them."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        for _ in range(ATTEMPTS):  # what was deleted meanwhile by another is no failure
            with suppress(FileNotFoundError):
                self._ask("rm", recursive=True)
            if not self.files():
                return
        raise Unreachable(f"{self}: cannot be removed; see whether something writes there.")

    def copy(self, other: RemotePath) -> None:
        """Of a file, to another place of the same store, without bringing it here."""
        self._retried(lambda: self._files.cp_file(str(self), str(other)))

    # ----------------------------------------------------------- how

    def _within(self, name: str) -> str:
        """Of a name as the store gives it; empty for this one itself."""
        return self._files._strip_protocol(name).removeprefix(self._name).strip("/")

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        function = getattr(self._files, method)
        return self._retried(lambda: function(str(self), *arguments, **named))

    def _retried(self, action: Callable[[], Any]) -> Any:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
            try:
                return action()
            except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
                raise
            except Exception as error:  # each store has its own
                why = error
                if _status(error) not in _PASSING and (_refused(error) or not _passes(error)):
                    break
        raise unreachable(self, why, attempt + 1) from why


def _status(error: BaseException) -> int | None:
    """Of HTTP, where an exception carries one."""
    for name in ("code", "status"):
        value = getattr(error, name, None)
        if str(value).isdecimal():
            return int(value)
    return None


def _refused(error: BaseException) -> bool:
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return True
    return _REFUSED.search(f"{type(error).__name__}: {error}") is not None


def _passes(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    asked_through = ("aiohttp", "requests", "urllib3", "botocore")
    return isinstance(error, OSError | TimeoutError) or module in asked_through


def unreachable(place: RemotePath, error: BaseException, attempts: int = 1) -> Unreachable:
    """What a user is told of an error of a store."""
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if _refused(error):
        mend = _CREDENTIALS.get(place.scheme, "Sign in to it.")
        return Unreachable(f"{place}: the store refuses this ({reason[:200]}). {mend}")
    asked = f", asked {attempts} times" if attempts > 1 else ""
    return Unreachable(
        f"{place}: the store does not do this ({type(error).__name__}: {reason[:200]}){asked}. See "
        "whether the name is right, and the network and the store are up, and run it again."
    )


_filesystems: dict[tuple[Any, ...], Any] = {}


def _filesystem(scheme: str, url: str) -> Any:
    """The store of a URL. One in this process: fsspec's own are one for each thread, and
    connections do not outlive a fork."""
    # A bucket is part of a name; a host is not.
    host = "" if scheme in _PACKAGES else url.partition("://")[2].partition("/")[0]
    key = scheme, host, os.getpid()
    if key not in _filesystems:
        _filesystems[key] = _new_filesystem(scheme, url)
    return _filesystems[key]


def _new_filesystem(scheme: str, url: str) -> Any:
    import fsspec
    from fsspec.config import conf

    # Other processes write too. Orbax gets its file systems with the same settings.
    for protocol in ("gs", "gcs") if scheme == "gs" else (scheme,):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # It prints a traceback of what is raised anyway.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        missing = _PACKAGES.get(scheme) or error.name or str(error)
        install = f"pip install {_EXTRAS.get(missing, missing)}"
        raise Unreachable(f"{scheme}://: needs the package {missing}; `{install}`.") from None
    except ValueError as error:
        raise Unreachable(f"{scheme}://: is no scheme that fsspec knows ({error}).") from None
    except Exception as error:
        raise Unreachable(f"{scheme}://: cannot be opened ({error}).") from None


# ------------------------------------------------------------------- arrays


def has_arrays(place: str | Path | RemotePath) -> bool:
    """Whether TensorStore, and so Orbax, reads and writes there: local and gs://."""
    path = as_path(place)
    return isinstance(path, Path) or path.scheme in _ARRAY_DRIVERS


def kvstore(directory: Path | RemotePath) -> dict[str, Any]:
    """TensorStore's description of where the files of an array are."""
    if isinstance(directory, Path):
        return {"driver": "file", "path": f"{directory.resolve()}/"}
    return {
        "driver": _ARRAY_DRIVERS[directory.scheme],
        "bucket": directory.bucket,
        "path": f"{directory.within_bucket}/",
    }


# Of TensorStore, whose messages begin with the status: these say nothing about the data.
_NO_FAULT_OF_THE_DATA = re.compile(
    r"(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|PERMISSION_DENIED|"
    r"UNAUTHENTICATED)\b"
)


# Of the system: a lost file, a directory in its place or the other way round, a disk that cannot
# read a block. All else (no handle left, no permission, a mount that is gone) says nothing either.
_OF_THE_DATA = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


def raise_if_unreachable(directory: Path | RemotePath, error: BaseException) -> None:
    """Raises Unreachable when reading failed on the way or on this host, not on what was read."""
    if isinstance(error, Unreachable):
        raise error
    if isinstance(error, OSError):
        ours = error.errno is not None and error.errno not in _OF_THE_DATA
    else:
        text = str(error)
        ours = isinstance(error, MemoryError) or _NO_FAULT_OF_THE_DATA.match(text) is not None
    if not ours:
        return
    if isinstance(directory, RemotePath) and not isinstance(error, MemoryError):
        raise unreachable(directory, error) from None
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    raise Unreachable(
        f"{directory}: this host cannot read it ({reason[:200]}), which says nothing about what is "
        "there. See to its memory, its limit of open files (`ulimit -n`), the permissions and the "
        "mount, and run it again."
    ) from None


# ------------------------------------------------------------------- directories


def remove(directory: Path | RemotePath) -> None:
    """With all that is in it."""
    if isinstance(directory, RemotePath):
        directory.rmtree()
    else:
        shutil.rmtree(directory)


def sizes(directory: Path | RemotePath) -> dict[str, int]:
    """Of all files below, by their names within."""
    if isinstance(directory, RemotePath):
        return {name: info["size"] for name, info in directory.files().items()}
    files = (file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}


def check_writable(directory: RemotePath) -> None:
    """Raises Unreachable unless a run can be written there: to an object store, by somebody who may
    write, list and delete."""
    if directory.scheme in _NO_OBJECT_STORES:
        raise Unreachable(
            f"{directory}: a run is written to a local or mounted directory or to an object store "
            "(gs://, s3://, abfs://, ...), where a file is whole as soon as it is there, not to "
            f"{directory.scheme}://. Name one of these, or mount it."
        )
    # In a directory that was not made: a store that needs one is none of objects.
    probe = directory / f".probe-{os.getpid()}-{time.time_ns()}" / "file"
    try:
        probe.write_text("")
        listed = [path.name for path in probe.parent.iterdir()]
        probe.unlink()
    except FileNotFoundError:
        raise Unreachable(
            f"{directory}: there is no bucket {directory.bucket}; create it, in the region of the "
            "machines, or mend the name."
        ) from None
    if listed != [probe.name]:
        raise Unreachable(
            f"{directory}: the store does not list what was just written, without which no run "
            "knows its checkpoints. Name another place, or mount it."
        )
