"""The Makefile and the CI script, run against stand-ins that record."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from stand_ins import FAKE_PYTHON, OLD_PYTHON, ROOT, Machine, fixtures

machine, checkout = fixtures()


# --- Makefile -----------------------------------------------------------------------------------


def test_make_quickstart_sets_up_once(machine: Machine, checkout: Path) -> None:
    for _ in range(2):
        result = machine.run("make", "quickstart", cwd=checkout)
        assert result.returncode == 0, result.stderr
    [install] = machine.installs()
    assert install.endswith("--editable .")
    assert machine.record()[-1].startswith("llamapro quickstart --out runs/quickstart")
    # What pyproject.toml asks for now is installed before the next run.
    later = time.time() + 5
    os.utime(checkout / "pyproject.toml", (later, later))
    assert machine.run("make", "quickstart", cwd=checkout).returncode == 0
    assert len(machine.installs()) == 2


def test_make_test_installs_the_extra_and_runs_everything(machine: Machine, checkout: Path) -> None:
    result = machine.run("make", "test", "PYTEST_ARGS=-k expand", cwd=checkout)
    assert result.returncode == 0, result.stderr
    [install] = machine.installs()
    assert install.endswith("--editable .[test]")
    assert any(line.startswith("ruff check .") for line in machine.record())
    last = machine.record()[-1]
    assert last.startswith("python -m pytest -n 2")
    assert last.endswith("-k expand")
    assert "slow" not in last
    assert machine.run("make", "quickstart", cwd=checkout).returncode == 0
    assert len(machine.installs()) == 1


def test_make_interrupted_install_is_done_again(machine: Machine, checkout: Path) -> None:
    (machine.fakes / "FAIL").touch()
    assert machine.run("make", "quickstart", cwd=checkout).returncode != 0
    assert not (checkout / ".venv" / ".stamp-base").exists()
    (machine.fakes / "FAIL").unlink()
    assert machine.run("make", "quickstart", cwd=checkout).returncode == 0
    assert len(machine.installs()) == 2


def test_make_names_the_old_python(machine: Machine, checkout: Path) -> None:
    machine.put("python3", OLD_PYTHON)
    result = machine.run("make", "test", cwd=checkout)
    assert result.returncode != 0
    assert "'python3' is missing or older than Python 3.11" in result.stderr
    assert "make PYTHON=/path/to/python3.11 test" in result.stderr
    assert not (checkout / ".venv").exists()


# --- .ci/run ------------------------------------------------------------------------------------


@pytest.fixture
def ci(machine: Machine, checkout: Path) -> Path:
    """`.ci/run` in a checkout, on a machine whose only Pythons are stand-ins: 3.11 and 3.13."""
    (checkout / ".ci").mkdir()
    machine.put("python3", FAKE_PYTHON.replace("{python} \"$@\"", "echo 3.11"))
    machine.put("python3.13", FAKE_PYTHON.replace("{python} \"$@\"", "echo 3.13"))
    machine.put("python3.12", OLD_PYTHON)
    return Path(shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run"))


def pytest_calls(machine: Machine) -> list[str]:
    return [line for line in machine.record() if line.startswith("python -m pytest")]


def test_ci_runs_all_on_the_first_python_and_the_quick_ones_on_a_newer(
    machine: Machine, ci: Path
) -> None:
    result = machine.run(ci, PYENV_ROOT=str(machine.directory))
    assert result.returncode == 0, result.stderr
    first, compiled, newer = pytest_calls(machine)
    assert "slow" not in first and first.endswith("--ignore tests/compiled")
    assert compiled == "python -m pytest tests/compiled"
    assert newer.endswith("-m not slow")
    assert result.stdout.splitlines()[-1] == "==== 3 passed in 3.00s ===="
    environments = [line.split()[-1] for line in machine.record() if " -m venv " in line]
    assert environments == [".venv-ci-3.11", ".venv-ci-3.13"]


def test_ci_with_one_python_runs_all_on_it(machine: Machine, ci: Path) -> None:
    machine.put("python3.13", OLD_PYTHON)
    result = machine.run(ci, PYENV_ROOT=str(machine.directory))
    assert result.returncode == 0, result.stderr
    only, compiled = pytest_calls(machine)
    assert "slow" not in only
    assert compiled == "python -m pytest tests/compiled"
    assert any("[test,tpu,cuda12]" in install for install in machine.installs())


def test_ci_with_only_a_newer_python_runs_all_on_it(machine: Machine, ci: Path) -> None:
    for name in ("python3", "python3.11"):
        machine.put(name, OLD_PYTHON)
    result = machine.run(ci, PYENV_ROOT=str(machine.directory))
    assert result.returncode == 0, result.stderr
    only, compiled = pytest_calls(machine)
    assert "slow" not in only
    assert compiled == "python -m pytest tests/compiled"
    assert any("[test,tpu,cuda12]" in install for install in machine.installs())


def test_without_cuda_wheels_the_programs_for_tpus_are_compiled(
    machine: Machine, checkout: Path
) -> None:
    (machine.fakes / "FAIL").write_text("cuda")
    result = machine.run("make", "test-compiled", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert machine.installs()[-1].endswith("[test,tpu]")
    assert pytest_calls(machine) == ["python -m pytest tests/compiled"]


def test_ci_fails_with_the_summary_as_its_last_words(machine: Machine, ci: Path) -> None:
    (machine.fakes / "FAIL_TESTS").touch()
    result = machine.run(ci, PYENV_ROOT=str(machine.directory))
    assert result.returncode != 0
    assert result.stdout.splitlines()[-1] == "==== 1 failed, 2 passed in 3.00s ===="
    assert len(pytest_calls(machine)) == 1


def test_ci_without_a_python_says_so(machine: Machine, ci: Path) -> None:
    for name in ("python3", "python3.11", "python3.13"):
        machine.put(name, OLD_PYTHON)
    result = machine.run(ci, PYENV_ROOT=str(machine.directory))
    assert result.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13" in result.stderr
