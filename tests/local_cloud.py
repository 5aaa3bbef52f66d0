"""A cloud in small: the hosts of a queued resource are directories, and what is sent there runs.

`LocalCloud` writes it into a directory; this file itself is the `gcloud` there. On the hosts sudo,
systemd, hostname and python3 are stand-ins: a unit is a process in a session of its own, and a
virtual environment's Python is this one, which installs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

OPT = "/opt/llamapro"
STAND_INS = {
    "sudo": 'exec "$@"',
    "hostname": 'basename "$HOST_DIRECTORY"',
    "systemd-run": """\
while [[ "$1" == --* ]]; do shift; done
setsid "$@" >/dev/null 2>&1 </dev/null &
echo $! >"$HOST_DIRECTORY/unit"
""",
    "systemctl": """\
unit="$(cat "$HOST_DIRECTORY/unit" 2>/dev/null)" && grep -qv ') Z ' "/proc/$unit/stat" 2>/dev/null \
  || { echo inactive; exit 3; }
if [[ "$1" == is-active ]]; then echo active; else kill -TERM "$unit"; fi
""",
    "python3": """\
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") ;;
  "-m llamapro_jax.launch.entry") PYTHONPATH="$PWD" exec {trainer} ;;
  *) exec {python} "$@" ;;
esac
""",
}
# Trains nothing: counts until there is a file `finish`, saves each second step, and hears SIGTERM,
# all hosts together: as in training, no step is taken before all are there.
TRAINER = """\
import os, pathlib, signal, sys, time
output = pathlib.Path(sys.argv[-1].partition("=")[2])
first = os.environ["JAX_PROCESS_ID"] == "0"
step = began = int((output / "step").read_text()) if (output / "step").exists() else 0
stop = output / f"stop-{began}"
signal.signal(signal.SIGTERM, lambda *_: stop.touch())
(output / f"ready-{os.environ['JAX_PROCESS_ID']}-{began}").touch()
while first and len([*output.glob(f"ready-*-{began}")]) < int(os.environ["HOSTS"]):
    time.sleep(0.05)
if first:
    with (output / "starts").open("a") as file:
        file.write(f"{began}\\n")
    print(f"{output}: going on from step {began}", flush=True)
while not (output / "finish").exists():
    time.sleep(0.05)
    step += 1
    if first and (stop.exists() or step % 2 == 0):
        (output / "step.new").write_text(str(step))
        (output / "step.new").rename(output / "step")
        print(f"step {step}: saving, 0 frozen bits changed\\nstep {step}: saved", flush=True)
    if stop.exists():
        sys.exit(42)
"""


class LocalCloud:
    """trainer: what runs for the entry, None: the entry itself, of the checkout that was sent."""

    def __init__(self, directory: Path, hosts: int, trainer: str | None = TRAINER) -> None:
        self.directory = directory
        hosts_bin, here_bin = directory / "hosts-bin", directory / "bin"
        for folder in (hosts_bin, here_bin, directory / "hosts", directory / "bucket"):
            folder.mkdir(parents=True)
        run = f'{sys.executable} "$@"'
        if trainer is not None:
            (directory / "trainer.py").write_text(trainer)
            run = f'{sys.executable} -S {directory}/trainer.py "$@"'
        for name, text in STAND_INS.items():
            text = text.replace("{trainer}", run).replace("{python}", sys.executable)
            _executable(hosts_bin / name, f"#!/usr/bin/env bash\n{text}\n")
        call = f'#!/usr/bin/env bash\nexec {sys.executable} -S {__file__} {directory} "$@"\n'
        for folder in (hosts_bin, here_bin):
            _executable(folder / "gcloud", call)
        (directory / "settings").write_text(json.dumps({"hosts": hosts, "environment": {}}))
        (directory / "state").write_text("ABSENT")
        self.environment = {
            **os.environ,
            "PATH": f"{here_bin}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
        }

    def host_environment(self, **environment: str) -> None:
        settings = json.loads((self.directory / "settings").read_text())
        settings["environment"] |= environment
        (self.directory / "settings").write_text(json.dumps(settings))

    def state(self) -> str:
        return (self.directory / "state").read_text()

    def calls(self) -> list[list[str]]:
        lines = (self.directory / "record").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def units(self) -> list[int]:
        """The processes that train, host by host."""
        files = sorted((self.directory / "hosts").glob("*/unit"))
        return [int(file.read_text()) for file in files]

    def preempt(self) -> None:
        """Takes all hosts away, without a word to what runs there."""
        _kill(self.directory)
        (self.directory / "state").write_text("SUSPENDED")


def _executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _kill(directory: Path) -> None:
    for file in (directory / "hosts").glob("*/unit"):
        with suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


# ------------------------------------------------------------------- gcloud


class Gcloud:
    def __init__(self, directory: Path, words: list[str]) -> None:
        self.directory = directory
        self.settings = json.loads((directory / "settings").read_text())
        self.words = [word for word in words if not word.startswith("--")]
        pairs = [word.partition("=") for word in words if word.startswith("--")]
        self.flags = {name: value for name, _, value in pairs}

    def act(self) -> int:
        if self.words[:2] == ["storage", "cp"]:
            source, target = map(self._place, self.words[2:])
            shutil.copy(source, target)
            return 0
        if self.words[2] == "tpu-vm":
            print(";".join(f"10.0.0.{i}" for i in range(self.settings["hosts"])))
            return 0
        return getattr(self, self.words[3])()

    def _place(self, name: str) -> Path:
        bucket, path = self.directory / "bucket", Path(name.removeprefix("gs://"))
        if not name.startswith("gs://"):
            return Path(name)
        (bucket / path).parent.mkdir(parents=True, exist_ok=True)
        return bucket / path

    def _state(self, new: str | None = None) -> str:
        file = self.directory / "state"
        if new is not None:
            file.write_text(new)
        return file.read_text()

    def _hosts(self) -> list[Path]:
        return sorted((self.directory / "hosts").iterdir())

    def _start(self, host: Path, command: str, index: int) -> subprocess.Popen[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV")},
            **self.settings["environment"],
            "PATH": f"{self.directory}/hosts-bin:{os.environ['PATH']}",
            "HOME": str(host),
            "HOST_DIRECTORY": str(host),
            "JAX_PROCESS_ID": str(index),
            "HOSTS": str(len(self._hosts())),
        }
        return subprocess.Popen(
            ["bash", "-c", command.replace(OPT, str(host / "opt"))],
            cwd=host,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    # The verbs of queued-resources.

    def create(self) -> int:
        if self._state() != "ABSENT":
            print("ERROR: ALREADY_EXISTS", file=sys.stderr)
            return 1
        prefix = self.flags.get("--node-id") or self.flags["--node-prefix"]
        for slice_number in range(int(self.flags.get("--node-count", "1"))):
            for worker in range(self.settings["hosts"]):
                (self.directory / "hosts" / f"{prefix}-{slice_number}-w-{worker}").mkdir()
        startup = self.flags.get("--metadata-from-file", "").removeprefix("startup-script=")
        if startup:
            for index, host in enumerate(self._hosts()):
                self._start(host, Path(startup).read_text(), index)
        self._state("PROVISIONING")
        return 0

    def describe(self) -> int:
        state = self._state()
        if state == "ABSENT":
            print("ERROR: NOT_FOUND", file=sys.stderr)
            return 1
        if state == "PROVISIONING":
            self._state("ACTIVE")
        slices = sorted({host.name.rpartition("-w-")[0] for host in self._hosts()})
        specs = [{"nodeId": name} for name in slices]
        print(json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": specs}}))
        return 0

    def delete(self) -> int:
        _kill(self.directory)
        for host in self._hosts():
            # What was killed may write for a moment still.
            for _ in range(20):
                shutil.rmtree(host, ignore_errors=True)
                if not host.exists():
                    break
                time.sleep(0.05)
        self._state("ABSENT")
        return 0

    def ssh(self) -> int:
        hosts = list(enumerate(self._hosts()))
        if self.flags["--worker"] != "all":
            end = f"-{self.flags['--node']}-w-{self.flags['--worker']}"
            hosts = [(index, host) for index, host in hosts if host.name.endswith(end)]
        began = [self._start(host, self.flags["--command"], index) for index, host in hosts]
        for process in began:
            said = process.communicate()[0]
            print(said, end="", file=sys.stderr if process.returncode else sys.stdout)
        return max(process.returncode for process in began)

    def scp(self) -> int:
        for host in self._hosts():
            shutil.copy(self.words[4], host / self.words[5].partition(":")[2])
        return 0


if __name__ == "__main__":
    directory, arguments = Path(sys.argv[1]), sys.argv[2:]
    if os.environ.get("HOST_DIRECTORY") is None:
        with (directory / "record").open("a") as file:
            file.write(json.dumps(arguments) + "\n")
    sys.exit(Gcloud(directory, arguments).act())
