"""Training on Cloud TPU (v4 to v6e) from a workstation: queued resources of one slice or several.

  create     ask for the TPU; with --staging and CONFIG its hosts start training by themselves
  wait       until it is there
  setup      copy this checkout to all hosts and install it, to prepare models and data there
  run        the same, and start training; the connection may go. Again: goes on
  logs       the output of training
  status     how the TPU and training on its hosts stand
  supervise  all of that until the run is done: creates, starts, and after a preemption again
  stop       save and end training on all hosts
  delete     give the TPU back, with the disks of its hosts

Needs gcloud, logged in, and Python 3.11. Paths in CONFIG are paths on the hosts.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Sequence

from llamapro_jax import exit_codes
from llamapro_jax.errors import UserError
from llamapro_jax.launch import tpu_job
from llamapro_jax.launch.gcloud import Gcloud, GcloudError, Kind
from llamapro_jax.launch.queued_resource import (
    ABSENT,
    GONE,
    QueuedResource,
    Report,
    Request,
    State,
    read_reports,
)
from llamapro_jax.launch.supervisor import Patience, Supervisor

EXAMPLE = """\
example, from nothing to a run that survives preemption:
  launch/tpu.sh supervise my-v5e --zone us-west4-a --type v5litepod-16 --spot \\
    --staging gs://my-bucket/jobs configs/llama2_7b_pro.yaml output=gs://my-bucket/runs/first
"""

PATIENCE = Patience()

# ------------------------------------------------------------------- the arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/tpu.sh",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (act, groups) in VERBS.items():
        line = re.search(rf"^  {verb} +(.*)$", __doc__ or "", re.MULTILINE)
        said = line[1] if line else ""
        one = verbs.add_parser(verb, description=said[:1].upper() + said[1:])
        one.set_defaults(act=act)
        _add_place(one)
        for group in groups:
            group(one)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the queued resource, and of its slices")
    parser.add_argument("--zone", help="default: compute/zone of gcloud's configuration")
    parser.add_argument("--project", help="default: that of gcloud's configuration")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every command of gcloud, run none"
    )


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--type", required=True, help="v4-N, v5litepod-N, v5p-N or v6e-N")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--runtime-version", help="default: the one for --type")
    tier = parser.add_mutually_exclusive_group()
    for name, said in (
        ("spot", "cheap, may be taken away at any time"),
        ("reserved", "from a reservation"),
        ("guaranteed", "only where it will not be taken away"),
    ):
        tier.add_argument(f"--{name}", dest="tier", action="store_const", const=name, help=said)
    parser.add_argument(
        "--create-with",
        action="append",
        default=[],
        metavar="FLAG",
        help="one more flag of `queued-resources create`, such as --create-with=--network=mtu9k",
    )
    parser.add_argument(
        "--staging",
        metavar="gs://...",
        help="where the checkout is put for the hosts to fetch; they start by themselves at boot",
    )


def _add_ssh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ssh-with",
        action="append",
        default=[],
        metavar="FLAG",
        help="one more flag of `queued-resources ssh`, such as --ssh-with=--tunnel-through-iap",
    )


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prepare",
        default="",
        metavar="COMMAND",
        help="run as root on each host before the install and before each start of training: "
        "mounts the storage, for example. May run twice",
    )


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a run configuration in this checkout")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", help="a setting that differs from CONFIG"
    )
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="end the run that trains in the output now, and go on from its newest checkpoint",
    )


def _add_job_if_any(parser: argparse.ArgumentParser) -> None:
    """argparse gives up a positional that may be absent at the first option: see `main`."""
    parser.usage = (
        "launch/tpu.sh create NAME --type TYPE [option ...] [CONFIG [key.path=value ...]]"
    )
    parser.set_defaults(config=None, overrides=[])


def _add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="the coming lines too")
    parser.add_argument("--lines", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--node", default="0", metavar="N", help="of this slice; default: 0")
    parser.add_argument(
        "--worker",
        default="0",
        metavar="N",
        help="of this host; default: 0. The others say little but errors of theirs",
    )


def _add_poll(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--poll", type=float, default=60, metavar="SECONDS", help="between two looks; default: 60"
    )


def _add_supervise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restarts",
        type=int,
        default=PATIENCE.restarts,
        metavar="N",
        help="starts in a row without a newer step saved, until it gives up; default: %(default)s",
    )
    parser.add_argument(
        "--keep", action="store_true", help="do not delete the TPU at the end; it goes on to cost"
    )


# ------------------------------------------------------------------- the verbs


def _resource(args: argparse.Namespace) -> QueuedResource:
    gcloud = Gcloud(args.zone, args.project, args.dry_run)
    return QueuedResource(gcloud, args.name, getattr(args, "ssh_with", []))


def _request(args: argparse.Namespace) -> Request:
    return Request(args.type, args.slices, args.tier, args.runtime_version, tuple(args.create_with))


def _job(args: argparse.Namespace) -> tpu_job.Job:
    what = tpu_job.job(args.config, args.overrides, args.prepare, getattr(args, "staging", None))
    return dataclasses.replace(what, takeover=getattr(args, "takeover", False))


def create(args: argparse.Namespace) -> int:
    resource, request = _resource(args), _request(args)
    if (args.config is None) != (args.staging is None):
        raise UserError(
            "create: --staging and CONFIG come together: then the hosts start training by "
            "themselves. Without both, start it later: launch/tpu.sh run"
        )
    if args.config is None:
        if args.prepare:
            raise UserError("create: --prepare belongs to setup and run when there is no --staging")
        resource.create(request)
        return exit_codes.DONE
    what = _job(args)
    tpu_job.stage(resource, what)
    with tpu_job.startup_script(resource, what) as startup:
        resource.create(request, startup)
    return exit_codes.DONE


def wait(args: argparse.Namespace) -> int:
    resource, said, failures = _resource(args), "", 0
    while True:
        try:
            state = resource.state()
            failures = 0
        except GcloudError as error:
            failures += 1
            if error.kind is not Kind.PASSING or failures > PATIENCE.tries:
                raise
            print(f"{error.said}; asking again", file=sys.stderr)
            time.sleep(args.poll)
            continue
        text = f"{state.name}{f': {state.error}' if state.error else ''}"
        if text != said and not args.dry_run:
            print(f"{args.name} is {text}", flush=True)
            said = text
        if state.name == "ACTIVE":
            return exit_codes.DONE
        if state.name == ABSENT or state.name in GONE:
            raise UserError(
                f"{args.name} is {text}; create it again (delete it first if it exists)"
            )
        time.sleep(args.poll)


def setup(args: argparse.Namespace) -> int:
    tpu_job.setup(_resource(args), tpu_job.Job("", prepare=args.prepare))
    return exit_codes.DONE


def run(args: argparse.Namespace) -> int:
    resource, what = _resource(args), _job(args)
    tpu_job.setup(resource, what)
    tpu_job.start(resource, what)
    if not args.dry_run:
        print(f"Training runs on {args.name}. Its output: launch/tpu.sh logs {args.name} --follow")
    return exit_codes.DONE


def logs(args: argparse.Namespace) -> int:
    tpu_job.log(_resource(args), args.node, args.worker, args.lines, args.follow)
    return exit_codes.DONE


def status(args: argparse.Namespace) -> int:
    resource = _resource(args)
    state = resource.state()
    if not args.dry_run:
        print(f"{args.name} is {state.name}{f': {state.error}' if state.error else ''}")
    if state.name != "ACTIVE":
        return exit_codes.DONE
    expected = resource.hosts(state.nodes)
    reports = read_reports(tpu_job.ask(resource))
    if args.dry_run:
        return exit_codes.DONE
    print(*(f"  {report}" for report in reports), sep="\n")
    if len(reports) < expected:
        print(f"  {expected - len(reports)} of {expected} hosts did not answer")
    return exit_codes.DONE


def stop(args: argparse.Namespace) -> int:
    print(tpu_job.stop(_resource(args)), end="")
    return exit_codes.DONE


def delete(args: argparse.Namespace) -> int:
    _resource(args).delete()
    return exit_codes.DONE


class TpuCloud:
    """What the supervisor does, done to a queued resource."""

    def __init__(self, resource: QueuedResource, request: Request, what: tpu_job.Job):
        self._resource, self._request, self._job = resource, request, what
        self.starts_itself = what.staging is not None
        self._staged = False
        self.state = resource.state
        self.delete = resource.delete

    def take_over(self) -> None:
        self._job = dataclasses.replace(self._job, takeover=True)

    def create(self) -> None:
        if self.starts_itself and not self._staged:
            tpu_job.stage(self._resource, self._job)
            self._staged = True
        with tpu_job.startup_script(self._resource, self._job) as startup:
            self._resource.create(self._request, startup)

    def hosts(self, state: State) -> int:
        return self._resource.hosts(state.nodes)

    def reports(self) -> list[Report]:
        return read_reports(tpu_job.ask(self._resource))

    def setup_and_start(self) -> None:
        tpu_job.setup(self._resource, self._job)
        self.start()

    def start(self) -> None:
        tpu_job.start(self._resource, self._job)

    def last_words(self) -> str:
        return tpu_job.log(self._resource, show=False)


def supervise(args: argparse.Namespace) -> int:
    resource, what = _resource(args), _job(args)
    outputs = [o.partition("=")[2] for o in args.overrides if o.startswith("output=")]
    if not outputs or not outputs[-1].startswith(("/", "gs://")):
        raise UserError(
            "supervise: give output=gs://BUCKET/PATH, or output=/PATH on a file system that every "
            "host mounts (--prepare mounts it). A host's own disk is lost with it."
        )
    cloud = TpuCloud(resource, _request(args), what)
    if args.dry_run:
        return _rehearse(cloud, args)
    patience = dataclasses.replace(PATIENCE, poll=args.poll, restarts=args.restarts)
    try:
        return Supervisor(cloud, args.name, patience, args.keep, _say).run()
    except KeyboardInterrupt:
        print(
            f"\nstopped watching. {args.name} goes on: the same command watches it again; "
            f"launch/tpu.sh stop {args.name} ends training, delete gives the TPU back"
        )
        return exit_codes.INTERRUPTED


def _rehearse(cloud: TpuCloud, args: argparse.Namespace) -> int:
    """The commands of a life without disturbances."""
    cloud.create()
    state = cloud.state()
    cloud.hosts(state)
    cloud.reports()
    if not cloud.starts_itself:
        cloud.setup_and_start()
    if not args.keep:
        cloud.delete()
    return exit_codes.DONE


def _say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S "), text, sep="", flush=True)


Add = Callable[[argparse.ArgumentParser], None]
VERBS: dict[str, tuple[Callable[[argparse.Namespace], int], tuple[Add, ...]]] = {
    "create": (create, (_add_request, _add_prepare, _add_job_if_any)),
    "wait": (wait, (_add_poll,)),
    "setup": (setup, (_add_ssh, _add_prepare)),
    "run": (run, (_add_ssh, _add_prepare, _add_job)),
    "logs": (logs, (_add_ssh, _add_logs)),
    "status": (status, (_add_ssh,)),
    "supervise": (
        supervise,
        (_add_request, _add_ssh, _add_prepare, _add_poll, _add_supervise, _add_job),
    ),
    "stop": (stop, (_add_ssh,)),
    "delete": (delete, ()),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (args.verb != "create" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.config, args.overrides = rest[0], rest[1:]
    try:
        return args.act(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
