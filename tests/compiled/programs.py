"""Training steps of published models, compiled for machines that are not here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from llamapro_jax.architecture import described
from llamapro_jax.capacity import Target
from llamapro_jax.config import (
    ArchitectureConfig,
    DataConfig,
    MeshConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llamapro_jax.expansion import ExpansionPlan, spread
from llamapro_jax.flops import StepFlops, step_flops
from llamapro_jax.hlo import Program, read_program
from llamapro_jax.machines import GIB, parse_machine
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.program import Summary, summarize
from llamapro_jax.training.fit import needed_by, peak_bytes


@dataclass(frozen=True)
class Compiled:
    """A step, and what the compiler made of it."""

    config: ModelConfig
    plan: ExpansionPlan
    run: RunConfig
    devices: int
    peak_gib: float
    text: str

    @property
    def summary(self) -> Summary:
        return summarize(self.text)

    @property
    def program(self) -> Program:
        return read_program(self.text)

    @property
    def tokens(self) -> int:
        return self.run.data.batch_size * self.run.data.sequence_length

    @property
    def flops(self) -> StepFlops:
        """What the formula says, a token."""
        length = self.run.data.sequence_length
        return step_flops(self.config, self.plan, self.run.trainable, length)

    @property
    def matmul_flops(self) -> float:
        """What the program computes, a token."""
        return self.summary.matmul_flops * self.devices / self.tokens


def step(
    topology: str,
    base: str = "llama2_7b",
    *,
    rows: int,
    length: int = 4096,
    blocks: tuple[int, int] | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008
    trainable: tuple[str, ...] = ("new",),
    frozen_dtype: Any = "compute",
    **training: Any,
) -> tuple[Target, RunConfig]:
    """What is to be compiled. blocks: (base, new) in the place of the model's own and 8."""
    config, plan = described(ArchitectureConfig(base, 8))
    if blocks is not None:
        plan = ExpansionPlan(blocks[0]).expand(spread(*blocks))
        config = replace(config, num_blocks=plan.num_blocks)
    config = replace(config, max_position_embeddings=max(length, config.max_position_embeddings))
    run = RunConfig(
        model="model",
        output="run",
        data=DataConfig(length, rows, (SourceConfig("a", "a.txt"),)),
        training=TrainingConfig(**{"steps": 100, "microbatch": 1, **training}),
        trainable=trainable,
        frozen_dtype=frozen_dtype,
        mesh=mesh,
    )
    return Target(run, config, plan, parse_machine(topology), print), run


def compiled(*arguments: Any, **settings: Any) -> Compiled:
    """The program of `step(...)`."""
    target, run = step(*arguments, **settings)
    program = target.compile(run)
    return Compiled(
        config=target.config,
        plan=target.plan,
        run=run,
        devices=target.machine.devices,
        peak_gib=peak_bytes(program) / GIB,
        text=program.as_text(),
    )


def gib_refused(*arguments: Any, **settings: Any) -> float:
    """GiB that the step needs by the compiler's refusal; 0 when it compiles."""
    target, run = step(*arguments, **settings)
    try:
        target.compile(run)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_by(str(error))
        assert needed is not None, error
        return needed / GIB
    return 0.0
