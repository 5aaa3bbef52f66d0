"""Files to streams of bytes: plain, `.gz` and `.zst`."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llamapro_jax.data.readers.packages import data_package
from llamapro_jax.errors import UserError

_BUFFER = 2**20


@contextmanager
def open_bytes(file: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The content of a file, decompressed as it is read, and how far the file itself was read.

    Memory stays bounded whatever the file expands to, as long as what is asked for is. Several
    streams one after the other, as `cat a.gz b.gz` gives, are one content.
    Raises UserError, also from within the block, when the file cannot be read, is damaged or ends
    too early.
    """
    try:
        with file.open("rb", buffering=0) as raw:
            yield io.BufferedReader(_decompressed(file, raw), _BUFFER), raw.tell
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{file}: cannot be read ({error.strerror}).") from None
        raise UserError(
            f"{file}: cannot be decompressed to its end ({error}); it is damaged or incomplete: "
            "fetch it again or compress it again."
        ) from None


def _decompressed(file: Path, raw: io.FileIO) -> io.RawIOBase:
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=io.BufferedReader(raw, _BUFFER))
    if file.suffix == ".zst":
        # Of the readers that there are for Python below 3.14, Arrow's bounds its output and also
        # notices a missing end.
        return data_package("pyarrow", str(file)).CompressedInputStream(raw, "zstd")
    return raw
