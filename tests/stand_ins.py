"""A machine of stand-ins: commands that write down how they were called, and do little else.

from stand_ins import Machine, fixtures

machine, checkout = fixtures()


def test_something(machine: Machine, checkout: Path) -> None:
    machine.run("make", "test", cwd=checkout)
    assert machine.record() == [...]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A Python that makes "environments" whose commands write down how they were called. While the files
# exist, FAIL lets pip fail where its arguments have the file's words, and FAIL_TESTS pytest.
FAKE_PYTHON = """\
#!/usr/bin/env bash
echo "python $*" >>"$RECORD"
if [[ "$1" == -c ]]; then exec {python} "$@"; fi
if [[ "$1 $2" == "-m venv" ]]; then
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
  cp "$(dirname "$0")/fake-llamapro" "$3/bin/llamapro"
  cp "$(dirname "$0")/fake-llamapro" "$3/bin/ruff"
elif [[ "$*" == *"pip"*"install"* && -e "$FAKES/FAIL" && "$*" == *"$(<"$FAKES/FAIL")"* ]]; then
  exit 1
elif [[ "$1 $2" == "-m llamapro_jax.launch.entry" ]]; then
  exec "$(dirname "$0")/llamapro" "${@:2}"
elif [[ "$*" == "-m pytest"* ]]; then
  if [[ -e "$FAKES/FAIL_TESTS" ]]; then echo "==== 1 failed, 2 passed in 3.00s ===="; exit 1; fi
  echo "==== 3 passed in 3.00s ===="
fi
"""
FAKE_LLAMAPRO = """\
#!/usr/bin/env bash
echo "$(basename "$0") $* (JAX_PLATFORMS=${JAX_PLATFORMS:-})" >>"$RECORD"
"""
# An interpreter of a version that is too old, as far as -c can tell.
OLD_PYTHON = "#!/usr/bin/env bash\nexit 1\n"


class Machine:
    """A PATH of stand-ins before the real one, a home directory, and a record of the calls."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record_file = directory / "record"
        self.fakes = directory / "fakes"
        self.fakes.mkdir()
        self.put("python3", FAKE_PYTHON.replace("{python}", sys.executable))
        self.put("fake-llamapro", FAKE_LLAMAPRO)
        self.environment = {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "HOME": str(directory),
            "RECORD": str(self.record_file),
            "FAKES": str(self.fakes),
        }

    def put(self, name: str, text: str) -> None:
        path = self.fakes / name
        path.write_text(text)
        path.chmod(0o755)

    def put_driver(self, version: str) -> None:
        self.put("nvidia-smi", f"#!/usr/bin/env bash\necho '{version}'\n")

    def run(
        self, *command: str | Path, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def record(self) -> list[str]:
        return self.record_file.read_text().splitlines() if self.record_file.exists() else []

    def installs(self) -> list[str]:
        return [line for line in self.record() if "pip" in line and "install" in line]


def fixtures() -> tuple[Any, Any]:
    """The fixtures `machine` and `checkout` of a module of tests."""

    @pytest.fixture
    def machine(tmp_path: Path) -> Machine:
        """Without an accelerator."""
        machine = Machine(tmp_path)
        machine.put("nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")
        return machine

    @pytest.fixture
    def checkout(tmp_path: Path) -> Path:
        """A copy of what the scripts touch, so that no test writes into the real checkout."""
        checkout = tmp_path / "checkout"
        (checkout / "configs").mkdir(parents=True)
        (checkout / "configs" / "tiny.yaml").write_text("model: tiny\n")
        for name in ("pyproject.toml", "LICENSE", "Makefile"):
            shutil.copy(ROOT / name, checkout)
        (checkout / "README.md").write_text("# llamapro_jax\n")
        shutil.copytree(ROOT / "launch", checkout / "launch")
        (checkout / "llamapro_jax").mkdir()
        (checkout / "llamapro_jax" / "__init__.py").write_text("")
        return checkout

    return machine, checkout
