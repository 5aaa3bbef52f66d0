"""Why a process joins others, how errors travel, and the launcher of a pod in small."""

from __future__ import annotations

import http.server
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamapro_jax.errors import UserError
from llamapro_jax.launch import local, processes
from llamapro_jax.launch.processes import Join, reason_to_join

ROOT = Path(local.__file__).parents[2]
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


# ------------------------------------------------------------------- reasons


def test_alone_there_is_no_reason_to_join() -> None:
    assert reason_to_join({}) is None
    assert reason_to_join({**SLURM, "SLURM_NTASKS": "1"}) is None
    # The script of a batch job: no step, so no task of it.
    assert reason_to_join({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}) is None


def test_explicit_settings_win_and_slurm_finds_its_own() -> None:
    assert reason_to_join(EXPLICIT) == Join("explicit settings", "10.0.0.2:8476", 4, 3)
    assert reason_to_join({**SLURM, **EXPLICIT}) == Join("explicit settings", "10.0.0.2:8476", 4, 3)
    assert reason_to_join(SLURM) == Join("Slurm")
    # jax reads the address itself and asks Slurm for the rest.
    address = {"JAX_COORDINATOR_ADDRESS": "node1:99"}
    assert reason_to_join({**SLURM, **address}) == Join("Slurm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_NUM_PROCESSES": ""}, "JAX_PROCESS_ID are set, but not JAX_NUM_PROCESSES. Set all"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "'10.0.0.2' is not host:port of process 0"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: 'two' is not a whole number"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID: 4 is not between 0 and 3"),
    ],
)
def test_wrong_explicit_settings_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reason_to_join({**EXPLICIT, **changes})


def test_several_cpu_devices_are_a_group_of_one() -> None:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    join = reason_to_join(flags)
    assert join is not None and (join.count, join.index, join.alone) == (1, 0, True)
    assert reason_to_join({"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}) is not None
    assert reason_to_join({**flags, "JAX_PLATFORMS": "cuda"}) is None
    one = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    assert reason_to_join(one) is None


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of a TPU VM, which at first is out of order so many times."""

    values: dict[str, str] = {}
    failures = 0

    def do_GET(self) -> None:
        value = self.values.get(self.path.rsplit("/", 1)[1])
        known = value is not None and self.headers["Metadata-Flavor"] == "Google"
        if Metadata.failures > 0:
            Metadata.failures -= 1
            self.send_response(503)
        else:
            self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write((value or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def tpu_vm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    monkeypatch.setattr(processes, "_METADATA_PAUSES", (0, 0))
    monkeypatch.setattr(Metadata, "failures", 0)
    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("endpoints", "tpu_env", "reason"),
    [
        ("unknown:unknown:10.0.0.2", "", None),
        ("a:0:10.0.0.2,b:1:10.0.0.3", "", "TPU VM, a TPU slice of 2 hosts"),
        ("10.0.0.2", "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n", "TPU VM, 2 TPU slices of 1 host"),
        ("10.0.0.2,10.0.0.3", "MEGASCALE_NUM_SLICES: '4'", "TPU VM, 4 TPU slices of 2 hosts"),
        ("10.0.0.2", "MEGASCALE_NUM_SLICES: '1'\n", None),
    ],
)
def test_a_tpu_vm_knows_its_slice(
    tpu_vm: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    endpoints: str,
    tpu_env: str,
    reason: str | None,
) -> None:
    values = {"worker-network-endpoints": endpoints, "tpu-env": tpu_env}
    monkeypatch.setattr(Metadata, "values", values)
    assert reason_to_join(tpu_vm) == (None if reason is None else Join(reason))
    assert reason_to_join({**tpu_vm, "JAX_PLATFORMS": "cpu"}) is None
    assert reason_to_join({**tpu_vm, "TPU_SKIP_MDS_QUERY": "1"}) is None


def test_a_metadata_server_that_fails_is_asked_again(
    tpu_vm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metadata, "values", {"worker-network-endpoints": "10.0.0.2,10.0.0.3"})
    monkeypatch.setattr(Metadata, "failures", 2)
    assert reason_to_join(tpu_vm) == Join("TPU VM, a TPU slice of 2 hosts")
    monkeypatch.setattr(Metadata, "failures", 9)
    with pytest.raises(UserError, match="does not answer: HTTP Error 503.*TPU_SKIP_MDS_QUERY=1"):
        reason_to_join(tpu_vm)


def test_a_tpu_outside_of_googles_cloud_is_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    assert reason_to_join({"GCE_METADATA_IP": "metadata.invalid"}) is None


GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job",
}


def test_gke_names_the_workers(tpu_vm: dict[str, str]) -> None:
    def join(found: dict[str, str]) -> Join | None:
        return reason_to_join({**tpu_vm, **found})

    assert join(GKE) == Join("GKE, a TPU slice of 2 hosts")
    assert join({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert join({**GKE, **SLICES}) == Join("GKE, 2 TPU slices of 2 hosts")
    one = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert join({**one, **SLICES}) == Join("GKE, 2 TPU slices of 1 host")
    # Where it has both, the addresses with ports are those of a later version.
    assert join({**one, "TPU_PROCESS_ADDRESSES": "a:1,b:1"}) == Join("GKE, a TPU slice of 2 hosts")


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID"),
        (
            {**GKE, "MEGASCALE_NUM_SLICES": "2"},
            "MEGASCALE_SLICE_ID and MEGASCALE_COORDINATOR_ADDRESS",
        ),
    ],
)
def test_what_gke_left_out_is_named(
    tpu_vm: dict[str, str], found: dict[str, str], missing: str
) -> None:
    with pytest.raises(UserError, match=f"but {missing} is not set"):
        reason_to_join({**tpu_vm, **found})


def test_the_pods_of_a_gpu_jobset_have_explicit_settings() -> None:
    """As a JobSet's manifest sets them from the index of the pod; Kubernetes sets the rest."""
    pod = {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": "1",
        "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:8476",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    expected = Join("explicit settings", "run-workers-0-0.run:8476", 2, 1)
    assert reason_to_join(pod) == expected


# ------------------------------------------------------------------- speaking


def two(script: str, tmp_path: Path) -> list[tuple[int, str, str]]:
    """Status, output and errors of two joined processes that run `script`."""
    (tmp_path / "script.py").write_text(
        "import sys, time\n"
        "from llamapro_jax.launch import processes\n"
        "from llamapro_jax.errors import UserError\n"
        "def body(first):\n" + "".join(f"    {line}\n" for line in script.splitlines()) + "try:\n"
        "    with processes.joined():\n"
        "        body(processes.is_first())\n"
        "except UserError as error:\n"
        "    print('error:', error, file=sys.stderr)\n"
        "    sys.exit(2)\n"
    )
    port = processes.free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env={**local.environment(index, 2, 1, port), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        texts = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(running, texts, strict=True)]


def test_what_the_first_does_all_know(tmp_path: Path) -> None:
    script = """
assert processes.count() == 2
for value in ({"a": [1, None]}, "text"):
    def act():
        assert first
        time.sleep(0.5)
        return value
    assert processes.from_first(act) == value
print("done")
"""
    for status, output, errors in two(script, tmp_path):
        assert status == 0 and "done" in output, errors


def test_an_error_of_the_first_ends_all_with_one_message(tmp_path: Path) -> None:
    script = """
def act():
    raise UserError("the disk is full")
processes.from_first(act)
"""
    (status, _, errors), (other_status, _, other_errors) = two(script, tmp_path)
    assert (status, other_status) == (2, 2), other_errors
    assert "error: the disk is full" in errors and "full" not in other_errors


def test_an_error_of_another_is_told_by_the_first(tmp_path: Path) -> None:
    began = time.monotonic()
    script = """
processes._COURTESY = 1
if not first:
    raise UserError("no such model here")
time.sleep(600)
"""
    (status, _, errors), (other_status, _, other_errors) = two(script, tmp_path)
    assert (status, other_status) == (2, 2), other_errors
    assert "error: process 1 on " in errors and "no such model here" in errors
    assert "no such model" not in other_errors
    assert time.monotonic() - began < 50


def test_an_error_that_all_have_is_told_once(tmp_path: Path) -> None:
    (status, _, errors), (other_status, _, other_errors) = two(
        'raise UserError("bad mesh")', tmp_path
    )
    assert (status, other_status) == (2, 2), other_errors
    assert errors.count("bad mesh") == 1 and "bad mesh" not in other_errors


def test_a_process_that_fails_while_it_is_being_ended_leaves_once(tmp_path: Path) -> None:
    """Two threads that leave at a time abort it, when one ends Python before the other is done."""
    script = """
import threading
leave, leaving = processes._leave, threading.Event()
def slowly():
    print("leaves", flush=True)
    leaving.set()
    time.sleep(1)
    leave()
if not first:
    processes._leave = slowly
    leaving.wait()
raise UserError("bad mesh")
"""
    (status, _, _), (other_status, output, errors) = two(script, tmp_path)
    assert (status, other_status) == (2, 2), errors
    assert output.count("leaves") == 1


def test_a_bug_in_another_process_ends_the_first(tmp_path: Path) -> None:
    (status, _, errors), (other_status, _, other_errors) = two(
        "if not first: {}['key']\ntime.sleep(600)", tmp_path
    )
    assert (status, other_status) == (1, 1)
    assert "error: process 1 on " in errors and "KeyError: 'key'" in errors
    assert "Traceback" in other_errors


# ------------------------------------------------------------------- the launcher


def test_the_launcher_gives_each_process_its_place() -> None:
    base = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=3", "HOME": "/h"}
    found = local.environment(1, 2, 4, 77, base)
    assert found["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=4"
    assert found["HOME"] == "/h" and found["JAX_PLATFORMS"] == "cpu"
    assert reason_to_join(found) == Join("explicit settings", "127.0.0.1:77", 2, 1)


def test_the_launcher_has_help_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        local.main(["--help"])
    assert end.value.code == 0
    assert "--processes 2 --devices 4 --" in capsys.readouterr().out
    for arguments, message in (
        ([], "what is to run?"),
        (["--", "convert", "a", "b"], "convert: `train` alone runs on several processes"),
        (["--processes", "0", "--", "train"], "0 is not a positive whole number"),
    ):
        with pytest.raises(SystemExit) as end:
            local.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_the_launcher_shows_what_it_would_start(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--processes", "2", "--devices", "4", "--", "train", "a.yaml", "b=1"]
    assert local.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert words[-4:] == ["-m", "llamapro_jax.launch.entry", "a.yaml", "b=1"]
        assert f"JAX_PROCESS_ID={index}" in words and "JAX_NUM_PROCESSES=2" in words
    assert len(lines) == 2
    assert local.main(["--dry-run", "--", "train", "--takeover", "a.yaml"]) == 0
    assert "launch.entry --takeover a.yaml\n" in capsys.readouterr().out


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the launcher starts in place of Python: a script that is to be written."""
    file = tmp_path / "program"
    file.write_text("#!/usr/bin/env bash\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    return file


def test_the_launcher_shows_who_failed(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program.write_text(
        "#!/usr/bin/env bash\n"
        'echo "speaks $JAX_PROCESS_ID: $*"\n'
        "if ((JAX_PROCESS_ID == 1)); then echo lost >&2; exit 7; fi\n"
    )
    assert local.main(["--", "train", "a.yaml"]) == 7
    out, errors = capfd.readouterr()
    assert out == "speaks 0: -m llamapro_jax.launch.entry a.yaml\n"
    assert errors == "[1] speaks 1: -m llamapro_jax.launch.entry a.yaml\n[1] lost\n"


@pytest.mark.parametrize("status", [2, 42, 44])
def test_what_the_first_said_is_not_said_again(
    program: Path, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    program.write_text(f"#!/usr/bin/env bash\necho 'error: bad' >&2\nexit {status}\n")
    assert local.main(["--processes", "3", "--", "train", "a.yaml"]) == status
    assert capfd.readouterr().err == "error: bad\n"


def test_the_stacks_of_each_stalled_process_are_shown(
    program: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program.write_text('#!/usr/bin/env bash\necho "stack of $JAX_PROCESS_ID" >&2\nexit 43\n')
    assert local.main(["--", "train", "a.yaml"]) == 43
    assert capfd.readouterr().err == "stack of 0\n[1] stack of 1\n"


def test_the_launcher_ends_what_does_not_end(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_GRACE", 0.2)
    program.write_text(
        "#!/usr/bin/env bash\nif ((JAX_PROCESS_ID == 0)); then kill -KILL $$; fi\nexec sleep 600\n"
    )
    began = time.monotonic()
    assert local.main(["--", "train"]) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 30


def test_the_launcher_passes_signals_on(program: Path, tmp_path: Path) -> None:
    program.write_text(
        "#!/usr/bin/env bash\n"
        'trap "exit 42" TERM\n'
        f'touch "{tmp_path}/began-$JAX_PROCESS_ID"\n'
        "while true; do sleep 0.05; done\n"
    )

    def send() -> None:
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    assert local.main(["--", "train"]) == 42
