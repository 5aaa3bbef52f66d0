"""Files that are whole or absent, also when their writer is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_directory

WRITER = """
import signal, sys
from llamapro_jax.files import atomic_directory
with atomic_directory(sys.argv[1]) as directory:
    (directory / "part").write_text("half")
    print(directory, flush=True)
    signal.pause()
"""


def begin(out: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that writes `out` and never ends, and its temporary directory, an hour old."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    temporary = Path(process.stdout.readline().strip())
    an_hour_ago = temporary.stat().st_mtime - 3600
    os.utime(temporary, (an_hour_ago, an_hour_ago))
    return process, temporary


def test_a_killed_writers_leftover_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    living, kept = begin(out)
    killed, left = begin(out)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    try:
        assert (left / "part").exists()
        with atomic_directory(out) as directory:
            (directory / "whole").write_text("")
        assert (kept / "part").exists()
        assert {entry.name for entry in tmp_path.iterdir()} == {"out", kept.name}
    finally:
        living.kill()
        living.communicate()
        killed.communicate()


def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/a/out: .*file is a file, not a directory"),
        atomic_directory(tmp_path / "file" / "a" / "out"),
    ):
        pass
