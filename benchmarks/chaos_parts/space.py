"""A disk of some megabytes, that a run can fill: in memory, in a namespace of its own.

Mounting in a namespace of users takes no rights. Where the system does not allow that, there is no
such disk, and the faults that need one are counted as impossible.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FILLER = "filler"


class NoNamespace(Exception):
    """The system does not let this user make one."""


class Space:
    """A context manager. mount: an empty directory, where the processes of a run see it.

    root: where this process sees it. prefix: what runs a command in there.
    """

    def __init__(self, mount: Path, megabytes: int) -> None:
        mount.mkdir(parents=True, exist_ok=True)
        script = f'mount -t tmpfs -o size={megabytes}m tmpfs "$1" && echo ready && exec cat'
        try:
            self._holder = subprocess.Popen(
                ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(mount)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError as error:
            raise NoNamespace(str(error)) from None
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != b"ready\n":
            self._holder.wait()
            raise NoNamespace(self._holder.stderr.read().decode(errors="replace").strip())
        pid = str(self._holder.pid)
        self.mount, self.root = mount, Path(f"/proc/{pid}/root{mount}")
        enter = ["nsenter", "--target", pid, "--user", "--mount", "--preserve-credentials"]
        self.prefix = [*enter, "--wd=" + str(Path.cwd())]

    @property
    def free(self) -> int:
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int) -> None:
        """So that `leave` bytes are free, as many as there were at most."""
        with (self.root / FILLER).open("wb") as file:
            file.write(bytes(max(0, self.free - leave)))

    def make_room(self) -> None:
        (self.root / FILLER).unlink(missing_ok=True)

    def __enter__(self) -> Space:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()
