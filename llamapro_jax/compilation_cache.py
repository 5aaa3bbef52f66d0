"""Compiled programs that are kept for later runs, by jax's persistent compilation cache.

A directory holds programs for one kind of host processor. XLA's CPU compiler writes for the very
processor it runs on, jax's key of a program does not say which, and hosts that differ often share a
home directory: a program for another one can end in an illegal instruction.
A program that cannot be read, or was cut short, is compiled anew with a warning.

Of several processes jax lets the first write. Where the others do not see what it wrote they would
compile a program that the first one has, and on GPUs wait for it forever, since processes share the
work of choosing kernels; so such a directory is not used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.launch.processes import count, everywhere, from_first, is_first

AUTO = "auto"
_PLACE = Path("llamapro_jax", "xla")
_REMOTE = "gs://"

# What of /proc/cpuinfo a compiler writes for (x86, then Arm).
_PROCESSOR = ("vendor_id", "cpu family", "model", "flags") + (
    "CPU implementer",
    "CPU architecture",
    "CPU part",
    "Features",
)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A name for the kind of this host's processor: the same kind, the same name."""
    known = [platform.system(), platform.machine()]
    try:
        # The first of its cores.
        lines = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in _PROCESSOR or not value:
            known.append(f"{name.strip()}={' '.join(sorted(value.split()))}")
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


def default_directory(environ: Mapping[str, str] = os.environ) -> str | None:
    """What `auto` stands for where jax has no directory; None where there is no home either."""
    if cache := environ.get("XDG_CACHE_HOME"):
        return str(Path(cache) / _PLACE)
    try:
        return str(Path.home() / ".cache" / _PLACE)
    except RuntimeError:
        return None


def directory(setting: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The directory for a setting, made when it is not there; None for no cache.

    Raises UserError for a directory that was asked for by name and cannot be used. Of `auto` it is
    a warning: a run is then slower to start, no more.
    """
    place = default_directory(environ) if setting == AUTO else setting
    if place is None:
        return None
    try:
        return _usable(place)
    except UserError as error:
        if setting != AUTO:
            raise
        if is_first():
            print(f"warning: {error} Programs are not kept.", file=sys.stderr)
        return None


def _usable(place: str) -> str:
    if "://" in place:
        if not _is_remote(place):
            raise UserError(
                f"compilation_cache: {place}: must be a directory or begin with {_REMOTE}."
            )
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(
                f"compilation_cache: {place}: needs the package gcsfs; `pip install gcsfs`, or "
                "name a local directory, or take null for none."
            )
        return _of_this_processor(place.rstrip("/"))
    path = Path(_of_this_processor(str(Path(place).expanduser().absolute())))
    try:
        # Whoever may write here may run code as who reads it.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(
            f"compilation_cache: {path}: {error.strerror}. Name a directory that can be written."
        ) from None
    if not writable:
        raise UserError(f"compilation_cache: {path}: cannot be written. Name another directory.")
    return str(path)


def _seen_by_all(place: str | None) -> str | None:
    """The directory, or None where the processes of a run do not share it."""
    if count() == 1:
        return place
    if not everywhere(place is not None):
        return None
    mark = from_first(lambda: _mark(place))
    seen = mark == place if _is_remote(place) else os.path.exists(mark)
    shared = everywhere(seen and mark.startswith(place))
    if is_first():
        if not _is_remote(place):
            os.unlink(mark)
        if not shared:
            print(
                f"warning: compilation_cache: {place} is not one directory for all processes, so "
                "programs are not kept. Name one that is, such as gs://BUCKET/PATH.",
                file=sys.stderr,
            )
    return place if shared else None


def _mark(place: str) -> str:
    """Something that whoever has the same directory sees."""
    if _is_remote(place):
        return place
    mark = Path(place, f".{uuid.uuid4().hex}")
    mark.touch()
    return str(mark)


def _is_remote(place: str) -> bool:
    return place.startswith(_REMOTE)


def _of_this_processor(place: str) -> str:
    # What jax has may be what this module gave it.
    return place if place.endswith(f"/{processor()}") else f"{place}/{processor()}"


def _settings(place: str | None) -> dict[str, Any]:
    """jax's settings: value by name."""
    remote = place is not None and _is_remote(place)
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": place,
        # Everything: else the many small programs of a start are compiled each time. Not so over
        # the network, where to fetch one takes longer than to compile it.
        "jax_persistent_cache_min_compile_time_secs": 1.0 if remote else 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    if remote:
        # XLA keeps what it learned of kernels on a GPU in a local directory only.
        settings["jax_persistent_cache_enable_xla_caches"] = ""
    return settings


@contextmanager
def enabled(setting: str | None) -> Iterator[str | None]:
    """While entered, compiled programs are kept in the directory of a setting, and taken from it.

    All processes of a run enter it, and get the same.
    `auto` is first of all what jax has, as by JAX_COMPILATION_CACHE_DIR. Yields the directory; None
    for no cache. Raises UserError as `directory` does.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    if setting == AUTO:
        setting = jax.config.jax_compilation_cache_dir or AUTO
    settings = _settings(_seen_by_all(directory(setting)))
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()  # or it would stay in the directory that it first used
        yield settings["jax_compilation_cache_dir"]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
