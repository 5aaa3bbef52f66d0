"""The command that launches a run with xpk (github.com/AI-Hypercomputer/xpk) on its cluster.

xpk makes the cluster and the JobSet, but carries no file: the configuration is one of those that
the image holds. Its restart rules know 42 and deaths by signals, and are told of 43.
"""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from llamapro_jax.errors import UserError
from llamapro_jax.exit_codes import STALLED
from llamapro_jax.launch import ENTRY
from llamapro_jax.launch.job import DATA, Job

# Of the images made from launch/Dockerfile.*.
IMAGE_HOME = "/opt/llamapro"
_TYPES = {"v5e": "v5litepod"}


def command(job: Job, cluster: str, storage: str | None, location: str | None) -> list[str]:
    """`xpk workload create ...`. Raises UserError for what xpk cannot do."""
    nodes = job.nodes
    if nodes.topology is None:
        raise UserError(
            f"topology: {nodes.machine.name!r}: with xpk TPUs alone are covered; for GPUs use "
            "`llamapro launch gke`."
        )
    path = PurePosixPath(job.config_path)
    if path.is_absolute() or path.parts[:1] != ("configs",) or ".." in path.parts:
        raise UserError(
            f"{path}: xpk carries no file to the pods, and the image holds those in configs/: put "
            "it there, build the image anew, and run this from the checkout."
        )
    chip = nodes.machine.chip.name
    device = f"{_TYPES.get(chip, chip)}-{nodes.machine.name.rpartition('-')[2]}"
    train = ["python", "-m", ENTRY, f"{IMAGE_HOME}/{path}", *job.overrides]
    # `exec`, so that SIGTERM, which xpk's own shell passes on, reaches the run.
    words = ["xpk", "workload", "create", f"--workload={job.name}", f"--cluster={cluster}"]
    words += [f"--tpu-type={device}", f"--num-slices={nodes.slices}"]
    words += [f"--docker-image={job.image}"]
    words += [f"--command=cd {DATA} && exec {shlex.join(train)}"]
    words += [f"--max-restarts={job.max_restarts}", f"--restart-on-exit-codes={STALLED}"]
    words += [f"--termination-grace-period-seconds={job.grace}"]
    words += ["--env=JAX_PLATFORMS=tpu,cpu", f"--env=XDG_CACHE_HOME={DATA}/.cache"]
    words += [f"--storage={storage}"] if storage else []
    words += [f"--zone={location}"] if location else []
    words += ["--spot"] if job.spot else []
    words += [f"--reservation={job.reservation}"] if job.reservation else []
    return words
