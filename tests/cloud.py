"""Clouds of stand-ins: a `gcloud` on PATH that answers from a script or runs things here.

from cloud import ScriptedCloud

cloud = ScriptedCloud(tmp_path)
cloud.answer("describe", state("PROVISIONING"), state("ACTIVE"))
main([...])
assert cloud.keys() == ["describe", "describe"]
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

# Writes down its arguments, then runs the next answer of its kind: a line of bash. The last answer
# of a kind is given again and again; without one it ends with 0 and says nothing.
GCLOUD = r"""#!/usr/bin/env bash
cd "${0%/*}" || exit
printf '%s\0' "$@" $'\n' >>record
case "$*" in
  *"tpu_worker.sh status"*) key=ask ;;
  *"tpu_worker.sh install"*) key=setup ;;
  *"tpu_worker.sh start"*) key=start ;;
  *"tpu_worker.sh stop"*) key=stop ;;
  *"=sudo tail"*) key=tail ;;
  "compute tpus tpu-vm"*) key=hosts ;;
  storage*) key=storage ;;
  *) key="$4" ;;
esac
echo "$key" >>keys
for answer in answers/"$key".*; do
  if [[ -e "$answer" ]]; then break; fi
  exit 0
done
others=(answers/"$key".*)
if ((${#others[@]} > 1)); then mv "$answer" now; answer=now; fi
source "./$answer"
"""


def say(text: str) -> str:
    return f"printf '%s\\n' {shlex.quote(text)}"


def state(name: str, nodes: int = 1, error: str = "") -> str:
    """An answer to `describe`."""
    described: dict = {"state": name}
    if error:
        described["failedData"] = {"error": {"code": 8, "message": error}}
    specs = [{"nodeId": f"my-tpu-{i}" if nodes > 1 else "my-tpu"} for i in range(nodes)]
    return say(json.dumps({"state": described, "tpu": {"nodeSpec": specs}}))


def reports(*lines: str) -> str:
    """An answer to `tpu_worker.sh status`: "running - 8" and so on, one for each host."""
    said = [f"@llamapro host-{i} {line}" for i, line in enumerate(lines)]
    return say("\n".join(["SSH: Attempting to connect to worker 0...", *said]))


def fail(text: str, status: int = 1) -> str:
    return f"printf '%s\\n' {shlex.quote(text)} >&2; exit {status}"


class ScriptedCloud:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "answers").mkdir(parents=True)
        (directory / "gcloud").write_text(GCLOUD)
        (directory / "gcloud").chmod(0o755)

    def answer(self, key: str, *answers: str) -> None:
        """The answers to calls of this kind, in order; the last one stays."""
        for number, answer in enumerate(answers):
            (self.directory / "answers" / f"{key}.{number:03}").write_text(answer)

    def keys(self) -> list[str]:
        file = self.directory / "keys"
        return file.read_text().split() if file.exists() else []

    def calls(self) -> list[list[str]]:
        file = self.directory / "record"
        text = file.read_text() if file.exists() else ""
        return [call.split("\0")[:-1] for call in text.split("\n\0")[:-1]]


FLAGS = json.loads((Path(__file__).parent / "gcloud_flags.json").read_text())


def unknown_flags(call: list[str]) -> list[str]:
    """What of a call of gcloud its SDK does not know: the command itself, or flags of it."""
    line = " ".join(call)
    known = [name for name in FLAGS["commands"] if line.startswith(f"{name} ")]
    if not known:
        return [line]
    allowed = {*FLAGS["commands"][known[0]], *FLAGS["every command"]}
    given = [word.partition("=")[0] for word in call if word.startswith("--")]
    return [flag for flag in given if flag not in allowed]
