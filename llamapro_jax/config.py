"""The configuration of a training run: `llamapro train CONFIG [key.path=value ...]`.

Relative paths in a configuration are relative to the directory that the command runs in, not to
the configuration file. `docs/configuration.md` is generated from it and `config_data`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llamapro_jax import typed_yaml
from llamapro_jax.config_data import DataConfig, EvalSourceConfig, ReplayConfig, SourceConfig
from llamapro_jax.config_rules import Problems, not_empty, not_negative, positive, share
from llamapro_jax.errors import nearest
from llamapro_jax.files import atomic_write
from llamapro_jax.model.config import AttentionChoice, RematChoice
from llamapro_jax.typed_yaml import option, validate

__all__ = [
    "ArchitectureConfig",
    "DataConfig",
    "EvalSourceConfig",
    "MeshConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "ReplayConfig",
    "RunConfig",
    "SourceConfig",
    "TrackingConfig",
    "TrainingConfig",
    "XlaConfig",
    "changed",
    "load_config",
    "save_config",
    "validate",
]

TRAINABLE_PARTS = ("all", "new", "embed", "head", "norms")

MAY_CHANGE_ON_RESUME = (
    "output",
    "tracking",
    "architecture",
    "mesh",
    "xla",
    "compilation_cache",
    "profile",
    "training.microbatch",
    "training.remat",
    "data.cache_directory",
    "training.log_every",
    "training.eval_every",
    "training.save_every",
    "training.keep",
    "training.bad_steps",
    "training.watchdog",
    "training.compare_every",
)
"""Settings (or whole sections) that a resumed run may change: none alters what is computed.

Another mesh, microbatch or remat adds in another order, which may change last bits, no more.
"""

_FLAG = re.compile(r"xla_\w+")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on what trains, and the schedule of its learning rate."""

    learning_rate: float = option("The peak learning rate.", 2e-4)
    b1: float = option("Decay of AdamW's first moment.", 0.9)
    b2: float = option("Decay of AdamW's second moment.", 0.95)
    eps: float = option("Added to the root of AdamW's second moment.", 1e-8)
    weight_decay: float = option("Decoupled weight decay of the matrices that train.", 0.1)
    clip_norm: float | None = option(
        "Largest norm of the gradient of all that trains; null: no clipping.", 1.0
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = option(
        "How the learning rate goes on after the warmup; `wsd`: constant, then a linear decay.",
        "cosine",
    )
    warmup_ratio: float = option("Share of the steps in which the rate rises from 0.", 0.06)
    warmup_steps: int | None = option("The same as a number of steps; wins over the ratio.", None)
    final_ratio: float = option(
        "The last learning rate as a share of the peak (`constant` has none).", 0.0
    )
    decay_ratio: float = option("`wsd` only: share of the steps in the final decay.", 0.2)

    def warmup(self, steps: int) -> int:
        """Number of warmup steps in a run of `steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_ratio * steps)

    def decay(self, steps: int) -> int:
        """Number of steps in the final decay of a `wsd` run of `steps`."""
        return round(self.decay_ratio * steps)

    def problems(self) -> Problems:
        yield from positive(self, "learning_rate", "eps", "clip_norm")
        yield from not_negative(self, "weight_decay", "warmup_steps")
        yield from share(self, "warmup_ratio", "final_ratio", "decay_ratio")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield name, f"must be at least 0 and below 1, is {getattr(self, name)}."


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, how a step is computed, and what is done every so often."""

    steps: int = option("Number of optimizer steps.")
    microbatch: int | Literal["auto"] = option(
        "Rows that each group of devices takes at a time: a batch is `mesh.data` x `mesh.fsdp` "
        "times so many rows, as often as it takes; `auto`: the most that fits in memory (on a "
        "CPU: all of them).",
        "auto",
    )
    log_every: int = option("Steps between two lines of the log.", 10)
    eval_every: int | None = option(
        "Steps between two evaluations of the held-out texts; null: only before the first step "
        "and after the last.",
        None,
    )
    eval_batches: int | None = option(
        "Batches of each held-out text that an evaluation reads; null: all of it.", None
    )
    save_every: int | None = option(
        "Steps between two checkpoints; null: only after the last step.", None
    )
    keep: int = option(
        "Number of checkpoints kept, the newest; while the run goes on, two at least.", 2
    )
    loss_chunk: int = option(
        "Tokens whose logits exist at the same time; smaller takes less memory.", 1024
    )
    attention: AttentionChoice = option(
        "Who computes attention: `auto` takes a fused kernel that runs here and fits the shape "
        "(TPU: `splash`; GPU: `cudnn` or `pallas_gpu`; CPU: `blockwise` from 512 tokens on), and "
        "the log says which; a choice that cannot run is an error.",
        "auto",
    )
    remat: RematChoice = option(
        "What the backward pass finds kept: `none`: all that it needs; `minimal`: the results of "
        "matrix products, so that none runs again; `attention`: the output of attention alone; "
        "`full`: each block's input, the rest runs again; `auto`: the first of the last three that "
        "fits in memory (on a CPU: `none`).",
        "auto",
    )

    bad_steps: int = option(
        "Steps in a row without a usable loss or gradient after which the run ends; the update of "
        "each is skipped.",
        3,
    )
    spike_sigma: float | None = option(
        "A loss so many standard deviations above the mean of the last 100 or so is a spike, and "
        "its update is skipped as well; null: only what is no number.",
        None,
    )
    watchdog: float | None = option(
        "Seconds without a step, a batch of an evaluation or a save after which the run shows what "
        "it hangs in and exits with status 43; loading and compiling have four times as long. "
        "null: it waits for ever.",
        1800.0,
    )
    compare_every: int | None = option(
        "Steps between two comparisons of what all processes must have alike: the step, the batch "
        "as each one's data gives it, and every array of which there are copies; null: only before "
        "the first step.",
        100,
    )

    def problems(self) -> Problems:
        every = ("log_every", "eval_every", "eval_batches", "save_every", "compare_every")
        yield from positive(self, "steps", *every, "keep", "loss_chunk")
        yield from positive(self, "bad_steps", "spike_sigma", "watchdog")
        if self.microbatch != "auto":
            yield from positive(self, "microbatch")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out. The four sizes multiply to the number of devices."""

    data: int | None = option(
        "Copies of the weights, each of which takes its share of the batch; null: one a TPU slice.",
        None,
    )
    fsdp: int | None = option(
        "Devices over which weights and batch are spread; a weight is gathered where it is used. "
        "null: all that the other three leave.",
        None,
    )
    tensor: int = option("Devices that share the heads and the feed-forward of each block.", 1)
    context: int = option("Devices that share the length of each row.", 1)

    def problems(self) -> Problems:
        yield from positive(self, "data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig:
    """What the model will be, for `llamapro plan` before it is on disk; `train` checks it."""

    base: str = option(
        "What it is made of: the name of a published model (`llama2_7b`, `llama2_13b`, "
        "`llama2_70b`, `llama3_8b`, `mistral_7b`), or the path of a config.json."
    )
    blocks: int = option("New blocks, spread as `--blocks` of `expand` does.", 8)
    per_group: int = option("New blocks of each group, as with `--per-group`.", 1)

    def problems(self) -> Problems:
        yield from not_empty(self, "base")
        yield from not_negative(self, "blocks")
        yield from positive(self, "per_group")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = option("Write TensorBoard events into the run directory.", True)
    wandb_project: str | None = option(
        "Weights & Biases project; null: it is neither imported nor used.", None
    )
    wandb_mode: Literal["online", "offline"] = option(
        "`offline` keeps the records in the run directory for `wandb sync`.", "online"
    )

    def problems(self) -> Problems:
        if self.wandb_project == "":
            yield "wandb_project", "must not be empty; null turns Weights & Biases off."


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Flags of the XLA compiler, set before it starts. What the environment sets stays."""

    defaults: bool = option(
        "Set the flags that docs/performance.md lists for the chip that is here.", True
    )
    flags: dict[str, str | None] | None = option(
        "Further flags, or other values for those, by name without `--`, such as "
        "`{xla_tpu_scoped_vmem_limit_kib: 65536}`; a flag that is null is left to XLA.",
        None,
    )

    def problems(self) -> Problems:
        for name, value in (self.flags or {}).items():
            where = f"flags.{name}"
            if name.startswith("-"):
                yield where, f"is a name without dashes: {name.lstrip('-').partition('=')[0]!r}."
            elif not _FLAG.fullmatch(name):
                yield where, "is no flag of XLA: their names begin with `xla_`."
            elif value is not None and re.search(r"\s", value):
                yield where, f"{value!r} has a space, at which XLA would cut it in two."


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, in the run directory's `profile`; the log says how to look at it."""

    steps: int = option("Number of steps to trace; 0: none.", 0)
    first_step: int = option(
        "The first step to trace. A run that goes on from a later step traces from the second one "
        "that it takes.",
        10,
    )

    def problems(self) -> Problems:
        yield from not_negative(self, "steps")
        yield from positive(self, "first_step")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run."""

    model: str = option(
        "What to train: a Hugging Face directory, a hub id (`org/name@revision`), a Flax "
        "checkpoint or a run; a path or a URL such as `gs://...`."
    )
    output: str = option("The run directory: a path, or `gs://...` or `s3://...`.")
    data: DataConfig
    training: TrainingConfig
    trainable: tuple[str, ...] = option(
        "`new`: the inserted blocks; `all`: everything; or a list of `new` and any of `embed`, "
        "`head`, `norms` (the norms of the base blocks and the final one).",
        ("new",),
    )
    compute_dtype: Literal["bfloat16", "float32"] = option(
        "Type of activations and of frozen weights in a step; what trains is kept in float32.",
        "bfloat16",
    )
    frozen_dtype: Literal["compute", "int8"] = option(
        "How the frozen matrices of the base blocks are stored: `compute`: in compute_dtype; "
        "`int8`: in 8 bits with a scale for each output channel, for devices with little memory "
        "(an approximation of the base).",
        "compute",
    )
    seed: int = option("Seed of all that is random in the run, such as the order of the rows.", 0)
    optimizer: OptimizerConfig = OptimizerConfig()
    compilation_cache: str | None = option(
        "Directory that keeps compiled programs for later runs (a path or `gs://...`); `auto`: "
        "JAX_COMPILATION_CACHE_DIR, else `llamapro_jax/xla` in XDG_CACHE_HOME or `~/.cache`; null: "
        "none.",
        "auto",
    )
    mesh: MeshConfig = MeshConfig()
    tracking: TrackingConfig = TrackingConfig()
    profile: ProfileConfig = ProfileConfig()
    xla: XlaConfig = XlaConfig()
    architecture: ArchitectureConfig | None = option(
        "What the model will be, where it is not on disk yet; null: nothing is assumed.", None
    )

    def __post_init__(self) -> None:
        parts = (self.trainable,) if isinstance(self.trainable, str) else self.trainable
        order = {part: i for i, part in enumerate(TRAINABLE_PARTS)}
        parts = tuple(sorted(parts, key=lambda part: order.get(part, len(order))))
        object.__setattr__(self, "trainable", parts)

    def problems(self) -> Problems:
        yield from not_empty(self, "model", "output")
        yield from not_negative(self, "seed")
        if self.compilation_cache == "":
            yield "compilation_cache", "must not be empty; null turns it off."
        yield from self._trainable_problems()
        batch, part = self.data.batch_size, self.training.microbatch
        if part != "auto" and part > 0 and batch % part:
            yield "training.microbatch", f"{part} does not divide data.batch_size, {batch}."
        if self.training.eval_every is not None and not self.data.eval:
            yield "training.eval_every", "is set, but data.eval names no held-out text."
        if self.profile.steps > 0 and self.profile.first_step > self.training.steps:
            first, steps = self.profile.first_step, self.training.steps
            yield "profile.first_step", f"{first} is later than training.steps, {steps}."
        yield from self._schedule_problems()

    def _trainable_problems(self) -> Problems:
        parts = self.trainable
        for part in parts:
            if part not in TRAINABLE_PARTS:
                known = ", ".join(TRAINABLE_PARTS)
                near = nearest(part, TRAINABLE_PARTS)
                yield "trainable", f"{part!r} is no part of a model.{near} Known: {known}."
        if len(set(parts)) != len(parts):
            yield "trainable", f"names a part twice: {', '.join(parts)}."
        if "all" in parts and set(parts) != {"all"}:
            yield "trainable", "'all' stands alone: it already trains every part."
        if "all" not in parts and "new" not in parts:
            yield "trainable", "needs 'new' (the inserted blocks) or 'all'."

    def _schedule_problems(self) -> Problems:
        steps, optimizer = self.training.steps, self.optimizer
        warmup = optimizer.warmup(steps)
        field = "warmup_ratio" if optimizer.warmup_steps is None else "warmup_steps"
        if steps > 0 and warmup >= steps:
            yield (
                f"optimizer.{field}",
                f"{warmup} warmup steps leave none of training.steps, {steps}.",
            )
        elif optimizer.schedule == "wsd" and warmup + optimizer.decay(steps) > steps:
            yield (
                "optimizer.decay_ratio",
                f"warmup ({warmup} steps) and decay ({optimizer.decay(steps)}) are longer than "
                f"training.steps, {steps}.",
            )


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file, changed by `key.path=value` overrides.

    Raises UserError that lists all problems, each with its file and line or its override.
    """
    return typed_yaml.load(RunConfig, path, list(overrides))


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes every setting, defaults included, so that a later default changes no old run.

    Raises UserError when the configuration is not valid.
    """
    validate(config)
    atomic_write(path, typed_yaml.dump(config))


def changed(
    before: RunConfig, after: RunConfig, may_change: Sequence[str] = MAY_CHANGE_ON_RESUME
) -> list[str]:
    """The differences as lines `training.steps: 100 -> 200`, without what `may_change`."""
    return [
        f"{path}: {old} -> {new}"
        for path, old, new in typed_yaml.differences(before, after)
        if not any(path == name or path.startswith(f"{name}.") for name in may_change)
    ]
