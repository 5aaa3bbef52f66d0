"""Whether a disturbed run has the bits of the undisturbed one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro_jax.checkpoint_files import ITEMS, committed_steps, read_meta
from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.metrics import read_metrics

# What two runs of the same bits differ in.
TIMES = ("tokens_per_second", "useful_flops_per_second", "seconds")

# Item -> leaf -> checksum.
Checksums = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to, in one process, every step of it saved."""

    directory: Path
    checksums: Mapping[int, Checksums]
    log: list[dict[str, Any]]
    final: Mapping[str, str]
    frozen: Mapping[str, int]

    @staticmethod
    def of(directory: Path) -> Undisturbed:
        steps = committed_steps(directory / "checkpoints")
        return Undisturbed(
            directory,
            {step: checksums(directory / "checkpoints" / str(step)) for step in steps},
            log_lines(directory),
            arrays(directory / "checkpoints" / str(steps[-1])),
            read_json(directory / "run.json")["frozen"],
        )

    def differs_at(self, run: Path, step: int) -> str | None:
        """What a step that a disturbed run saved has other bits of."""
        try:
            found = checksums(run / "checkpoints" / str(step))
        except UserError as error:
            return f"step {step}: {error}"
        wrong = [
            f"{item} {leaf}"
            for item, leaves in self.checksums[step].items()
            for leaf, value in leaves.items()
            if found[item].get(leaf) != value
        ]
        return f"step {step}: {', '.join(wrong[:3])} differ" if wrong else None

    def differs(self, run: Path) -> list[str]:
        """What a finished run has other bits of: every array, the log, the frozen weights."""
        steps = committed_steps(run / "checkpoints")
        if not steps or steps[-1] != max(self.checksums):
            return [f"its last step is {steps[-1:]}, not {max(self.checksums)}"]
        problems = []
        found = arrays(run / "checkpoints" / str(steps[-1]))
        problems += [name for name, digest in self.final.items() if found.get(name) != digest]
        log = log_lines(run)
        if log != self.log:
            pairs = zip(log, self.log, strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), (len(log), len(self.log)))
            problems.append(f"the log differs: {first[0]}, undisturbed {first[1]}")
        if read_json(run / "run.json")["frozen"] != self.frozen:
            problems.append("frozen weights differ")
        changed = read_json(run / "summary.json")["frozen_bits_changed"]
        return problems + ([f"{changed} frozen bits changed"] if changed else [])


def checksums(step: Path) -> Checksums:
    """As they were taken on the devices when the step was saved."""
    leaves = read_meta(step)["leaves"]
    return {item: {leaf: one["checksum"] for leaf, one in leaves[item].items()} for item in leaves}


def arrays(step: Path) -> dict[str, str]:
    """SHA-256 of the bytes of every array of a step, as they are read back."""
    found = {}
    for item in ITEMS:
        stored = StackedArrays(step / item)
        for leaf in sorted(read_meta(step)["leaves"][item]):
            found[f"{item} {leaf}"] = hashlib.sha256(stored.read(leaf).tobytes()).hexdigest()
    return found


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run)]
