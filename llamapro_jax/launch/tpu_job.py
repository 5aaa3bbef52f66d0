"""What is trained on the hosts of a TPU slice, and how it gets there.

The checkout's package, launchers and configurations travel as one archive: through scp, or through
a bucket from which each host fetches it in its start-up script. Both unpack it below /opt/llamapro
and leave the rest to `launch/tpu_worker.sh`, which comes with it.
"""

from __future__ import annotations

import os
import re
import shlex
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamapro_jax.errors import UserError
from llamapro_jax.launch.queued_resource import QueuedResource

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = "llamapro_jax.tar.gz"
_CARRIED = ("pyproject.toml", "README.md", "LICENSE", "llamapro_jax", "launch", "configs")

_HOME = "/opt/llamapro"
_WORKER = f"{_HOME}/checkout/launch/tpu_worker.sh"

# As root. `fetch` puts the archive where it is, `prepare` is the user's.
_UNPACK = """\
set -euo pipefail
export HOME="${{HOME:-/root}}" PATH="$PATH:/snap/bin"
home="{home}"
mkdir -p "$home"
cd "$home"
{prepare}
{fetch}
rm -rf incoming
mkdir incoming
tar -xzf "{archive}" -C incoming
"""
# As root, on hosts where it is installed: one that was started anew has lost its mounts.
_START = """\
set -euo pipefail
export HOME="${{HOME:-/root}}" PATH="$PATH:/snap/bin"
cd "{home}"
if ! systemctl is-active llamapro >/dev/null; then
:
{prepare}
fi
exec bash {worker} start {arguments}
"""
_STARTUP = """\
#!/usr/bin/env bash
# Written by launch/tpu.sh. Every host runs it at each boot: training goes on by itself.
home="{home}"
mkdir -p "$home"
exec >>"$home/log" 2>&1
{unpack}exec bash incoming/launch/tpu_worker.sh boot {arguments}
"""
# The network and the bucket may take a moment after boot.
_FETCH = """\
for attempt in 1 2 3 4 5; do
  if gcloud storage cp {url} {archive}; then break; fi
  if ((attempt == 5)); then exit 1; fi
  sleep 10
done"""


@dataclass(frozen=True)
class Job:
    """One run. config: a path from the checkout's root; prepare: a command before all else.

    staging: a gs:// directory for the archive, and the hosts start by themselves; None: by ssh.
    takeover: end another run that has the output, such as one that hangs on lost hosts.
    """

    config: str
    overrides: tuple[str, ...] = ()
    prepare: str = ""
    staging: str | None = None
    takeover: bool = False

    @property
    def arguments(self) -> str:
        takeover = ["--takeover"] if self.takeover else []
        return shlex.join([self.config, *takeover, *self.overrides])


def job(
    config: str, overrides: Sequence[str], prepare: str = "", staging: str | None = None
) -> Job:
    """Raises UserError when the configuration does not exist, or would not travel."""
    file = Path(config).resolve()
    if not file.is_file():
        raise UserError(f"{config}: no such configuration file")
    if not file.is_relative_to(ROOT):
        raise UserError(
            f"{config}: is outside {ROOT}, which is what the hosts get; copy it to configs/"
        )
    for override in overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", override):
            raise UserError(f"{override}: is no key.path=value")
    if staging is not None and not re.fullmatch(r"gs://[a-z0-9][\w.-]+(/[^\s/]+)*/?", staging):
        raise UserError(
            f"--staging {staging}: is no directory of a bucket, such as gs://BUCKET/jobs"
        )
    return Job(file.relative_to(ROOT).as_posix(), tuple(overrides), prepare, staging)


@contextmanager
def archive(config: str | None) -> Iterator[Path]:
    """A file with what an install and a run need, and nothing else: a checkout may hold models."""
    names = [*_CARRIED, *([config] if config and not config.startswith("configs/") else [])]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / ARCHIVE
        with tarfile.open(file, "w:gz") as tar:
            for name in names:
                tar.add(ROOT / name, name, filter=_without_caches)
        yield file


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if os.path.basename(entry.name) == "__pycache__":
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


# ------------------------------------------------------------------- through a bucket


def stage(resource: QueuedResource, what: Job) -> None:
    """Puts the archive where the start-up script looks for it."""
    with archive(what.config) as file:
        resource.gcloud.call("storage", "cp", str(file), _url(resource.name, what))


@contextmanager
def startup_script(resource: QueuedResource, what: Job) -> Iterator[Path | None]:
    """The start-up script as a file, None when the job goes through ssh."""
    if what.staging is None:
        yield None
        return
    text = startup_text(resource.name, what)
    if resource.gcloud.dry_run:
        print(f"# the start-up script:\n{text}")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "startup.sh"
        file.write_text(text)
        yield file


def startup_text(name: str, what: Job) -> str:
    unpack = _unpack(
        what, ARCHIVE, _FETCH.format(url=shlex.quote(_url(name, what)), archive=ARCHIVE)
    )
    return _STARTUP.format(home=_HOME, unpack=unpack, arguments=what.arguments)


def _url(name: str, what: Job) -> str:
    assert what.staging is not None
    return f"{what.staging.rstrip('/')}/{name}.tar.gz"


def _unpack(what: Job, path: str, fetch: str) -> str:
    return _UNPACK.format(home=_HOME, prepare=what.prepare, fetch=fetch, archive=path)


# ------------------------------------------------------------------- through ssh


def setup(resource: QueuedResource, what: Job) -> None:
    """Copies the checkout to all hosts and installs it there; waits for that."""
    with archive(what.config or None) as file:
        resource.copy_to_all(file, ARCHIVE)
    # What is above sudo is the home directory of who connects.
    script = _unpack(what, "$1", "") + "bash incoming/launch/tpu_worker.sh install"
    resource.ssh(f"sudo bash -c {shlex.quote(script)} setup ~/{ARCHIVE}")


def start(resource: QueuedResource, what: Job) -> None:
    """Starts training on all hosts where it was installed, and does not run."""
    script = _START.format(
        home=_HOME, prepare=what.prepare, worker=_WORKER, arguments=what.arguments
    )
    resource.ssh(f"sudo bash -c {shlex.quote(script)} start")


def stop(resource: QueuedResource) -> str:
    """Asks all hosts to save and end. Returns what they said."""
    return resource.ssh(f"sudo bash {_WORKER} stop")


def ask(resource: QueuedResource) -> str:
    """What the hosts report of themselves, for `read_reports`."""
    absent = 'echo "@llamapro $(hostname) none - -"'
    command = f"if test -e {_WORKER}; then sudo bash {_WORKER} status; else {absent}; fi"
    return resource.ssh(command, asks=True)


def log(
    resource: QueuedResource,
    node: str = "0",
    worker: str = "0",
    lines: int = 50,
    follow: bool = False,
    show: bool = True,
) -> str:
    """The last lines of the output of training on one host. The first one has most to say."""
    tail = f"tail -n {lines}{' -F' if follow else ''} {_HOME}/log"
    return resource.ssh(f"sudo {tail}", node, worker, show=show)
