"""Text files to documents, for those that take no other kind; see `llamapro_jax.data.documents`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llamapro_jax.data.documents import Content, input_files, texts


def text_files(path: str | Path) -> list[Path]:
    """The text files at `path`: itself, or those below it sorted by their path within it.

    Raises UserError when `path` is absent, is a file of another kind, or holds no text file.
    """
    return input_files(Content(str(path)))


def read_documents(file: Path) -> Iterator[str]:
    """The documents of one text file, as they are, without the empty ones.

    Raises UserError with the place when one cannot be read.
    """
    return texts(Content(str(file)))
