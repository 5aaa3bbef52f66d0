"""Our training step on one GPU, in every setting that may be the fastest, and the card's own rate.

All weights are made on the device, each in the dtype and the place that `train` gives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts.common import (
    GIB,
    OPTIMIZER,
    Results,
    Task,
    architecture,
    require_gpu,
    task_of_process,
    time_steps,
)
from llamapro_jax.config import DataConfig, MeshConfig, RunConfig, SourceConfig, TrainingConfig
from llamapro_jax.model.llama import Params
from llamapro_jax.model.params import abstract_params, init_params
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.sharding import batch_sharding, build_mesh
from llamapro_jax.training.fit import device_memory
from llamapro_jax.training.state import dtype_of, init_state, labels, partition
from llamapro_jax.training.step import build_train_step

# Left free of what the allocator has, for what it cannot use in one piece.
SPARE = GIB


def main() -> None:
    task = task_of_process()
    require_gpu(task, jax.default_backend() == "gpu")
    results = Results(task)
    device = jax.devices()[0]
    results.put(
        device=device.device_kind,
        version=f"jax {jax.__version__}",
        matmul_flops=matmul_rate(task.tiny),
    )
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = Step(task, mesh)
        results.put(trained=step.trained)
        for setting in settings(task, results):
            results.add(step.measure(setting, again=task.setting is not None))


def matmul_rate(tiny: bool) -> float:
    """FLOPs a second of a large bfloat16 product with itself, sustained for about a second."""
    size, repeats = (128, 2) if tiny else (8192, 200)
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    out = jax.block_until_ready(product(a, b))

    def take() -> None:
        nonlocal out
        out = product(a, b)

    time_steps(take, lambda: out.block_until_ready(), repeats, 1)
    return 2 * size**3 / min(time_steps(take, lambda: out.block_until_ready(), repeats, 3))


def settings(task: Task, results: Results) -> Iterator[dict[str, Any]]:
    """The likeliest first; the fastest once more with segment ids, which other kernels take."""
    if task.setting is not None:
        yield task.setting
        return
    half = max(1, task.rows // 2)
    tried = [("minimal", task.rows), ("minimal", half), ("none", half), ("attention", task.rows)]
    for remat, microbatch in tried[: 1 if task.quick else None]:
        if results.time_for_another():
            yield {"remat": remat, "microbatch": microbatch}
    best = results.best()
    if best and not task.quick and results.time_for_another():
        yield {**best["setting"], "packed": True}


class Step:
    """The state of the training, and steps of it in any setting."""

    def __init__(self, task: Task, mesh: jax.sharding.Mesh) -> None:
        self._task, self._mesh = task, mesh
        self._config, self._plan = architecture(task.tiny)
        self._begin()
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(self._state.trainable))

    def _begin(self) -> None:
        run = self._run({})
        params = self._random_params()
        trainable, self._frozen = partition(params, run.trainable)
        self._optimizer = build_optimizer(
            run.optimizer, run.training.steps, labels(params, run.trainable)
        )
        self._state = init_state(trainable, self._frozen, self._optimizer)

    def _run(self, training: dict[str, Any]) -> RunConfig:
        source = SourceConfig("random", "none")
        return RunConfig(
            model="random weights",
            output="none",
            data=DataConfig(self._task.length, self._task.rows, (source,)),
            training=TrainingConfig(steps=1000, **training),
            optimizer=OPTIMIZER,
        )

    def _random_params(self) -> Params:
        run = self._run({})
        dtypes = dtype_of(run.trainable, run.compute_dtype)
        like = abstract_params(self._config, self._plan, dtypes, self._mesh)

        def draw(key: jax.Array) -> Params:
            drawn = init_params(key, self._config, self._plan, jnp.float32)
            return jax.tree.map(
                lambda leaf, a: jax.reshard(leaf.astype(a.dtype), a.sharding), drawn, like
            )

        return jax.jit(draw)(jax.random.key(0))

    def _batch(self, packed: bool) -> dict[str, jax.Array]:
        """Random tokens, a document a row; packed: four documents a row, by segment ids."""
        rows, length = self._task.rows, self._task.length
        shape = (rows, length)
        index = np.arange(length, dtype=np.int32)
        document = length // 4 if packed else length
        arrays = {
            "tokens": np.random.default_rng(0).integers(
                0, self._config.vocab_size, shape, dtype=np.int32
            ),
            "positions": np.broadcast_to(index % document, shape),
            "loss_mask": np.ones(shape, np.bool_),
        }
        if packed:
            arrays["segment_ids"] = np.broadcast_to(1 + index // document, shape)
        return jax.device_put(arrays, batch_sharding(self._mesh))

    def measure(self, setting: dict[str, Any], again: bool) -> dict[str, Any]:
        """A row for `Results`. again: time it longer, it is the one that counts."""
        began = time.perf_counter()
        training = {name: value for name, value in setting.items() if name != "packed"}
        run = self._run(training)
        batch = self._batch(setting.get("packed", False))
        try:
            compiled = (
                build_train_step(self._config, self._plan, run, self._optimizer)
                .lower(self._state, self._frozen, batch)
                .compile()
            )
            needed = compiled.memory_analysis().peak_memory_in_bytes
            memory = device_memory(jax.devices())
            if memory is not None and needed > memory - SPARE:
                problem = f"needs {needed / GIB:.1f} of {memory / GIB:.1f} GiB"
                return {"setting": setting, "problem": problem}
            figures = self._time(compiled, batch, 3 if again else 1)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # The step may have used up the state that it was given.
            self._state = self._frozen = None
            self._begin()
            return {"setting": setting, "problem": "out of memory"}
        return {
            "setting": setting,
            "memory_gib": needed / GIB if memory is not None else 0,
            "total_seconds": time.perf_counter() - began,
            "ready_seconds": time.perf_counter() - began - figures.pop("timing_seconds"),
            **figures,
        }

    def _time(
        self, compiled: Callable[..., Any], batch: dict[str, jax.Array], times: int
    ) -> dict[str, Any]:
        metrics: dict[str, jax.Array] = {}

        def take() -> None:
            nonlocal metrics
            self._state, metrics = compiled(self._state, self._frozen, batch)

        def wait() -> None:
            jax.block_until_ready(self._state)

        time_steps(take, wait, 2, 1)
        began = time.perf_counter()
        steps = 1 if self._task.tiny else 3
        seconds = time_steps(take, wait, steps, times)
        return {
            "seconds": seconds,
            "loss": float(metrics["loss"]),
            "timing_seconds": time.perf_counter() - began,
        }


if __name__ == "__main__":
    main()
