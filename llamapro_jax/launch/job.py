"""A run that is to be launched on a cluster: checked before anything is rendered."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from llamapro_jax.config import RunConfig, load_config
from llamapro_jax.errors import UserError
from llamapro_jax.exit_codes import worth_restarting
from llamapro_jax.launch import ENTRY
from llamapro_jax.launch.nodes import Nodes, nodes_of

# Where the pods find the storage that all of them mount, which is also where they start, and the
# configuration. docs/configuration.md: relative paths are relative to where a run starts.
DATA = "/data"
CONFIG = "/etc/llamapro/run.yaml"
_REMOTE = ("gs://", "s3://")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([-._a-z0-9]*[a-z0-9])?")
# The name of a pod, NAME-train-SLICE-HOST-XXXXX, has 63 characters at most.
_LONGEST_NAME = 40

RESTARTED = tuple(status for status in range(1, 256) if worth_restarting(status))


@dataclass(frozen=True)
class Job:
    """What to run, on what, and what to do when it ends.

    claim, bucket: the storage at DATA, a PersistentVolumeClaim or a bucket; at most one.
    max_restarts: after failures, in the whole run; being stopped and preempted does not count.
    grace: seconds from SIGTERM to SIGKILL, in which a stopped run saves.
    hints: lines of what is known of the run's speed.
    """

    name: str
    image: str
    config_path: Path
    config: RunConfig
    overrides: tuple[str, ...]
    nodes: Nodes
    claim: str | None = None
    bucket: str | None = None
    namespace: str = "default"
    service_account: str | None = None
    reservation: str | None = None
    spot: bool = False
    max_restarts: int = 100
    grace: int = 600
    hints: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not re.fullmatch(r"\S+[:@]\S+", self.image.rpartition("/")[2] or self.image):
            raise UserError(
                f"--image: {self.image!r} names no version; give one, such as {self.image}:1.0, so "
                "that a restart does not change what runs."
            )
        if self.max_restarts < 0:
            raise UserError(f"--max-restarts: {self.max_restarts} is below 0.")
        if self.grace < 30:
            raise UserError(f"--grace: {self.grace} s is too short for a save; give 30 at least.")
        if self.claim and self.bucket:
            raise UserError("--claim and --bucket: both would be mounted; give one of them.")
        if self.spot and self.reservation:
            raise UserError("--spot and --reservation: a reserved machine is no spot machine.")
        for option in ("claim", "bucket", "namespace", "service_account", "reservation"):
            value = getattr(self, option)
            if value is not None and not _OBJECT.fullmatch(value):
                raise UserError(
                    f"--{option.replace('_', '-')}: {value!r} is no name: small letters, digits, "
                    "hyphens, dots and underscores."
                )
        _check_paths(self.config, self.claim or self.bucket)

    @property
    def command(self) -> list[str]:
        """What each host runs, as far as it is the same everywhere."""
        return ["python", "-m", ENTRY, CONFIG, *self.overrides]

    @property
    def spoken(self) -> str:
        return shlex.join(["llamapro", "train", str(self.config_path), *self.overrides])


def job(path: str, overrides: list[str], topology: str, **options: object) -> Job:
    """The checked job of `llamapro launch`. Raises UserError."""
    nodes = nodes_of(topology)
    config = load_config(path, overrides)
    name = options.pop("name", None) or default_name(config)
    return Job(
        name=str(name),
        config_path=Path(path),
        config=config,
        overrides=tuple(overrides),
        nodes=nodes,
        **options,  # type: ignore[arg-type]
    )


def default_name(config: RunConfig) -> str:
    """The last part of `output`, as far as Kubernetes takes it."""
    last = config.output.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:_LONGEST_NAME].strip("-") or "llamapro"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise UserError(
            f"--name: {name!r} is no name for Kubernetes: up to {_LONGEST_NAME} small letters, "
            "digits and hyphens, a letter first."
        )


def _check_paths(config: RunConfig, mounted: str | None) -> None:
    """What is written or read must outlive a pod, and be seen by all of them."""
    data = config.data
    places = {"output": config.output, "model": config.model}
    places |= {f"data.sources.{n}.path": source.path for n, source in enumerate(data.sources)}
    places |= {f"data.eval.{n}.path": source.path for n, source in enumerate(data.eval)}
    places["data.cache_directory"] = data.cache_directory or ""
    for setting, place in places.items():
        if setting == "output" and "://" in place and not place.startswith(_REMOTE):
            raise UserError(
                f"output: {place!r}: a run writes to gs://, to s3:// (where the image has s3fs) or "
                "to a mounted path."
            )
        if place.startswith(_REMOTE):
            continue
        if place.startswith("/") and not f"{place}/".startswith(f"{DATA}/"):
            raise UserError(
                f"{setting}: {place!r} is in the container and lost with it; give a path under "
                f"{DATA}, where the storage is mounted, or a relative one: runs start in {DATA}."
            )
        if setting == "output" and mounted is None:
            raise UserError(
                f"{setting}: {place!r} needs storage that all hosts mount, since containers lose "
                "their files: give --claim NAME (a PersistentVolumeClaim), --bucket NAME, or with "
                "xpk --storage NAME."
            )
