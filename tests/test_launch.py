"""The launch scripts, the Makefile and the CI script, run against stand-ins that record."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ["launch/local.sh", "launch/slurm_gpu.sh", "launch/tpu_vm.sh"]
SCRIPTS = [*LAUNCHERS, ".ci/run"]

# A Python that makes "environments" whose commands write down how they were called. While the files
# exist, FAIL lets pip fail, FAIL_TESTS pytest, and SLEEP keeps llamapro alive.
FAKE_PYTHON = """\
#!/usr/bin/env bash
echo "python $*" >>"$RECORD"
if [[ "$1" == -c ]]; then exec {python} "$@"; fi
if [[ "$1 $2" == "-m venv" ]]; then
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
  cp "$(dirname "$0")/fake-llamapro" "$3/bin/llamapro"
  cp "$(dirname "$0")/fake-llamapro" "$3/bin/ruff"
elif [[ "$*" == *"pip"*"install"* && -e "$FAKES/FAIL" ]]; then
  exit 1
elif [[ "$*" == "-m pytest"* ]]; then
  if [[ -e "$FAKES/FAIL_TESTS" ]]; then echo "==== 1 failed, 2 passed in 3.00s ===="; exit 1; fi
  echo "==== 3 passed in 3.00s ===="
fi
"""
FAKE_LLAMAPRO = """\
#!/usr/bin/env bash
echo "$(basename "$0") $* (JAX_PLATFORMS=${JAX_PLATFORMS:-})" >>"$RECORD"
echo "training"
while [[ -e "$FAKES/SLEEP" ]]; do sleep 0.1; done
"""
# Answers `describe` from $ADDRESSES, runs what comes by ssh in the home of each worker that it is
# for, and copies by scp. The home of worker 0 is $REMOTE_HOME, that of another $REMOTE_HOME-NUMBER.
FAKE_GCLOUD = """\
#!/usr/bin/env bash
printf '%s\\n' "gcloud $*" >>"$RECORD"
if [[ "$4" == describe ]]; then echo "$ADDRESSES"; exit; fi
IFS=';' read -ra addresses <<<"$ADDRESSES"
workers="${!addresses[*]}"
for argument in "$@"; do
  if [[ "$argument" == --worker=[0-9]* ]]; then workers="${argument#--worker=}"; fi
done
status=0
for worker in $workers; do
  home="$REMOTE_HOME"
  if ((worker > 0)); then home="$REMOTE_HOME-$worker"; mkdir -p "$home"; fi
  case "$4" in
    scp) cp "$5" "$home/${6#*:}" ;;
    ssh) (cd "$home" && HOME="$home" bash -c "${7#--command=}") || status=$? ;;
  esac
done
exit $status
"""
# An interpreter of a version that is too old, as far as -c can tell.
OLD_PYTHON = "#!/usr/bin/env bash\nexit 1\n"


class Machine:
    """A PATH of stand-ins before the real one, a home directory, and a record of the calls."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record_file = directory / "record"
        self.remote_home = directory / "remote"
        self.fakes = directory / "fakes"
        self.fakes.mkdir()
        self.remote_home.mkdir()
        self.put("python3", FAKE_PYTHON.replace("{python}", sys.executable))
        self.put("fake-llamapro", FAKE_LLAMAPRO)
        self.environment = {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "HOME": str(directory),
            "RECORD": str(self.record_file),
            "FAKES": str(self.fakes),
            "REMOTE_HOME": str(self.remote_home),
            "ADDRESSES": "10.0.0.2",
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


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.put("nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")
    machine.put("gcloud", FAKE_GCLOUD)
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
        (None, "", "cpu"),
        ("580.65.06", "[cuda13]", "cuda,cpu"),
        ("550.54.15", "[cuda12]", "cuda,cpu"),
        ("470.82.01", "", "cpu"),
        ("No devices were found", "", "cpu"),
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
        f"llamapro train configs/tiny.yaml steps=3 (JAX_PLATFORMS={platforms})"
    )


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
    assert not any("llamapro train" in line for line in machine.record())


def test_local_failed_install_trains_nothing_and_is_done_again(
    machine: Machine, checkout: Path
) -> None:
    (machine.fakes / "FAIL").touch()
    assert machine.run("launch/local.sh", "configs/tiny.yaml", cwd=checkout).returncode != 0
    assert not any("llamapro train" in line for line in machine.record())
    (machine.fakes / "FAIL").unlink()
    assert machine.run("launch/local.sh", "configs/tiny.yaml", cwd=checkout).returncode == 0
    assert len(machine.installs()) == 2


def test_local_dry_run_changes_nothing(machine: Machine, checkout: Path) -> None:
    machine.put_driver("580.1")
    result = machine.run("launch/local.sh", "--dry-run", "configs/tiny.yaml", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert f"--editable {checkout}\\[cuda13\\]" in result.stdout
    assert "train configs/tiny.yaml" in result.stdout
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


# --- tpu_vm.sh ----------------------------------------------------------------------------------

PLACE = ["--name", "my-tpu", "--zone", "us-west4-a"]


def gcloud_calls(machine: Machine) -> list[str]:
    return [line for line in machine.record() if line.startswith("gcloud")]


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_tpu_vm_dry_run_prints_every_command_and_calls_none(
    machine: Machine, checkout: Path
) -> None:
    result = machine.run(
        "launch/tpu_vm.sh", *PLACE, "--project", "p", "--config", "configs/tiny.yaml", "--dry-run",
        "optimizer.learning_rate=1e-4", cwd=checkout,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert machine.record() == []
    verbs = re.findall(r"^gcloud compute tpus tpu-vm (\w+) ", result.stdout, flags=re.MULTILINE)
    assert verbs == ["describe", "ssh", "scp", "ssh", "ssh"]
    for line in result.stdout.splitlines():
        if line.startswith("gcloud"):
            assert "--zone=us-west4-a --project=p" in line
            assert "--worker=all" in line or " describe " in line
    logs = machine.run("launch/tpu_vm.sh", "logs", *PLACE, "--dry-run", cwd=checkout)
    assert "--worker=0" in logs.stdout
    assert "optimizer.learning_rate=1e-4" in result.stdout


def test_tpu_vm_trains_detached_shows_its_log_and_stops(machine: Machine, checkout: Path) -> None:
    (machine.fakes / "SLEEP").touch()
    (checkout / "llamapro_jax" / "here.py").touch()
    stale = machine.remote_home / "llamapro_jax" / "llamapro_jax" / "removed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    start = ["launch/tpu_vm.sh", *PLACE, "--config", "configs/tiny.yaml", "run.name='a b'"]
    result = machine.run(*start, cwd=checkout)
    assert result.returncode == 0, result.stderr
    remote = machine.remote_home / "llamapro_jax"
    process = int((remote / "train.pid").read_text())
    try:
        wait_for((remote / "train.log").read_text, "no output")
        assert (remote / "llamapro_jax" / "here.py").exists()
        assert not stale.exists()
        assert machine.installs()[0].endswith(f"--editable {remote}[tpu]")
        # The override arrives as one argument, its quotes and space kept.
        expected = "llamapro train configs/tiny.yaml run.name='a b' (JAX_PLATFORMS=tpu,cpu)"
        assert expected in machine.record()
        # Its own session: what ends the connection does not reach it.
        assert os.getsid(process) == process

        second = machine.run(*start, cwd=checkout)
        assert second.returncode == 1
        assert f"a training run is under way here (process {process})" in second.stderr
        assert len([call for call in gcloud_calls(machine) if " scp " in call]) == 1

        logs = machine.run("launch/tpu_vm.sh", "logs", *PLACE, cwd=checkout)
        assert logs.stdout == "training\n"
        stop = machine.run("launch/tpu_vm.sh", "stop", *PLACE, cwd=checkout)
        assert stop.stdout == f"stopping process {process}\n"
        wait_for(lambda: not running(process), "the run did not end")
        again = machine.run("launch/tpu_vm.sh", "stop", *PLACE, cwd=checkout)
        assert again.stdout == "no training run is under way\n"
    finally:
        (machine.fakes / "SLEEP").unlink()
        if running(process):
            os.kill(process, signal.SIGKILL)


def test_tpu_vm_install_trains_nothing(machine: Machine, checkout: Path) -> None:
    result = machine.run("launch/tpu_vm.sh", "install", *PLACE, cwd=checkout)
    assert result.returncode == 0, result.stderr
    remote = machine.remote_home / "llamapro_jax"
    assert (remote / "configs" / "tiny.yaml").exists()
    assert machine.installs()[0].endswith(f"--editable {remote}[tpu]")
    assert not (remote / "train.pid").exists()


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")
        # A process nobody waited for is a zombie: ended.
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_tpu_vm_refuses_one_without_workers(machine: Machine, checkout: Path) -> None:
    arguments = [*PLACE, "--config", "configs/tiny.yaml"]
    result = machine.run("launch/tpu_vm.sh", *arguments, cwd=checkout, ADDRESSES="")
    assert result.returncode == 2
    assert "has no worker yet" in result.stderr
    assert [call.split()[4] for call in gcloud_calls(machine)] == ["describe"]


def test_tpu_vm_trains_on_every_worker_of_a_slice(machine: Machine, checkout: Path) -> None:
    (machine.fakes / "SLEEP").touch()
    two = {"ADDRESSES": "10.0.0.2;10.0.0.3"}
    start = ["launch/tpu_vm.sh", *PLACE, "--config", "configs/tiny.yaml"]
    homes = [machine.remote_home, machine.remote_home.with_name("remote-1")]
    processes: list[int] = []
    try:
        result = machine.run(*start, cwd=checkout, **two)
        assert result.returncode == 0, result.stderr
        assert "several workers (10.0.0.2;10.0.0.3): model, data and output" in result.stdout
        processes += [int((home / "llamapro_jax/train.pid").read_text()) for home in homes]
        assert len(set(processes)) == 2 and all(map(running, processes))
        for home in homes:
            wait_for((home / "llamapro_jax/train.log").read_text, "no output")
        assert [line.split("--editable ")[1] for line in machine.installs()] == [
            f"{home}/llamapro_jax[tpu]" for home in homes
        ]
        one = machine.run("launch/tpu_vm.sh", "logs", *PLACE, "--worker", "1", cwd=checkout, **two)
        assert one.stdout == "training\n"
        second = machine.run(*start, cwd=checkout, **two)
        assert second.returncode == 1 and "a training run is under way" in second.stderr
        stop = machine.run("launch/tpu_vm.sh", "stop", *PLACE, cwd=checkout, **two)
        assert stop.stdout == "".join(f"stopping process {process}\n" for process in processes)
        wait_for(lambda: not any(map(running, processes)), "the run did not end")
    finally:
        (machine.fakes / "SLEEP").unlink()
        for process in filter(running, processes):
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zone", "z", "--config", "configs/tiny.yaml"], "--name is missing"),
        (["--name", "n", "--config", "configs/tiny.yaml"], "--zone is missing"),
        (PLACE, "--config is missing"),
        ([*PLACE, "--config", "configs/absent.yaml"], "configs/absent.yaml: no such file"),
        ([*PLACE, "--config", "../outside.yaml"], "is outside"),
        ([*PLACE, "--workers", "0"], "unknown option --workers"),
        (["stop", *PLACE, "--worker", "0"], "--worker belongs to logs"),
        ([*PLACE, "--config"], "--config needs a value"),
        ([*PLACE, "--follow", "--config", "configs/tiny.yaml"], "--follow belongs to logs"),
        (["stop", *PLACE, "--config", "configs/tiny.yaml"], "--config belongs to train"),
        (["logs", *PLACE, "a=b"], "logs takes no a=b"),
        (["lgos", *PLACE], "lgos: is neither train, install, logs or stop"),
        ([*PLACE, "--config", "configs/tiny.yaml", "a=b", "--dry-run"], "options come first"),
        (["install", *PLACE, "--config", "configs/tiny.yaml"], "--config belongs to train"),
    ],
)
def test_tpu_vm_refuses(
    machine: Machine, checkout: Path, arguments: list[str], message: str
) -> None:
    (checkout.parent / "outside.yaml").touch()
    result = machine.run("launch/tpu_vm.sh", *arguments, cwd=checkout)
    assert result.returncode == 2
    assert message in result.stderr
    assert machine.record() == []


# --- slurm_gpu.sh -------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "77"}


@pytest.fixture
def cluster(machine: Machine, checkout: Path) -> Path:
    """A checkout with an environment, where `srun` ends with $STATUS."""
    machine.put("srun", '#!/usr/bin/env bash\necho "srun $*" >>"$RECORD"\nexit "${STATUS:-0}"\n')
    machine.put("scontrol", '#!/usr/bin/env bash\necho "scontrol $*" >>"$RECORD"\n')
    result = machine.run(
        "launch/local.sh", "--accelerator", "cuda12", "--install-only", cwd=checkout
    )
    assert result.returncode == 0, result.stderr
    return checkout


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (42, True)])
def test_slurm_trains_and_goes_back_into_the_queue_when_it_was_stopped(
    machine: Machine, cluster: Path, status: int, requeued: bool
) -> None:
    # As Slurm does, run a copy.
    copy = shutil.copy(cluster / "launch/slurm_gpu.sh", machine.directory / "slurm_script")
    result = machine.run(
        copy, "configs/tiny.yaml", "output=a b", cwd=cluster, STATUS=str(status),
        SLURM_SUBMIT_DIR=str(cluster), **SLURM,
    )  # fmt: skip
    assert result.returncode == status, result.stderr
    program = cluster / ".venv-cuda12/bin/llamapro"
    assert f"srun {program} train configs/tiny.yaml output=a b" in machine.record()
    assert ("scontrol requeue 77" in machine.record()) == requeued


def test_slurm_asks_for_gpus_by_node_and_for_a_signal() -> None:
    head = (ROOT / "launch/slurm_gpu.sh").read_text().partition("set -euo")[0]
    for option in ("gres=gpu:8", "ntasks-per-node=8", "signal=TERM@300", "requeue"):
        assert f"#SBATCH --{option}\n" in head
    assert "gpus-per-task" not in head


def test_slurm_dry_run_runs_nothing(machine: Machine, cluster: Path) -> None:
    before = machine.record()
    result = machine.run("launch/slurm_gpu.sh", "--dry-run", "configs/tiny.yaml", cwd=cluster)
    assert result.stdout.strip().endswith("bin/llamapro train configs/tiny.yaml")
    assert machine.record() == before


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], SLURM, "CONFIG is missing"),
        (["configs/absent.yaml"], SLURM, "configs/absent.yaml: no such configuration file"),
        (["--nodes=2", "configs/tiny.yaml"], SLURM, "unknown option --nodes=2"),
        (["configs/tiny.yaml"], {}, "this is no Slurm job; submit it: sbatch"),
        (["configs/tiny.yaml"], {**SLURM, "VENV": "none"}, "none/bin/llamapro: no such program"),
        (["configs/tiny.yaml"], {**SLURM, "SLURM_SUBMIT_DIR": "/"}, "/ is no checkout"),
    ],
)
def test_slurm_refuses(
    machine: Machine,
    cluster: Path,
    arguments: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    result = machine.run("launch/slurm_gpu.sh", *arguments, cwd=cluster, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert not any(line.startswith("srun") for line in machine.record())


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
    assert any("[test,tpu]" in install for install in machine.installs())


def test_ci_with_only_a_newer_python_runs_all_on_it(machine: Machine, ci: Path) -> None:
    for name in ("python3", "python3.11"):
        machine.put(name, OLD_PYTHON)
    result = machine.run(ci, PYENV_ROOT=str(machine.directory))
    assert result.returncode == 0, result.stderr
    only, compiled = pytest_calls(machine)
    assert "slow" not in only
    assert compiled == "python -m pytest tests/compiled"
    assert any("[test,tpu]" in install for install in machine.installs())


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
