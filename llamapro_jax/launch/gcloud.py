"""Calling gcloud: what is run, how long it may take, and what kind of error it ended with.

Needs the standard library alone, like all of `llamapro_jax.launch` that runs on a workstation.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from llamapro_jax.errors import UserError


class Kind(Enum):
    """What an error of gcloud means to who called it."""

    NOT_FOUND = "not found"
    EXISTS = "exists already"
    NO_ROOM = "no quota or capacity"
    # Nobody but a person can mend it: permissions, login, a wrong argument.
    REFUSED = "refused"
    # Everything else: the network, a host that does not answer, a service that is down.
    PASSING = "passing"


# The first that is found in what gcloud said. A limit of calls a minute is said to be a quota too.
_PATTERNS = (
    (Kind.PASSING, r"RATE_LIMIT|[Rr]equests? per minute|per-minute"),
    (Kind.NO_ROOM, r"RESOURCE_EXHAUSTED|[Qq]uota|no more capacity|[Ss]tockout"),
    (
        Kind.REFUSED,
        r"PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|SERVICE_DISABLED"
        r"|does not have permission|active account selected|[Rr]eauthentication"
        r"|HTTPError 40[134]|not found: 404"  # of `gcloud storage`
        r"|required property \[|Error parsing \[|unrecognized arguments"
        r"|^ERROR: \(gcloud\.[^)]*\) argument ",
    ),
    (Kind.EXISTS, r"ALREADY_EXISTS"),
    (Kind.NOT_FOUND, r"NOT_FOUND"),
)


def kind_of(said: str) -> Kind:
    """What an error of Google means, by its words."""
    found = (kind for kind, pattern in _PATTERNS if re.search(pattern, said, re.MULTILINE))
    return next(found, Kind.PASSING)


class GcloudError(UserError):
    """A call of gcloud that failed. `kind`: what that means; `said`: its words."""

    def __init__(
        self, command: Sequence[str], status: int, said: str, kind: Kind | None = None
    ) -> None:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        # Before what is wrong stand remarks, after it hints.
        wrong = [i for i, line in enumerate(lines) if re.match("error:", line, re.IGNORECASE)]
        lines = lines[wrong[0] :][:3] if wrong else lines[-3:]
        self.kind = kind or kind_of(said)
        self.said = " ".join(lines) or "it said nothing"
        super().__init__(f"{shlex.join(command[:5])}: status {status}: {self.said}")


@dataclass
class Gcloud:
    """gcloud in one zone of one project, None: those of its own configuration.

    dry_run: calls are printed and answered by "".
    timeout: seconds after which a call counts as failed. ssh to a host that is gone can hang.
    asking: the same of a call that only asks how something stands, `asks`.
    """

    zone: str | None = None
    project: str | None = None
    dry_run: bool = False
    timeout: float = 1800
    asking: float = 120

    def tpus(self, *words: str, show: bool = False, asks: bool = False) -> str:
        """`gcloud compute tpus ...` in the zone. See `call`."""
        zone = [f"--zone={self.zone}"] if self.zone else []
        return self.call("compute", "tpus", *words, *zone, show=show, asks=asks)

    def call(self, *words: str, show: bool = False, asks: bool = False) -> str:
        """What the command printed. `show`: it has the terminal, and "" is returned.

        Raises GcloudError.
        """
        project = [f"--project={self.project}"] if self.project else []
        command = ["gcloud", *words, *project, "--quiet"]
        if self.dry_run:
            print(shlex.join(command))
            return ""
        try:
            timeout = self.asking if asks else self.timeout
            status, output, said = _shown(command) if show else _run(command, timeout)
        except FileNotFoundError:
            raise UserError(
                "gcloud is not on PATH; install the Google Cloud CLI "
                "(https://cloud.google.com/sdk/docs/install) and log in: gcloud auth login"
            ) from None
        if status != 0:
            raise GcloudError(command, status, said)
        return output


def _shown(command: Sequence[str]) -> tuple[int, str, str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL).returncode, "", "see above"


def _run(command: Sequence[str], timeout: float) -> tuple[int, str, str]:
    # A session of its own: ssh, which gcloud starts, would otherwise outlive the timeout.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, said = process.communicate(timeout=timeout)
        return process.returncode, output, said
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer after {timeout:g} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
