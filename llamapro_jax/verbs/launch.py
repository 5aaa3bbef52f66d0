"""Print what launches a run on a cluster: the manifest for GKE, the command for xpk.

Nothing is started and no cluster is asked: the configuration, the machine and the paths are
checked, and the text is printed, with the commands to start, watch and stop the run in comments.
launch/README.md has the way from nothing to a run, and all other places.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamapro_jax.launch.job import Job

HELP = "print what starts a run on GKE or with xpk"
EXAMPLE = """\
llamapro launch gke configs/llama2_7b_pro.yaml topology=v5p-128 --image IMAGE:1.0 --claim my-files
llamapro launch xpk configs/llama2_7b_pro.yaml topology=2xv6e-64 --image IMAGE:1.0 --cluster mine"""

TOPOLOGY = "topology="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    places = parser.add_subparsers(
        dest="place", metavar="PLACE", required=True, help="gke or xpk; each has its --help"
    )
    gke = places.add_parser("gke", help="a manifest for GKE with JobSet: TPUs, H100, H200, B200")
    _common(gke)
    gke.add_argument("--claim", metavar="NAME", help="PersistentVolumeClaim to mount at /data")
    gke.add_argument("--bucket", metavar="NAME", help="bucket to mount at /data instead")
    gke.add_argument("--namespace", metavar="NAME", default="default", help="default: default")
    gke.add_argument("--service-account", metavar="NAME", help="of Kubernetes, for the bucket")
    gke.add_argument("--output", metavar="FILE", help="write the manifest there")
    xpk = places.add_parser("xpk", help="the command that starts it on a cluster of xpk: TPUs")
    _common(xpk)
    xpk.add_argument("--cluster", metavar="NAME", required=True, help="the cluster that xpk made")
    xpk.add_argument("--storage", metavar="NAME", help="storage attached by xpk at /data")
    xpk.add_argument("--zone", metavar="ZONE", help="of the cluster; default: gcloud's")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides",
        metavar="topology=NAME | key.path=value",
        nargs="*",
        help="the machine, as `llamapro plan` names it; a setting that differs from CONFIG",
    )
    parser.add_argument(
        "--image", metavar="IMAGE:TAG", required=True, help="made from launch/Dockerfile.*"
    )
    parser.add_argument("--name", metavar="NAME", help="of the job; default: that of the output")
    parser.add_argument("--spot", action="store_true", help="on spot machines")
    parser.add_argument("--reservation", metavar="NAME", help="on reserved machines")
    parser.add_argument(
        "--max-restarts", metavar="N", type=int, default=100, help="after failures; default: 100"
    )
    parser.add_argument(
        "--grace", metavar="SECONDS", type=int, default=600, help="to save when stopped; 600"
    )
    parser.add_argument(
        "--plan", action="store_true", help="compile first: refuse what does not fit, say how fast"
    )


def run(args: argparse.Namespace) -> int:
    from llamapro_jax.errors import UserError
    from llamapro_jax.files import atomic_write
    from llamapro_jax.launch.job import job

    names = [o.removeprefix(TOPOLOGY) for o in args.overrides if o.startswith(TOPOLOGY)]
    if len(names) != 1:
        raise UserError(
            f"topology: is given {len(names)} times; give it once, such as topology=v5p-128."
        )
    overrides = [o for o in args.overrides if not o.startswith(TOPOLOGY)]
    common = ("image", "name", "spot", "reservation", "max_restarts", "grace")
    options = {name: getattr(args, name) for name in common}
    if args.place == "gke":
        more = ("claim", "bucket", "namespace", "service_account")
        options |= {name: getattr(args, name) for name in more}
    else:
        # What xpk mounts, it mounts by a name of its own.
        options["claim"] = args.storage
    found = job(args.config, overrides, names[0], **options)
    found = with_plan(found) if args.plan else found
    if args.place == "xpk":
        from llamapro_jax.launch import xpk

        print_xpk(found, xpk.command(found, args.cluster, args.storage, args.zone))
        return 0

    from llamapro_jax.launch.jobset import render

    text = render(found, args.output or f"{found.name}.yaml")
    if args.output is None:
        sys.stdout.write(text)
    else:
        atomic_write(args.output, text.encode())
        print(f"wrote {args.output}; kubectl apply --filename {shlex.quote(args.output)}")
    return 0


def print_xpk(job: Job, words: list[str]) -> None:
    where = [word for word in words if word.startswith(("--cluster=", "--zone="))]
    workload = f"--workload={job.name}"
    print(f"# {job.spoken}\n# on {job.nodes.machine.name}: {job.nodes.description}")
    for hint in job.hints:
        print(f"# {hint}")
    print(
        f"# watch  {shlex.join(['xpk', 'workload', 'list', *where, f'--filter-by-job={job.name}'])}"
    )
    print(f"# stop   {shlex.join(['xpk', 'workload', 'delete', workload, *where])}")
    print(shlex.join(words))


def with_plan(job: Job) -> Job:
    """The job, with what `plan` says of it. Raises UserError when it does not fit."""
    from dataclasses import replace

    from llamapro_jax.errors import UserError
    from llamapro_jax.machines import GIB, parse_machine
    from llamapro_jax.topology import prepare_environment

    machine = parse_machine(job.nodes.machine.name)
    prepare_environment(machine)

    from llamapro_jax.architecture import of_run
    from llamapro_jax.capacity import assess

    found = assess(job.config, *of_run(job.config), machine, lambda line: None)
    peak, memory = found.peak_bytes / GIB, found.hbm_bytes / GIB
    if not found.fits:
        raise UserError(
            f"topology: {machine.name}: needs {peak:.1f} GiB of each device's {memory:.1f}. "
            f"It fits with: {'; '.join(found.advice) or 'none of the machines tried'}."
        )
    hints = [f"{peak:.1f} of {memory:.1f} GiB of each device (llamapro plan)"]
    if found.seconds is not None:
        rate = found.tokens_per_step / found.seconds.roofline
        hints.append(
            f"at most {rate:,.0f} tokens/s, {found.days():.1f} days; at half of it, as good runs "
            f"reach, {rate / 2:,.0f} tokens/s, {found.days(0.5):.1f} days"
        )
    saved = 12 * found.trainable_parameters
    hints.append(
        f"a save writes {saved / 1e9:.1f} GB: in {job.grace} s if the storage takes "
        f"{saved / job.grace / 1e6:.0f} MB/s"
    )
    return replace(job, hints=tuple(hints))
