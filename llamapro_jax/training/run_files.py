"""The files of a run beside its checkpoints, where they can be read and appended to.

Of a local run they are in its directory, and this module does nothing. An object store has no
appending: there each process has a directory of its own on its host for as long as it runs. It
begins with what the store has, and what changes in it is copied to the store by a thread, and
before each checkpoint, so that a run that goes on elsewhere finds all lines up to its step.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from llamapro_jax.errors import UserError
from llamapro_jax.local_copies import THREADS, upload
from llamapro_jax.remote import RemotePath, as_path, check_writable
from llamapro_jax.training.lease import LEASE_FILE, REQUEST_FILE, TakenOver
from llamapro_jax.training.run_directory import CHECKPOINTS, DATA, NOT_OF_THE_MODEL, RUN_FILE

# Seconds between two looks at what is to be copied to the store.
EVERY = 15.0
# There while a new run is copied to the store, and longer only when that was cut short.
_CREATING = ".creating"
# They are read and written in the store itself.
LEASE_FILES = (LEASE_FILE, REQUEST_FILE)


class RunFiles:
    """A context manager. run: the run's directory as it was named. files: where its files are,
    all but `checkpoints/` and `data/`, which are in `run`.

    permitted: raises UserError when the directory is another run's, and is asked before anything
    is copied there.
    """

    def __init__(
        self, run: str | Path | RemotePath, permitted: Callable[[], None] = lambda: None
    ) -> None:
        self.run = as_path(run)
        self._permitted = permitted
        self._remote = self.run if isinstance(self.run, RemotePath) else None
        self._known: dict[str, tuple[int, int]] = {}
        self._copying = threading.Lock()
        self._over = threading.Event()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if self._remote is None:
            self.files = Path(self.run)
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="llamapro-run-")
            self.files = Path(self._temporary.name) / self._remote.name

    def look(self) -> None:
        """Brings the files of the run, if there is one. Raises Unreachable where none can be
        written, and UserError where there is something else."""
        if self._remote is None:
            return
        check_writable(self._remote)
        if (self._remote / RUN_FILE).is_file():
            self.bring()
            return
        if (self._remote / _CREATING).is_file():
            return  # what there is of it is written anew
        # Prepared texts may be left of a start that was cut short, and leases of two at a time.
        names = [entry.name for entry in self._remote.iterdir()]
        others = [name for name in names if name not in (DATA, *LEASE_FILES) and name[0] != "."]
        if others and not (self._remote / RUN_FILE).is_file():
            raise UserError(
                f"{self._remote}: is not empty ({', '.join(others[:3])}) and holds no run; name a "
                "new place, or remove what is there."
            )

    def bring(self) -> None:
        """Copies what the store has to `files`."""
        if self._remote is None:
            return
        found = self._remote.files(without=(CHECKPOINTS, *NOT_OF_THE_MODEL))
        names = [name for name in found if name not in LEASE_FILES and not name.startswith(".")]

        def one(name: str) -> None:
            file = self.files / name
            file.parent.mkdir(parents=True, exist_ok=True)
            (self.run / name).get(file)

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(one, names))
        self._known = self._states()

    def create(self) -> None:
        """Copies the files of a new run to the store; it is a run there when all are."""
        if self._remote is not None:
            (self._remote / _CREATING).write_text("")
            states = self._states()
            upload(self.files, self._remote, states, last=RUN_FILE)
            (self._remote / _CREATING).unlink()
            self._known = states

    def copy(self) -> None:
        """Copies what changed to the store. Raises Unreachable, and as `permitted`."""
        if self._remote is None or not self.files.is_dir():
            return
        with self._copying:
            self._permitted()
            states = self._states()
            changed = [name for name, state in states.items() if self._known.get(name) != state]
            while changed:
                # One that is replaced meanwhile is copied the next time. Trackers delete theirs.
                changed = [name for name in changed if (self.files / name).is_file()]
                try:
                    upload(self.files, self._remote, changed)
                    break
                except FileNotFoundError:
                    if all((self.files / name).is_file() for name in changed):
                        raise
            self._known |= {name: states[name] for name in changed}

    def remove(self, name: str) -> None:
        """Of a file: here and in the store."""
        (self.files / name).unlink(missing_ok=True)
        if self._remote is not None:
            (self._remote / name).unlink(missing_ok=True)

    def keep_copying(self) -> None:
        """From now on, in a thread, until the context is left."""
        if self._remote is not None:
            threading.Thread(target=self._copy_again, name="copy", daemon=True).start()

    def _copy_again(self) -> None:
        while not self._over.wait(EVERY):
            # Before the next checkpoint it is tried again, and told if that fails.
            with suppress(UserError, OSError):
                self.copy()

    def _states(self) -> dict[str, tuple[int, int]]:
        found = {}
        for file in self.files.rglob("*"):
            name = file.relative_to(self.files).as_posix()
            if file.name.startswith("."):
                continue
            with suppress(FileNotFoundError):
                status = file.stat()
                if file.is_file():
                    found[name] = (status.st_size, status.st_mtime_ns)
        return found

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        try:
            if kind is None or not issubclass(kind, TakenOver):
                self.copy()
        except (UserError, OSError) as error:
            if kind is None:
                raise
            print(f"warning: the last lines of the log are lost: {error}", file=sys.stderr)
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()
