"""Why a process joins others."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from llamapro_jax.errors import UserError
from llamapro_jax.launch import surroundings
from llamapro_jax.launch.surroundings import Join, reason_to_join

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
    monkeypatch.setattr(surroundings, "_has_tpu", lambda: True)
    monkeypatch.setattr(surroundings, "_METADATA_PAUSES", (0, 0))
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
    monkeypatch.setattr(surroundings, "_has_tpu", lambda: True)
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
