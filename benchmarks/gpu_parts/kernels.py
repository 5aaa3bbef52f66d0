"""Every attention kernel that runs here against the reference, and its speed at the 7B's shape."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_parts.common import Results, Task, require_gpu, task_of_process, time_steps
from llamapro_jax.model.attention import IMPLEMENTATIONS, attention, obstacle, problem_of
from llamapro_jax.model.precision import full_precision

REFERENCE, BLOCKWISE = "reference", "blockwise"
# Largest norm of the difference from the reference, as a share of the reference's, of the output
# and of each gradient. The reference computes in float32 from the same inputs.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}


@dataclass(frozen=True)
class Case:
    """documents: of different lengths, packed in a row; None: one, and no segment ids."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: int | None = None
    window: int | None = None
    dtype: str = "bfloat16"


def main() -> None:
    task = task_of_process()
    require_gpu(task, jax.default_backend() == "gpu")
    results = Results(task)
    device = jax.devices()[0].device_kind
    results.put(device=device, version=f"jax {jax.__version__}", checks=[], speeds=[])
    for case in cases(task.tiny):
        wanted = reference(case)
        for name, run in kernels(case):
            row = check(case, name, run, wanted)
            results.put(checks=[*results.values["checks"], row])
            print(f"  {case.name}, {name}: {row['difference']:.1e}", flush=True)
    for case in timed_cases(task):
        for name, run in kernels(case):
            agrees = all(r["agrees"] for r in results.values["checks"] if r["kernel"] == name)
            if agrees and results.time_for(10.0):
                row = speed(case, name, run, task.tiny)
                results.put(speeds=[*results.values["speeds"], row])


def cases(tiny: bool) -> list[Case]:
    length, heads, dim = (320, 4, 16) if tiny else (2048, 32, 128)
    one = Case("one document", 2, length, heads, heads, dim)
    grouped = replace(one, name="grouped heads", kv_heads=heads // 4)
    mixed = replace(grouped, name="packed, grouped, odd", length=length - 29, documents=3)
    return [
        one,
        grouped,
        replace(one, name="odd length", length=length - 29),
        replace(one, name="window", window=length // 4),
        replace(one, name="packed", documents=3),
        mixed,
        replace(mixed, name="the same in float32", dtype="float32"),
    ]


def timed_cases(task: Task) -> list[Case]:
    length, heads, dim = (320, 4, 16) if task.tiny else (task.length, 32, 128)
    one = Case("one document", task.rows, length, heads, heads, dim)
    return [one, replace(one, name="4 documents", documents=4)]


def kernels(case: Case) -> list[tuple[str, Callable[..., jax.Array]]]:
    """What can run here but the reference; blockwise, which is for CPUs, where nothing else can."""
    shapes = [jax.ShapeDtypeStruct(s, case.dtype) for s in operand_shapes(case)]
    ids = segment_ids(case)
    problem = problem_of(*shapes[:2], ids, case.window, None)
    names = [name for name in IMPLEMENTATIONS if name not in ("auto", REFERENCE, BLOCKWISE)]
    able = [name for name in names if obstacle(name, problem) is None] or [BLOCKWISE]
    return [(name, functools.partial(run_kernel, case, name, ids)) for name in able]


def run_kernel(case: Case, name: str, ids: jax.Array | None, *qkv: jax.Array) -> jax.Array:
    return attention(
        *qkv,
        segment_ids_BT=ids,
        sliding_window=case.window,
        implementation=name,  # type: ignore[arg-type]
    )


def operand_shapes(case: Case) -> list[tuple[int, ...]]:
    """Of q, k, v and the gradient of the output."""
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [(case.rows, case.length, count, case.head_dim) for count in heads]


def operands(case: Case) -> list[jax.Array]:
    shapes = operand_shapes(case)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape).astype(case.dtype) for key, shape in pairs]


def lengths(case: Case) -> np.ndarray:
    """Of the documents of a row: 1 : 2 : 3 ... of it, the last one takes what is left."""
    parts = np.arange(1, (case.documents or 1) + 1)
    ends = np.floor(np.cumsum(parts) / parts.sum() * case.length).astype(int)
    return np.diff(ends, prepend=0)


def segment_ids(case: Case) -> jax.Array | None:
    if case.documents is None:
        return None
    ids_T = np.repeat(np.arange(1, case.documents + 1, dtype=np.int32), lengths(case))
    return jnp.asarray(np.tile(ids_T, (case.rows, 1)))


def with_gradients(run: Callable[..., jax.Array], *inputs: jax.Array) -> Any:
    out, backward = jax.vjp(run, *inputs[:3])
    return out, *backward(inputs[3])


def reference(case: Case) -> Any:
    """The output and the three gradients in float32."""
    wide = [x.astype(jnp.float32) for x in operands(case)]
    run = functools.partial(run_kernel, case, REFERENCE, segment_ids(case))
    with full_precision(jnp.dtype(jnp.float32)):
        return jax.jit(functools.partial(with_gradients, run))(*wide)


def check(
    case: Case, name: str, run: Callable[..., jax.Array], wanted: Any
) -> dict[str, Any]:
    """Whether the kernel does what the reference does; one that does not run does not."""
    try:
        found = difference(case, run, wanted)
    except Exception as error:  # The other kernels are still to be seen.
        print(f"  {case.name}, {name}: {type(error).__name__}: {str(error)[:1000]}", flush=True)
        found = float("inf")
    tolerance = TOLERANCE[case.dtype]
    return {
        "case": case.name,
        "kernel": name,
        "difference": found,
        "tolerance": tolerance,
        "agrees": found <= tolerance,
    }


def difference(case: Case, run: Callable[..., jax.Array], wanted: Any) -> float:
    """The largest difference of the output and the three gradients from those wanted."""
    with full_precision(jnp.dtype(case.dtype)):
        got = jax.jit(functools.partial(with_gradients, run))(*operands(case))
    differences = [
        float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for a, b in zip(got, wanted, strict=True)
    ]
    # A NaN is no largest value to `max`.
    return max(differences) if all(np.isfinite(differences)) else float("inf")


def speed(case: Case, name: str, run: Callable[..., jax.Array], tiny: bool) -> dict[str, Any]:
    """Useful FLOPs a second: of the pairs of tokens that see each other."""
    *qkv, dout = operands(case)
    pairs = float((lengths(case).astype(float) ** 2 / 2).sum()) * case.rows
    flops = 4 * case.heads * case.head_dim * pairs
    forward = jax.jit(run)
    both = jax.jit(functools.partial(with_gradients, run))
    return {
        "case": case.name,
        "kernel": name,
        "forward_flops": flops / timed(forward, qkv, tiny),
        "both_flops": 3 * flops / timed(both, [*qkv, dout], tiny),
    }


def timed(function: Callable[..., Any], inputs: list[jax.Array], tiny: bool) -> float:
    out = jax.block_until_ready(function(*inputs))

    def take() -> None:
        nonlocal out
        out = function(*inputs)

    steps = 1 if tiny else 20
    return statistics.median(time_steps(take, lambda: jax.block_until_ready(out), steps, 4)[1:])


if __name__ == "__main__":
    main()
