"""A queued resource of Cloud TPU (v4 to v6e): one slice or several, and the hosts in them.

A request waits in Google's queue (ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING) until its slices
exist (ACTIVE). When one of them is preempted all are taken away (SUSPENDING, SUSPENDED), and the
request is of no more use: it has to be deleted and made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamapro_jax.errors import UserError
from llamapro_jax.launch.gcloud import Gcloud, GcloudError, Kind

# By the beginning of the accelerator type, as Google's table of runtime versions has them.
RUNTIME_VERSIONS = {
    "v4-": "tpu-ubuntu2204-base",
    "v5litepod-": "v2-alpha-tpuv5-lite",
    "v5p-": "v2-alpha-tpuv5",
    "v6e-": "v2-alpha-tpuv6e",
}
ABSENT = "ABSENT"
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LEAVING = ("DELETING", "SUSPENDING")
GONE = ("SUSPENDED", "FAILED")


@dataclass(frozen=True)
class Request:
    """What to ask Google for. tier: spot, reserved, guaranteed, or None for on demand."""

    accelerator: str
    slices: int = 1
    tier: str | None = None
    runtime_version: str | None = None
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.runtime_version is None and self._known() is None:
            kinds = ", ".join(f"{start}N" for start in RUNTIME_VERSIONS)
            raise UserError(
                f"--type {self.accelerator}: is none of {kinds}, so --runtime-version is needed. "
                "TPU7x and later are reached through GKE alone."
            )
        if self.slices < 1:
            raise UserError(f"--slices {self.slices}: there is one slice at least")

    def _known(self) -> str | None:
        starts = (v for start, v in RUNTIME_VERSIONS.items() if self.accelerator.startswith(start))
        return next(starts, None)

    def arguments(self, name: str) -> list[str]:
        nodes = [f"--node-id={name}"]
        if self.slices > 1:
            nodes = [f"--node-count={self.slices}", f"--node-prefix={name}"]
        return [
            f"--accelerator-type={self.accelerator}",
            f"--runtime-version={self.runtime_version or self._known()}",
            *nodes,
            *([f"--{self.tier}"] if self.tier else []),
            *self.flags,
        ]


@dataclass(frozen=True)
class State:
    """name: Google's word for it, ABSENT when there is none. nodes: of the slices."""

    name: str
    nodes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What one host says of itself. saved: the newest step that its log knows of, -1 for none."""

    host: str
    state: str
    status: int | None
    saved: int

    def __str__(self) -> str:
        ended = "" if self.status is None else f" with status {self.status}"
        saved = "" if self.saved < 0 else f", step {self.saved} saved"
        return f"{self.host}: {self.state}{ended}{saved}"


_REPORT = re.compile(r"^@llamapro (\S+) (\S+) (\d+|-) (\d+|-)\s*$", re.MULTILINE)


@dataclass
class QueuedResource:
    """ssh_flags: of `queued-resources ssh` and `scp`, such as --tunnel-through-iap."""

    gcloud: Gcloud
    name: str
    ssh_flags: Sequence[str] = ()
    _hosts: dict[tuple[str, ...], int] = field(default_factory=dict)

    def create(self, request: Request, startup: Path | None = None) -> None:
        """Returns when the request is in the queue. `startup`: a script that every host runs."""
        arguments = request.arguments(self.name)
        if startup is not None:
            arguments.append(f"--metadata-from-file=startup-script={startup}")
        self._resource("create", *arguments, "--async")

    def delete(self) -> None:
        """Returns when it and its slices are gone."""
        try:
            self._resource("delete", "--force")
        except GcloudError as error:
            if error.kind is not Kind.NOT_FOUND:
                raise
        self._hosts.clear()

    def state(self) -> State:
        try:
            answer = self._resource("describe", "--format=json", asks=True)
        except GcloudError as error:
            if error.kind is Kind.NOT_FOUND:
                return State(ABSENT)
            raise
        if self.gcloud.dry_run:
            return State("ACTIVE", (self.name,))
        try:
            found = json.loads(answer)
            specs = found.get("tpu", {}).get("nodeSpec", [])
            error = found["state"].get("failedData", {}).get("error", {}).get("message", "")
            nodes = tuple(node for spec in specs for node in _nodes(spec))
            return State(found["state"]["state"], nodes, error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # An empty or half an answer comes among good ones; whoever asks, asks again.
            raise GcloudError(
                ("describe", self.name),
                0,
                f"gcloud describes {self.name} in a way that is not understood ({error!r}): "
                f"{answer[:200]!r}",
                Kind.PASSING,
            ) from error

    def hosts(self, nodes: tuple[str, ...]) -> int:
        """How many hosts there are in all slices: slices of one request are alike."""
        if nodes not in self._hosts:
            first = nodes[0] if nodes else self.name
            command = ("tpu-vm", "describe", first, "--format=value(networkEndpoints[].ipAddress)")
            listed = self.gcloud.tpus(*command, asks=True)
            count = len([address for address in re.split(r"[;,\s]+", listed) if address])
            if self.gcloud.dry_run:
                return 1
            if count == 0 or not nodes:
                raise GcloudError(command, 0, f"{first} has no host yet")
            self._hosts[nodes] = count * len(nodes)
        return self._hosts[nodes]

    def ssh(
        self,
        command: str,
        node: str = "all",
        worker: str = "all",
        show: bool = False,
        asks: bool = False,
    ) -> str:
        """What the command printed, on all hosts.

        A status of 0 does not say that it ran on all: gcloud leaves out a slice that it cannot
        prepare. Who must know counts the answers.
        """
        where = [f"--node={node}", f"--worker={worker}"]
        given = (f"--command={command}", *where, *self.ssh_flags)
        return self._resource("ssh", *given, show=show, asks=asks)

    def copy_to_all(self, file: Path, target: str) -> None:
        """Into the home directory of who calls, on all hosts."""
        self.gcloud.tpus(
            "queued-resources", "scp", str(file), f"{self.name}:{target}",
            "--node=all", "--worker=all", *self.ssh_flags,
        )  # fmt: skip

    def _resource(self, verb: str, *arguments: str, show: bool = False, asks: bool = False) -> str:
        words = ("queued-resources", verb, self.name, *arguments)
        return self.gcloud.tpus(*words, show=show, asks=asks)


def _nodes(spec: dict) -> list[str]:
    """The slices of a part of a request, which may be written out or as a number and a prefix."""
    if "nodeId" in spec:
        return [spec["nodeId"]]
    several = spec["multisliceParams"]
    return [f"{several['nodeIdPrefix']}-{i}" for i in range(int(several["nodeCount"]))]


def read_reports(text: str) -> list[Report]:
    """The reports in what `ssh` printed, one a host, by the host's name."""
    found = {}
    for host, state, status, saved in _REPORT.findall(text):
        found[host] = Report(
            host, state, None if status == "-" else int(status), -1 if saved == "-" else int(saved)
        )
    return [found[host] for host in sorted(found)]
