"""A job under Slurm's script and in a JobSet: trains, is preempted, requeued, goes on, and ends.

What is not here is played: `srun`, `scontrol`, the kubelet and the JobSet controller. The script,
the manifest, the processes, their meeting, the signals and the exit codes are real.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from manifests import action, documents, pod, rendered
from runs import assert_same_run, overrides, settings, write_model, write_texts

from llamapro_jax.checkpoint_files import committed_steps
from llamapro_jax.launch.surroundings import free_port

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
CHANGES = {
    "training.steps": STEPS,
    "training.log_every": 1,
    "training.eval_every": None,
    "data.eval": [],
    "training.save_every": 4,
    "training.keep": 5,
    "mesh.fsdp": 2,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("jobs")
    write_model(directory)
    write_texts(directory / "texts")
    return directory


def around(**more: str) -> dict[str, str]:
    """The environment of a machine with one CPU device."""
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = " ".join(flag for flag in given if "device_count" not in flag)
    changed = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return {**os.environ, **changed, **more}


def write_config(file: Path, work: Path, output: str) -> list[str]:
    """A configuration, and the settings that a job changes on its command line."""
    values = settings(Path("model"), Path("texts"), Path(output)) | CHANGES
    file.write_text("{}\n")
    return overrides(values)


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    """Two processes of the local launcher, which nobody stops."""
    given = write_config(work / "undisturbed.yaml", work, "runs/undisturbed")
    launcher = [sys.executable, "-m", "llamapro_jax.launch.local", "--processes", "2", "--"]
    done = subprocess.run(
        [*launcher, "train", "undisturbed.yaml", *given],
        cwd=work,
        env=around(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return work / "runs/undisturbed"


def wait_for_step(run: Path, step: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 900
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step}' in metrics.read_text()):
        assert all(process.poll() is None for process in processes), "ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_stopped_between(run: Path) -> None:
    [step] = committed_steps(run / "checkpoints")[-1:]
    assert 2 <= step < STEPS


# ------------------------------------------------------------------- Slurm

SRUN = """\
#!{python}
import os, pathlib, signal, subprocess, sys
tasks = []
def pass_on(number, frame):
    for task in tasks:
        # As Slurm: all processes of the task.
        os.killpg(task.pid, number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, pass_on)
for index in range(2):
    step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
             "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}}
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | step, start_new_session=True))
pathlib.Path(os.environ["STEP"]).write_text(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


class Slurm:
    """A job of two tasks, in a directory that is a checkout as far as the script sees."""

    def __init__(self, work: Path, directory: Path) -> None:
        self.work, self.directory = work, directory
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        self.requeued = directory / "requeued"
        self.put("srun", SRUN.format(python=sys.executable))
        self.put("scontrol", f'#!/usr/bin/env bash\necho "$*" >>"{self.requeued}"\n')
        self.put("python", f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
        shutil.copy(ROOT / "pyproject.toml", work)
        shutil.copy(ROOT / "launch/slurm.sbatch", directory / "slurm_script")

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, number: int, requeues: int, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.directory / "slurm_script"), *arguments],
            cwd=self.work,
            env=around(
                PATH=f"{self.bin}:{os.environ['PATH']}",
                VENV=str(self.directory),
                STEP=str(self.directory / "step"),
                SLURM_JOB_ID=str(number),
                SLURM_RESTART_COUNT=str(requeues),
                SLURM_SUBMIT_DIR=str(self.work),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def signal(self, number: int) -> None:
        """To the job's step, as Slurm sends it."""
        os.kill(int((self.directory / "step").read_text()), number)


def job_number() -> int:
    """Of a job whose coordinator's port, which jax derives from it, is free."""
    for number in range(4096):
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", 65535 - 4095 + (number + os.getpid()) % 4096))
            except OSError:
                continue
            return (number + os.getpid()) % 4096 + 4096
    raise AssertionError("no free port")


def test_a_slurm_job_is_preempted_requeued_and_ends_with_the_same_bits(
    work: Path, undisturbed: Path, tmp_path: Path
) -> None:
    slurm, run = Slurm(work, tmp_path), work / "runs/slurm"
    given = write_config(work / "slurm.yaml", work, "runs/slurm")
    number = job_number()

    job = slurm.start(number, 0, "slurm.yaml", *given)
    try:
        wait_for_step(run, 2, [job])
    except BaseException:
        slurm.signal(signal.SIGQUIT)
        raise
    slurm.signal(signal.SIGTERM)
    output = job.communicate(timeout=900)[0]
    assert job.returncode == 42, output
    assert output.count("stopped, saved at step") == 1 and "Slurm, number 1" in output
    assert slurm.requeued.read_text() == f"requeue {number}\n"
    assert_stopped_between(run)

    job = slurm.start(number, 1, "slurm.yaml", *given)
    output = job.communicate(timeout=900)[0]
    assert job.returncode == 0, output
    assert "going on from step" in output
    assert slurm.requeued.read_text() == f"requeue {number}\n"
    assert_same_run(run, undisturbed, STEPS)


# ------------------------------------------------------------------- JobSet


class Cluster:
    """Pods of a JobSet of two GPU nodes, as processes: what the manifest says, on this machine.

    In place of the cluster's: the coordinator's name, the mount points, the accelerator.
    """

    def __init__(self, manifest: str, data: Path, etc: Path) -> None:
        config_map, self.job_set = documents(manifest)
        etc.mkdir()
        for name, text in config_map["data"].items():
            (etc / name).write_text(text)
        [self.trainer] = pod(self.job_set)["containers"]
        self.data, self.etc = data, etc
        self.attempts = 0
        mounts = {mount["name"]: mount["mountPath"] for mount in self.trainer["volumeMounts"]}
        assert self.trainer["workingDir"] == mounts["data"]
        self.places = {mounts["data"]: str(data), mounts["config"]: str(etc)}

    def here(self, text: str) -> str:
        for place, path in self.places.items():
            if text == place or text.startswith(f"{place}/"):
                return path + text.removeprefix(place)
        return text

    def environment(self, index: int, port: int) -> dict[str, str]:
        found = {}
        for entry in self.trainer["env"]:
            if "valueFrom" in entry:
                path = entry["valueFrom"]["fieldRef"]["fieldPath"]
                if entry["name"] == "LLAMAPRO_RESTARTS":
                    assert path == "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
                    found[entry["name"]] = str(self.attempts)
                    continue
                assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
                found[entry["name"]] = str(index)
            else:
                found[entry["name"]] = self.here(entry["value"])
        name = self.job_set["metadata"]["name"]
        assert found["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-train-0-0.{name}:")
        del found["LD_LIBRARY_PATH"]
        return around(**found) | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_PLATFORMS": "cpu",
        }

    def run(
        self, meanwhile: Callable[[list[subprocess.Popen[str]]], None]
    ) -> tuple[list[int], str]:
        """One attempt: the pods' exit codes, and what they said."""
        job = self.job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
        python, *arguments = [self.here(word) for word in self.trainer["args"]]
        assert python == "python"
        port = free_port()
        pods = [
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.data,
                env=self.environment(index, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(job["completions"])
        ]
        try:
            meanwhile(pods)
            output = "".join(one.communicate(timeout=900)[0] for one in pods)
        finally:
            for one in pods:
                one.kill()
        self.attempts += 1
        return [one.returncode for one in pods], output


def test_a_jobset_is_preempted_restarted_and_ends_with_the_same_bits(
    work: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = work / "runs/jobset"
    write_config(work / "jobset.yaml", work, "runs/jobset")
    # Everything in the file, which travels in the manifest.
    values = settings(Path("model"), Path("texts"), Path("runs/jobset")) | CHANGES
    nested: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        *section, name = path.split(".")
        (nested.setdefault(section[0], {}) if section else nested)[name] = value  # type: ignore
    (work / "jobset.yaml").write_text(yaml.safe_dump(nested))
    manifest = rendered(work / "jobset.yaml", "h200-16", "training.keep=4")
    cluster = Cluster(manifest, work, tmp_path / "etc")

    def preempt(pods: list[subprocess.Popen[str]]) -> None:
        wait_for_step(run, 2, pods)
        for one in pods:
            one.send_signal(signal.SIGTERM)

    codes, output = cluster.run(preempt)
    assert codes == [42, 42], output
    assert "explicit settings, process 1 of 2" in output
    restarts = "RestartJobSetAndIgnoreMaxRestarts"
    assert [action(cluster.job_set, code) for code in codes] == [restarts, restarts]
    assert_stopped_between(run)

    codes, output = cluster.run(lambda pods: None)
    assert codes == [0, 0], output
    assert "going on from step" in output
    assert_same_run(run, undisturbed, STEPS)
    # A node that went away once more, after the end: nothing is trained twice.
    codes, output = cluster.run(lambda pods: None)
    assert codes == [0, 0], output
    assert_same_run(run, undisturbed, STEPS)
