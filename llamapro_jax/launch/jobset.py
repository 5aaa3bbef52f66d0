"""The manifest of a run on GKE: a ConfigMap with its configuration, and a JobSet.

https://jobset.sigs.k8s.io; one template, `jobset.yaml.j2`. Every host of a slice, and every GPU
node, is one pod with one process. GKE tells the pods of TPUs where the others are; those of GPUs
are told here.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import jinja2

from llamapro_jax.exit_codes import PREEMPTED
from llamapro_jax.launch.entry import RESTARTS
from llamapro_jax.launch.job import CONFIG, DATA, RESTARTED, Job
from llamapro_jax.launch.nodes import Nodes
from llamapro_jax.launch.surroundings import ADDRESS, COUNT

_TEMPLATE = Path(__file__).with_name("jobset.yaml.j2")
_PORT = 8476
_BUCKET_OPTIONS = "implicit-dirs,uid=1000,gid=1000"
_SHARED_MEMORY = {
    "name": "shared-memory",
    "path": "/dev/shm",
    "source": "emptyDir: {medium: Memory}",
}


def render(job: Job, file: str) -> str:
    """The manifest, with the commands to use it, as `file`, in comments."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    template = environment.from_string(_TEMPLATE.read_text())
    nodes = job.nodes
    rendered = template.render(
        job=job,
        nodes=nodes,
        file=file,
        node_pool=shlex.join(node_pool(job)),
        select=f"--selector jobset.sigs.k8s.io/jobset-name={job.name}",
        config=job.config_path.read_text().rstrip("\n"),
        preempted=PREEMPTED,
        restarts=RESTARTS,
        restarted=list(RESTARTED),
        annotations=_annotations(job),
        selector=_selector(job),
        environment=_environment(job),
        several_gpu_nodes=nodes.topology is None and nodes.hosts > 1,
        # The bucket's driver cannot sign in from the host's network.
        host_network=nodes.slices > 1 and job.bucket is None,
        volumes=_volumes(job),
        daemon_volumes=_daemon_volumes(nodes),
        data=DATA,
    )
    return rendered.rstrip("\n") + "\n"


def node_pool(job: Job) -> list[str]:
    """The command that makes the nodes, once; of several slices, once for each."""
    nodes = job.nodes
    words = ["gcloud", "container", "node-pools", "create", job.name, "--cluster=CLUSTER"]
    words += ["--location=LOCATION", f"--machine-type={nodes.machine_type}"]
    words += [f"--num-nodes={nodes.hosts}"]
    if nodes.topology and nodes.hosts > 1:
        words += [f"--tpu-topology={nodes.topology}"]
    if job.spot:
        words += ["--spot"]
    if job.reservation:
        words += ["--reservation-affinity=specific", f"--reservation={job.reservation}"]
    return words


def _selector(job: Job) -> dict[str, str]:
    selector = dict(job.nodes.labels)
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if job.reservation:
        selector["cloud.google.com/reservation-name"] = job.reservation
    return selector


def _environment(job: Job) -> dict[str, str]:
    nodes = job.nodes
    accelerator = "tpu" if nodes.topology else "cuda"
    found = {
        # Named, so that jax stops when it cannot start the accelerator.
        "JAX_PLATFORMS": f"{accelerator},cpu",
        # Compiled programs outlive the pod.
        "XDG_CACHE_HOME": f"{DATA}/.cache",
    }
    if nodes.topology is None and nodes.hosts > 1:
        found[ADDRESS] = f"{job.name}-train-0-0.{job.name}:{_PORT}"
        found[COUNT] = str(nodes.hosts)
    if nodes.network:
        libraries = "/usr/local/nvidia/lib64"
        found["NCCL_LIB_DIR"] = libraries
        found["LD_LIBRARY_PATH"] = libraries
    if nodes.network == "tcpxo":
        found["NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY"] = "/dev/aperture_devices"
    return found


def _annotations(job: Job) -> dict[str, str]:
    found = {}
    if job.bucket:
        found["gke-gcsfuse/volumes"] = "true"
    if networks := job.nodes.networks:
        named = enumerate(["default", *networks])
        found["networking.gke.io/default-interface"] = "eth0"
        found["networking.gke.io/interfaces"] = json.dumps(
            [{"interfaceName": f"eth{number}", "network": network} for number, network in named]
        )
    if job.nodes.network == "tcpxo":
        devices = [*(f"nvidia{gpu}" for gpu in range(8)), "nvidiactl", "nvidia-uvm"]
        found["devices.gke.io/container.tcpxo-daemon"] = "".join(
            f"- path: /dev/{device}\n" for device in [*devices, "dmabuf_import_helper"]
        )
    return found


def _host(name: str, path: str, on_host: str) -> dict[str, str]:
    return {"name": name, "path": path, "source": f"hostPath: {{path: {on_host}}}"}


def _volumes(job: Job) -> list[dict[str, str]]:
    """What the trainer mounts: name, path there, source."""
    found = [
        {
            "name": "config",
            "path": str(Path(CONFIG).parent),
            "source": f"configMap: {{name: {job.name}}}",
        }
    ]
    source = "emptyDir: {}"
    if job.claim:
        source = f"persistentVolumeClaim: {{claimName: {job.claim}}}"
    elif job.bucket:
        source = (
            "csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: "
            f'{job.bucket}, mountOptions: "{_BUCKET_OPTIONS}"}}}}'
        )
    found.append({"name": "data", "path": DATA, "source": source})
    if job.nodes.topology is None:
        found.append(_SHARED_MEMORY)
    if job.nodes.network:
        found.append(_host("nvidia", "/usr/local/nvidia", "/home/kubernetes/bin/nvidia"))
    if job.nodes.network == "rdma":
        found.append(_host("gib", "/usr/local/gib", "/home/kubernetes/bin/gib"))
    if job.nodes.network == "tcpxo":
        found.append(_host("aperture", "/dev/aperture_devices", "/dev/aperture_devices"))
    return found


def _daemon_volumes(nodes: Nodes) -> list[dict[str, str]]:
    if nodes.network != "tcpxo":
        return []
    return [_host("sys", "/hostsysfs", "/sys"), _host("proc-sys", "/hostprocsysfs", "/proc/sys")]
