"""What every launcher starts on every host or GPU: says where it runs, and trains.

The processes of a run find each other: a TPU slice or several (TPU VM, GKE), the tasks of `srun`,
or explicit settings (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID); without any of
them it is one process on one machine. Then it is `llamapro train`, with its exit codes
(docs/reliability.md). The same command again goes on from the last checkpoint. A job that its
cluster starts once more takes the output over, as with --takeover: of the attempt before it a
process may hang on a host that was lost, and keep its lock.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from llamapro_jax import cli, exit_codes
from llamapro_jax.errors import UserError
from llamapro_jax.launch.surroundings import reason_to_join

EXAMPLE = """\
example:
  python -m llamapro_jax.launch.entry configs/llama2_7b_pro.yaml output=gs://my-bucket/runs/first
"""

# How often the job was started before: Slurm's own, and what a JobSet's pods are told.
RESTARTS = "LLAMAPRO_RESTARTS"
_RESTARTS = ("SLURM_RESTART_COUNT", RESTARTS)


def place(environment: Mapping[str, str] = os.environ) -> str:
    """Where this process runs, in words. Raises UserError when what it finds cannot be."""
    join = reason_to_join(environment)
    if join is None:
        return "one process"
    if join.alone or join.count is None:
        # jax asks the surroundings for the number, later.
        task = environment.get("SLURM_PROCID") if join.reason == "Slurm" else None
        number = task or environment.get("TPU_WORKER_ID")
        return join.reason + (f", number {number}" if number else "")
    return f"{join.reason}, process {join.index} of {join.count}, meeting at {join.address}"


def was_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    return any(environment.get(name, "").strip("0 ") for name in _RESTARTS)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llamapro_jax.launch.entry",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration, say where, and train not"
    )
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="end the run that trains in the output directory now, and go on from its newest "
        "checkpoint",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", help="a setting that differs from CONFIG"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, one of `llamapro_jax.exit_codes`."""
    parsed = build_parser().parse_intermixed_args(arguments)
    try:
        print(f"{socket.gethostname()}: {place()}", flush=True)
        if parsed.dry_run:
            from llamapro_jax.config import load_config

            config = load_config(parsed.config, parsed.overrides)
            print(f"would train {config.model}, writing {config.output}")
            return exit_codes.DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    takeover = ["--takeover"] if parsed.takeover or was_restarted() else []
    # Before CONFIG: behind it argparse takes no settings any more.
    return cli.main(["train", *takeover, parsed.config, *parsed.overrides])


if __name__ == "__main__":
    sys.exit(main())
