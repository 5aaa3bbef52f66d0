"""One writer: a run directory belongs to the run whose lease, `lease.json`, lies in it.

Two hosts that share a file system or a bucket know of each other by what they write there, where
the kernel's locks (`training.lock`) do not reach. The first process of a run renews its lease every
RENEW seconds. Who finds one that nobody has renewed for EXPIRY seconds, or whose owner is provably
dead, takes it. A live one is taken over only when asked to: by a request, `takeover.json`, which
the owner answers by stopping and removing its lease. An owner that does not answer within EXPIRY
seconds loses it all the same, and finds that out before it writes again.

Stores without locks cannot make "is it still mine?" and the write that follows one act. What
remains is the time between the question and the commit of a checkpoint, milliseconds, and it can
hurt only an owner that stood still for EXPIRY seconds and went on within just these. Two starts at
the same moment may both write a lease; the later one stands, and the other one sees that when it
asks again, which is before it touches a checkpoint.

Only whole files are written and read, so that a directory in a bucket will do.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llamapro_jax import exit_codes
from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_write
from llamapro_jax.launch.processes import SEEN_WITHIN, count, end_others
from llamapro_jax.training.lock import RunLock

LEASE_FILE = "lease.json"
REQUEST_FILE = "takeover.json"

# In seconds. A lease is renewed often enough for one that lives to be told from one that does not
# through the caches of a network file system, which show a new content within SEEN_WITHIN.
RENEW = 10.0
EXPIRY = 2.0 * SEEN_WITHIN
# How long a file that is being replaced may seem absent, and two starts at a time may overlap.
SETTLE = 2.0
# An owner that is asked to stop still has the directory for so long, and then ends at once.
GRACE = EXPIRY / 4
_POLL = 0.5


class TakenOver(UserError):
    """The run directory belongs to another run now; this one writes nothing more into it."""

    status = exit_codes.TAKEN_OVER


@dataclass(frozen=True)
class Owner:
    """Who has a lease, or asks for it. Times are ISO 8601. lock: `RunLock.place`."""

    owner: str
    host: str
    pid: int
    processes: int
    started: str
    renewed: str
    lock: str | None = None

    @staticmethod
    def parse(text: str) -> Owner | None:
        """None when it is damaged."""
        try:
            values = json.loads(text)
            found = Owner(**{name: values[name] for name in Owner.__dataclass_fields__})
            found.age()
            return found
        except (ValueError, KeyError, TypeError):
            return None

    def age(self) -> float:
        """Seconds since it was renewed, by this host's clock."""
        return time.time() - datetime.fromisoformat(self.renewed).timestamp()

    def __str__(self) -> str:
        several = f", one of {self.processes}" if self.processes > 1 else ""
        return f"process {self.pid} on {self.host}{several}"


class Lease:
    """A context manager that gives the lease back, when one was taken.

    Of several processes of a run the first alone takes it; on the others nothing is ever lost.

    takeover: whether to end a run that lives.
    """

    def __init__(self, takeover: bool = False) -> None:
        self.takeover = takeover
        self.lock = RunLock()
        now = _now()
        self._me = Owner(uuid.uuid4().hex, socket.gethostname(), os.getpid(), count(), now, now)
        self._directory: Path | None = None
        self._sure = 0.0  # when it last was certainly ours, in seconds of the wall clock
        self._lost: str | None = None
        self._others = False  # whether it was lost because another's lies there
        self._failed = 0.0  # when `check` last could not read it
        self._doubtful_until = 0.0  # see `_renew`; monotonic
        # How long the main thread then has to end the run, before the process is ended under it.
        self._patience = SETTLE
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    # ----------------------------------------------------------------- taking it

    def take(self, directory: Path) -> str | None:
        """Returns when the directory is this run's: whose lease it took, None when there was none.

        Raises UserError when another run trains there, and nobody asked to take over.
        """
        try:
            former = _Waiting(self, directory).free()
        except BaseException:
            self._withdraw(directory)
            raise
        self._directory = directory
        self._renew()
        # One that was killed while it asked would block the run for ever; who lives asks again.
        (directory / REQUEST_FILE).unlink(missing_ok=True)
        if not self.lock.held:
            # Nothing else keeps two starts at the same moment apart.
            time.sleep(SETTLE)
            self.confirm()
        self._thread.start()
        return former

    def ask(self, directory: Path) -> None:
        """Asks the owner to stop; again when another request lies there, the last one counts."""
        asked = Owner.parse(_text(directory / REQUEST_FILE) or "")
        if asked is None or asked.owner != self._me.owner:
            _write(directory / REQUEST_FILE, replace(self._me, renewed=_now()))

    def _withdraw(self, directory: Path) -> None:
        asked = Owner.parse(_text(directory / REQUEST_FILE) or "")
        if asked is not None and asked.owner == self._me.owner:
            (directory / REQUEST_FILE).unlink(missing_ok=True)

    # ----------------------------------------------------------------- keeping it

    def check(self) -> None:
        """Raises TakenOver when it is known to be lost. Reads nothing unless that is long ago.

        A directory that cannot be read ends no training: what is written to it is preceded by
        `confirm`.
        """
        if self._lost is not None:
            raise TakenOver(self._lost)
        # After a suspension the others may have waited long enough to take it.
        now = time.time()
        if self._directory is None or now - self._sure <= EXPIRY / 2:
            return
        if 0 <= now - self._failed < RENEW:  # or each step would wait for it
            return
        with suppress(OSError):
            self.confirm()
        if now - self._sure > EXPIRY / 2:
            self._failed = time.time()

    def confirm(self) -> None:
        """Reads whether the directory is still this run's. Raises TakenOver."""
        if self._directory is None:
            return
        self._lost = self._lost or self._look()
        if self._lost is not None:
            raise TakenOver(self._lost)

    def _look(self) -> str | None:
        """Why this run has to stop; None while it need not.

        Raises OSError when the directory cannot be read for so long that it may be another's.
        """
        assert self._directory is not None
        while (doubtful := self._doubtful_until - time.monotonic()) > 0:
            time.sleep(min(doubtful, _POLL))
        deadline = time.monotonic() + SETTLE
        while True:
            try:
                text = _text(self._directory / LEASE_FILE)
                asked = Owner.parse(_text(self._directory / REQUEST_FILE) or "")
                found = Owner.parse(text or "")
                if found is not None or time.monotonic() > deadline:
                    break
            except OSError:
                if time.monotonic() > deadline:
                    if time.time() - self._sure < EXPIRY:
                        return None
                    raise
            time.sleep(_POLL)
        if text is None:
            return self._told(f"its lease, {LEASE_FILE}, is gone, so that others may have it")
        if found is None and time.time() - self._sure >= EXPIRY:
            return self._told(f"its lease, {LEASE_FILE}, is damaged, so that others may have it")
        if found is not None and found.owner != self._me.owner and not self._outdated(found):
            self._others = True
            return self._told(f"{found} took the run over")
        if asked is not None and asked.owner != self._me.owner:
            self._patience = GRACE
            return self._told(f"{asked} takes the run over")
        if found is not None and found.owner == self._me.owner:
            self._sure = time.time()
        # Else it is damaged or outdated, nobody had the time to take it, and it is written anew.
        return None

    def _outdated(self, found: Owner) -> bool:
        """Whether the one before wrote it so late, its disk hanging, that this run had it then."""
        if time.time() - self._sure >= EXPIRY:
            return False
        return self._me.age() + EXPIRY / 2 < found.age()

    def _told(self, why: str) -> str:
        return (
            f"{self._directory}: {why}. This one ({self._me}) stopped and writes nothing more "
            "into it. Do not start it again beside the other."
        )

    def _renew(self) -> None:
        assert self._directory is not None
        if isinstance(self._directory, Path):
            self.lock.take(self._directory)  # where the owner before hangs on to it
        lock = self.lock.place if self.lock.held else None
        self._me = replace(self._me, renewed=_now(), lock=lock)
        began = time.time()
        _write(self._directory / LEASE_FILE, self._me)
        if 0 <= time.time() - began <= EXPIRY / 2:
            self._sure = time.time()
        else:
            # The write hung, and what it replaced may have been another's, who then soon writes
            # it again: until that must be seen, nothing is believed.
            self._doubtful_until = time.monotonic() + 2 * RENEW + SETTLE

    def _keep(self) -> None:
        """In a thread: renews the lease until it is over or lost."""
        while not self._over.wait(RENEW):
            # A full disk: it may expire, and whoever takes it is seen at the next look.
            with suppress(OSError):
                self._lost = self._lost or self._look()
                if self._lost is None:
                    self._renew()
            if self._lost is not None:
                # The main thread sees it at its next step; or it compiles, or hangs.
                if not self._over.wait(self._patience):
                    self._end(self._lost)
                return

    def _end(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        for action in (lambda: end_others(exit_codes.TAKEN_OVER, message), self._give_back):
            thread = threading.Thread(target=action, daemon=True)
            thread.start()
            thread.join(GRACE)
        os._exit(exit_codes.TAKEN_OVER)

    # ----------------------------------------------------------------- giving it back

    def _give_back(self) -> None:
        # When its last write hung, what lies there may stand in the place of another's.
        doubtful = time.monotonic() < self._doubtful_until
        if self._directory is None or self._others or doubtful:
            return
        with suppress(OSError):
            found = Owner.parse(_text(self._directory / LEASE_FILE) or "")
            if found is not None and found.owner == self._me.owner:
                (self._directory / LEASE_FILE).unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(GRACE)  # its disk may hang
        self._give_back()
        self.lock.release()


class _Waiting:
    """A start that wants a directory, and what it has seen there so far."""

    def __init__(self, lease: Lease, directory: Path) -> None:
        self._lease, self._directory = lease, directory
        self._began = time.monotonic()
        self._text: str | None = None
        self._changed = self._began
        self._renewals = -1
        self._said = False

    def free(self) -> str | None:
        """Waits until the directory may be taken: whose it was.

        Raises UserError when somebody trains there.
        """
        former = None
        while True:
            locked = not isinstance(self._directory, Path) or self._lease.lock.take(self._directory)
            text = _text(self._directory / LEASE_FILE)
            if text is None and locked:
                return former
            if text != self._text:
                self._text, self._changed = text, time.monotonic()
                self._renewals += text is not None
            owner = Owner.parse(text or "")
            if text is not None:
                former = str(owner) if owner else "somebody whose lease is damaged"
            if locked and self._dead(owner):
                return former
            if self._lease.takeover:
                if time.monotonic() - self._began > EXPIRY:
                    return former
                self._lease.ask(self._directory)
            elif self._lives(owner, locked):
                raise taken(self._directory, owner)
            self._say(former)
            time.sleep(_POLL)

    def _dead(self, owner: Owner | None) -> bool:
        """Of an owner whose lock, if there is one, this process has."""
        if owner is not None:
            if owner.lock is not None and owner.lock == self._lease.lock.place:
                return True
            if owner.age() > EXPIRY:
                return True
        return time.monotonic() - self._changed > EXPIRY

    def _lives(self, owner: Owner | None, locked: bool) -> bool:
        if not locked:
            # The same kernel knows. Of a dead host's lock a file server knows only after a while.
            if owner is not None and owner.lock == self._lease.lock.place:
                return True
            patience = SETTLE if self._text is None else EXPIRY
            if time.monotonic() - self._began > patience:
                return True
        return self._renewals > 0

    def _say(self, former: str | None) -> None:
        if self._said or time.monotonic() - self._began < 2 * SETTLE:
            return
        self._said = True
        waits = "asked it to stop" if self._lease.takeover else "waiting to see whether it lives"
        print(
            f"{self._directory}: is leased to {former or 'another process'}; {waits}, for at most "
            f"{EXPIRY:.0f} s",
            flush=True,
        )


def taken(run: Path, owner: Owner | None = None) -> UserError:
    who = ""
    if owner is not None:
        who = f" ({owner}, since {owner.started}, lease renewed {max(owner.age(), 0):.0f} s ago)"
    return UserError(
        f"{run}: another process trains here{who}; wait until it ends or stop it, or name another "
        "output. `llamapro train CONFIG --takeover` ends it and goes on from its newest checkpoint."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _text(file: Path) -> str | None:
    """None when it is absent."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _write(file: Path, owner: Owner) -> None:
    values: dict[str, Any] = asdict(owner)
    atomic_write(file, json.dumps(values, indent=2) + "\n")
