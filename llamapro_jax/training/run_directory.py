"""A run directory: what training writes, and the trained model in it as a source.

```
config.yaml        every setting of the run
run.json           the model it trains and that model's digest, what trains, the lineage
config.json        Hugging Face's keys and the plan; tokenizer files; fingerprint.json of the model
metrics.jsonl      the log (tensorboard/ has a copy)
checkpoints/       what trains, a directory a step
summary.json       written when the run is finished
```
A run holds what trains. All else is read from the model that it began from, which must still be
where run.json says, and still be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llamapro_jax.checkpoint_files import TRAINABLE, Directory, ProvedArrays, committed_steps
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan, checked_lineage
from llamapro_jax.files import check_format, read_json, write_json
from llamapro_jax.fingerprint import Fingerprint, tensor_print
from llamapro_jax.hf.config import read_config
from llamapro_jax.local_copies import opened
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import Tensor, tensors
from llamapro_jax.remote import as_path
from llamapro_jax.sources import Bounds, Source, open_source, read_part
from llamapro_jax.training.state import leaves_of, trains

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
DATA = "data"
# What nobody needs who reads the trained model.
NOT_OF_THE_MODEL = (DATA, "tensorboard", "profile", "watchdog", "wandb")
FORMAT = {"format": "llamapro_jax run", "version": 1}


@dataclass(frozen=True)
class RunRecord:
    """run.json.

    model: where the run began from, a path made absolute or a hub id. model_digest: of its
    fingerprint. lineage: that of the model and, last, this training. data: what each text is
    recognised by (`Rows.digest`), by its place in the configuration. frozen: the checksum of each
    frozen leaf as loaded (see `llamapro_jax.checksum`).
    """

    model: str
    model_digest: str
    trainable: tuple[str, ...]
    lineage: tuple[Mapping[str, Any], ...]
    data: Mapping[str, str | None] = field(default_factory=dict)
    frozen: Mapping[str, int] = field(default_factory=dict)

    def write(self, directory: Directory) -> None:
        write_json(
            directory / RUN_FILE,
            {
                **FORMAT,
                "model": self.model,
                "model_digest": self.model_digest,
                "trainable": list(self.trainable),
                "lineage": list(self.lineage),
                "data": dict(self.data),
                "frozen": dict(self.frozen),
            },
        )

    @staticmethod
    def read(directory: Directory) -> RunRecord:
        """Raises UserError when run.json is malformed or of a later version."""
        path = directory / RUN_FILE
        values = read_json(path)
        check_format(values, FORMAT, path)
        try:
            lineage = checked_lineage(values["lineage"], str(path))
            if not lineage or lineage[-1]["verb"] != "train":
                raise ValueError("the last of lineage is no training")
            return RunRecord(
                str(values["model"]),
                str(values["model_digest"]),
                tuple(map(str, values["trainable"])),
                lineage,
                dict(values["data"]),
                dict(values["frozen"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: is malformed ({type(error).__name__}: {error}); restore it from a copy."
            ) from None


@dataclass(frozen=True)
class RunSource:
    """The model of a run at one step: trained tensors from the checkpoint, the rest from `base`.

    masters: trained tensors come in float32 as they were trained, else in the dtype that the
    base's tensors of the same name have. What is read of a checkpoint that is damaged raises
    UserError.
    """

    path: str
    directory: Path
    hf_config: Mapping[str, Any]
    config: ModelConfig
    plan: ExpansionPlan
    record: RunRecord
    step: int
    base: Source = field(repr=False)
    arrays: ProvedArrays = field(repr=False)
    masters: bool = False

    @property
    def lineage(self) -> tuple[Mapping[str, Any], ...]:
        *before, training = self.record.lineage
        return (*before, {**training, "steps": self.step})

    @cached_property
    def _row_of_depth(self) -> Mapping[int, tuple[str, int, tuple[int, int]]]:
        """Depth of a block -> its stack, segment, and place there."""
        return {
            depth: (stack, number, (i, j))
            for number, segment in enumerate(self.plan.segments)
            for stack in ("base", "new")
            for i, group in enumerate(segment.rows(stack))
            for j, depth in enumerate(group)
        }

    def address(self, tensor: Tensor) -> tuple[str, tuple[int, int] | None] | None:
        """Leaf and row in the checkpoint; None for a tensor that did not train."""
        name, spec = tensor.weight.name, self.record.trainable
        if tensor.block is None:
            return (name, None) if trains(spec, "outer", tensor.weight) else None
        stack, number, row = self._row_of_depth[tensor.block]
        return (f"{stack}.{number}.{name}", row) if trains(spec, stack, tensor.weight) else None

    def dtype(self, tensor: Tensor) -> np.dtype:
        if self.masters and self.address(tensor) is not None:
            return np.dtype(np.float32)
        return self.base.dtype(tensor)

    def read(self, tensor: Tensor) -> np.ndarray:
        address = self.address(tensor)
        if address is None:
            return self.base.read(tensor)
        return self._cast(tensor, tensor.weight.to_hf(self.arrays.read(*address), self.config))

    def read_part(self, tensor: Tensor, bounds: Bounds) -> np.ndarray:
        """As `sources.read_part`."""
        address = self.address(tensor)
        if address is None:
            return read_part(self.base, tensor, bounds)
        return self._cast(tensor, self.arrays.read(*address, bounds))

    def _cast(self, tensor: Tensor, trained: np.ndarray) -> np.ndarray:
        dtype = self.dtype(tensor)
        with np.errstate(over="ignore"):
            cast = trained.astype(dtype)
        if not np.isfinite(cast.astype(np.float32)).all() and np.isfinite(trained).all():
            raise UserError(
                f"{self.path}: trained tensor {tensor.name} does not fit into {dtype.name}, the "
                "dtype of the base; export in bfloat16 or float32."
            )
        return cast

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        known = self.base.fingerprint().tensors
        return Fingerprint(
            {
                t.name: known[t.name] if self.address(t) is None else tensor_print(self.read(t))
                for t in tensors(self.config)
            }
        )

    def fingerprint(self) -> Fingerprint:
        """What the model is in the dtypes of its base, with or without `masters`."""
        return self.stored()._fingerprint

    def stored(self) -> RunSource:
        """The same without `masters`, here and in the runs below."""
        if not self.masters:
            return self
        base = self.base.stored() if isinstance(self.base, RunSource) else self.base
        return replace(self, masters=False, base=base)


def is_run(path: str | Path) -> bool:
    """Whether `path` is the directory of a training run."""
    return (as_path(path) / RUN_FILE).is_file()


def open_run(path: str | Path, masters: bool = False, step: int | None = None) -> RunSource:
    """The model of a run at `step`, the newest one saved by default, a tensor at a time.

    masters: give what was trained in float32 as it was trained, rather than in the dtype of the
    base.

    Raises UserError when the run has no such checkpoint, when the model it began from is missing
    or another one, and when the checkpoint is not of this run.
    """
    directory, checkpoints = opened(path, CHECKPOINTS, without=NOT_OF_THE_MODEL)
    record = RunRecord.read(directory)
    hf_config, config, plan = read_config(directory)
    step = _chosen_step(path, checkpoints, step)
    arrays = ProvedArrays(checkpoints / str(step), TRAINABLE)
    _check_leaves(arrays, config, plan, record.trainable)
    base = _open_base(directory, record, masters)
    if base.plan != plan or base.config != config:
        raise UserError(
            f"{directory / RUN_FILE}: model {record.model} has another architecture or plan than "
            f"{directory / 'config.json'}; put back the model that the run began from."
        )
    return RunSource(
        str(path), directory, hf_config, config, plan, record, step, base, arrays, masters
    )


def _chosen_step(directory: str | Path, checkpoints: Directory, step: int | None) -> int:
    saved = committed_steps(checkpoints)
    if not saved:
        raise UserError(
            f"{directory}: has no checkpoint yet; let it train until the first one "
            "(training.save_every, or the end)."
        )
    if step is None:
        return saved[-1]
    if step not in saved:
        raise UserError(
            f"{directory}: has no checkpoint of step {step}; it has {', '.join(map(str, saved))}."
        )
    return step


def _check_leaves(
    arrays: ProvedArrays, config: ModelConfig, plan: ExpansionPlan, trainable: tuple[str, ...]
) -> None:
    for leaf, stack, weight, shape in leaves_of(config, plan):
        if not trains(trainable, stack, weight):
            continue
        found = arrays.shape(leaf)
        if found != tuple(shape):
            has = "is missing" if found is None else f"has shape {list(found)}"
            raise UserError(f"{arrays.directory / leaf}: {has}; config.json says {list(shape)}.")


def _open_base(directory: Path, record: RunRecord, masters: bool) -> Source:
    where = directory / RUN_FILE
    if Path(record.model).is_absolute() and not Path(record.model).is_dir():
        raise UserError(
            f"{where}: model {record.model} is missing, and a run holds only what it trained. "
            f"Put it back, or write its new place into {where.name}."
        )
    base = open_source(record.model, masters=masters)
    digest = base.fingerprint().digest
    if digest != record.model_digest:
        raise UserError(
            f"{where}: model {record.model} is another one than the run began from: its digest is "
            f"{digest[:12]}, the run's {record.model_digest[:12]}. Put back the original."
        )
    return base
