"""The launch scripts, run against stand-ins that record."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_ins import OLD_PYTHON, ROOT, Machine, fixtures

from llamapro_jax.exit_codes import worth_restarting

LAUNCHERS = ["launch/local.sh", "launch/slurm.sbatch"]
SCRIPTS = [*LAUNCHERS, "launch/tpu.sh", "launch/tpu_worker.sh", ".ci/run"]

machine, checkout = fixtures()


def shellcheck() -> str | None:
    beside = Path(sys.executable).parent / "shellcheck"
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script: str) -> None:
    program = shellcheck()
    if program is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([program, ROOT / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_names_every_option(machine: Machine, script: str) -> None:
    result = machine.run(ROOT / script, "--help")
    assert result.returncode == 0
    assert "example:" in result.stdout
    options = set(re.findall(r"--[a-z-]+(?=[ |)].*(?:shift|\)$|;;))", (ROOT / script).read_text()))
    assert "--dry-run" in options
    assert {option for option in options if option not in result.stdout} == set()


# --- local.sh -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "extra", "platforms"),
    [
        (None, "[gcs]", "cpu"),
        ("580.65.06", "[cuda13,gcs]", "cuda,cpu"),
        ("550.54.15", "[cuda12,gcs]", "cuda,cpu"),
        ("470.82.01", "[gcs]", "cpu"),
        ("No devices were found", "[gcs]", "cpu"),
    ],
)
def test_local_takes_what_the_driver_runs(
    machine: Machine, checkout: Path, driver: str | None, extra: str, platforms: str
) -> None:
    if driver is not None:
        machine.put_driver(driver)
    result = machine.run("launch/local.sh", "configs/tiny.yaml", "steps=3", cwd=checkout)
    assert result.returncode == 0, result.stderr
    [install] = machine.installs()
    assert install.endswith(f"--editable {checkout}{extra}")
    assert machine.record()[-1] == (
        f"llamapro llamapro_jax.launch.entry configs/tiny.yaml steps=3 (JAX_PLATFORMS={platforms})"
    )


@pytest.mark.parametrize("arguments", [["--takeover", "configs/tiny.yaml"], ["configs/tiny.yaml", "--takeover"]])  # noqa: E501  # fmt: skip
def test_local_hands_takeover_on(machine: Machine, checkout: Path, arguments: list[str]) -> None:
    assert machine.run("launch/local.sh", *arguments, "steps=3", cwd=checkout).returncode == 0
    started = " ".join(["llamapro llamapro_jax.launch.entry", *arguments, "steps=3"])
    assert machine.record()[-1] == f"{started} (JAX_PLATFORMS=cpu)"


def test_local_installs_once_and_again_when_pyproject_changes(
    machine: Machine, checkout: Path
) -> None:
    for expected in (1, 1):
        assert machine.run("launch/local.sh", "configs/tiny.yaml", cwd=checkout).returncode == 0
        assert len(machine.installs()) == expected
    later = time.time() + 5
    os.utime(checkout / "pyproject.toml", (later, later))
    assert machine.run("launch/local.sh", "configs/tiny.yaml", cwd=checkout).returncode == 0
    assert len(machine.installs()) == 2


def test_local_accelerators_do_not_share_an_environment(machine: Machine, checkout: Path) -> None:
    for accelerator in ("cuda12", "cuda13"):
        arguments = ("--accelerator", accelerator, "--install-only")
        assert machine.run("launch/local.sh", *arguments, cwd=checkout).returncode == 0
        assert (checkout / f".venv-{accelerator}" / f".stamp-{accelerator}").exists()
    assert not (checkout / ".venv").exists()
    assert not any("launch.entry" in line for line in machine.record())


def test_local_failed_install_trains_nothing_and_is_done_again(
    machine: Machine, checkout: Path
) -> None:
    (machine.fakes / "FAIL").touch()
    assert machine.run("launch/local.sh", "configs/tiny.yaml", cwd=checkout).returncode != 0
    assert not any("launch.entry" in line for line in machine.record())
    (machine.fakes / "FAIL").unlink()
    assert machine.run("launch/local.sh", "configs/tiny.yaml", cwd=checkout).returncode == 0
    assert len(machine.installs()) == 2


def test_local_dry_run_changes_nothing(machine: Machine, checkout: Path) -> None:
    machine.put_driver("580.1")
    result = machine.run("launch/local.sh", "--dry-run", "configs/tiny.yaml", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert f"--editable {checkout}\\[cuda13\\,gcs\\]" in result.stdout
    assert "launch.entry configs/tiny.yaml" in result.stdout
    assert machine.installs() == []
    assert not list(checkout.glob(".venv*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerator", "rocm", "configs/tiny.yaml"], "--accelerator rocm: is none of cpu"),
        (["--accelerator"], "--accelerator needs one of"),
        (["--acelerator", "cpu"], "unknown option --acelerator"),
        (["configs/absent.yaml"], "configs/absent.yaml: no such configuration file"),
        ([], "CONFIG is missing"),
        (["--install-only", "configs/tiny.yaml"], "--install-only trains nothing"),
    ],
)
def test_local_refuses(
    machine: Machine, checkout: Path, arguments: list[str], message: str
) -> None:
    result = machine.run("launch/local.sh", *arguments, cwd=checkout)
    assert result.returncode == 2
    assert message in result.stderr
    assert machine.installs() == []


def test_local_names_the_old_python(machine: Machine, checkout: Path) -> None:
    machine.put("python3.9", OLD_PYTHON)
    result = machine.run("launch/local.sh", "configs/tiny.yaml", cwd=checkout, PYTHON="python3.9")
    assert result.returncode == 2
    assert "python3.9 is missing, older than Python 3.11" in result.stderr


# --- slurm.sbatch -------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "77"}


@pytest.fixture
def cluster(machine: Machine, checkout: Path) -> Path:
    """A checkout with an environment, where `srun` ends with $STATUS."""
    machine.put("srun", '#!/usr/bin/env bash\necho "srun ${*:6}" >>"$RECORD"\n"$1" "$2" "$3" "$4" "$5" bash -c "exit ${FIRST:-0}"\nexec "$1" "$2" "$3" "$4" "$5" bash -c "exit ${STATUS:-0}"\n')  # noqa: E501  # fmt: skip
    machine.put("scontrol", '#!/usr/bin/env bash\necho "scontrol $*" >>"$RECORD"\n')
    result = machine.run(
        "launch/local.sh", "--accelerator", "cuda12", "--install-only", cwd=checkout
    )
    assert result.returncode == 0, result.stderr
    return checkout


@pytest.mark.parametrize("status", [0, 1, 2, 42, 43, 44, 45, 127, 128, 130, 134, 137, 143, 193])
def test_slurm_trains_and_goes_back_into_the_queue_when_it_was_stopped(
    machine: Machine, cluster: Path, status: int
) -> None:
    # As Slurm does, run a copy.
    copy = shutil.copy(cluster / "launch/slurm.sbatch", machine.directory / "slurm_script")
    result = machine.run(
        copy, "configs/tiny.yaml", "output=a b", cwd=cluster, STATUS=str(status),
        SLURM_SUBMIT_DIR=str(cluster), **SLURM,
    )  # fmt: skip
    assert result.returncode == status, result.stderr
    program = cluster / ".venv-cuda12/bin/python"
    started = f"srun {program} -m llamapro_jax.launch.entry configs/tiny.yaml output=a b"
    assert started in machine.record()
    assert ("scontrol requeue 77" in machine.record()) == worth_restarting(status)


def test_slurm_requeues_a_failing_job_so_many_times_and_a_stopped_one_always(
    machine: Machine, cluster: Path
) -> None:
    script = "launch/slurm.sbatch"
    for status, requeued in ((42, True), (43, True), (42, True), (137, True), (137, False), (42, True)):  # noqa: E501  # fmt: skip
        before = machine.record().count("scontrol requeue 77")
        result = machine.run(
            script, "configs/tiny.yaml", cwd=cluster, STATUS=str(status), MAX_REQUEUES="2",
            SLURM_RESTART_COUNT="30", **SLURM,
        )  # fmt: skip
        assert result.returncode == status
        assert ("after 2 failures; not requeued" in result.stderr) != requeued
        assert machine.record().count("scontrol requeue 77") == before + requeued


@pytest.mark.parametrize("statuses", [("45", "134"), ("134", "45"), ("45", "42")])
def test_slurm_does_not_requeue_what_was_taken_over(
    machine: Machine, cluster: Path, statuses: tuple[str, str]
) -> None:
    first, last = statuses
    result = machine.run(
        "launch/slurm.sbatch", "configs/tiny.yaml", cwd=cluster, FIRST=first, STATUS=last, **SLURM
    )
    assert result.returncode == 45
    assert "scontrol requeue 77" not in machine.record()
    assert list(cluster.glob("llamapro-77.*")) == []


@pytest.mark.parametrize("status", [42, 137])
def test_slurm_ends_with_the_status_where_it_cannot_requeue(
    machine: Machine, cluster: Path, status: int
) -> None:
    machine.put("scontrol", "#!/usr/bin/env bash\nexit 1\n")
    result = machine.run(
        "launch/slurm.sbatch", "configs/tiny.yaml", cwd=cluster, STATUS=str(status), **SLURM
    )
    assert result.returncode == status
    assert "could not be requeued; submit it again" in result.stderr


def test_slurm_asks_for_gpus_by_node_and_for_a_signal() -> None:
    head = (ROOT / "launch/slurm.sbatch").read_text().partition("set -euo")[0]
    for option in ("gres=gpu:8", "ntasks-per-node=8", "signal=TERM@300", "requeue"):
        assert f"#SBATCH --{option}\n" in head
    assert "gpus-per-task" not in head


def test_slurm_dry_run_runs_nothing(machine: Machine, cluster: Path) -> None:
    before = machine.record()
    result = machine.run("launch/slurm.sbatch", "--dry-run", "configs/tiny.yaml", cwd=cluster)
    assert result.stdout.strip().endswith(
        "bin/python -m llamapro_jax.launch.entry configs/tiny.yaml"
    )
    assert machine.record() == before


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], SLURM, "CONFIG is missing"),
        (["configs/absent.yaml"], SLURM, "configs/absent.yaml: no such configuration file"),
        (["--nodes=2", "configs/tiny.yaml"], SLURM, "unknown option --nodes=2"),
        (["configs/tiny.yaml"], {}, "this is no Slurm job; submit it: sbatch"),
        (["configs/tiny.yaml"], {**SLURM, "VENV": "none"}, "none/bin/python: no such program"),
        (["configs/tiny.yaml"], {**SLURM, "SLURM_SUBMIT_DIR": "/"}, "/ is no checkout"),
        (["configs/tiny.yaml"], {**SLURM, "MAX_REQUEUES": "no"}, "'no' is not a whole number"),
    ],
)
def test_slurm_refuses(
    machine: Machine,
    cluster: Path,
    arguments: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    result = machine.run("launch/slurm.sbatch", *arguments, cwd=cluster, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert not any(line.startswith("srun") for line in machine.record())
