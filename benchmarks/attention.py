"""Every attention kernel that runs here, beside the reference and jax's own.

For each: the forward pass, and the forward and backward pass, in milliseconds and as times the
speed of the reference, and the largest difference from it. The kernels run in turn, round after
round, and a ratio is the median of the ratios within a round. Exit status 1 when what `auto` takes
misses the goal.

    python benchmarks/attention.py --length 2048
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.model.attention import (
    IMPLEMENTATIONS,
    attention,
    choose,
    obstacle,
    problem_of,
)

REFERENCE = "reference"


@dataclass(frozen=True)
class Row:
    """One kernel: seconds of every round, and its largest difference from the reference."""

    name: str
    forward: list[float]
    both: list[float]
    difference: float


def main() -> int:
    args = parse_arguments()
    if args.length % args.documents or args.heads % args.kv_heads:
        print(
            f"error: --length {args.length} must be a multiple of --documents {args.documents}, "
            f"and --heads {args.heads} of --kv-heads {args.kv_heads}",
            file=sys.stderr,
        )
        return 2
    inputs = operands(args)
    problem = problem_of(*inputs[:2], ids_of(args), args.sliding_window, None)
    taken = choose("auto", problem)
    names = [name for name in IMPLEMENTATIONS[1:] if obstacle(name, problem) is None]
    kernels = {name: kernel_of(name, args) for name in names}
    if args.documents == 1:
        kernels["jax.nn (xla)"] = functools.partial(jax_attention, args.sliding_window)
    rows = measure(kernels, inputs, args.rounds)
    print_table(rows, args)
    return print_goal(rows, taken, args.goal)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=1, help="rows (1)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row (2048)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (8)")
    parser.add_argument("--kv-heads", type=int, default=8, help="key/value heads (8)")
    parser.add_argument("--head-dim", type=int, default=64, help="dimensions of a head (64)")
    parser.add_argument("--documents", type=int, default=1, help="documents packed in a row (1)")
    parser.add_argument("--sliding-window", type=int, help="tokens that a token sees (all)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=7, help="rounds, after one to warm up (7)")
    parser.add_argument(
        "--goal",
        type=float,
        default=2.5,
        help="least speed of the kernel that auto takes, forward and backward, in times that of "
        "the reference (2.5)",
    )
    return parser.parse_args()


def operands(args: argparse.Namespace) -> tuple[jax.Array, ...]:
    """q, k, v and the gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    return tuple(
        jax.random.normal(key, (args.batch, args.length, count, args.head_dim)).astype(args.dtype)
        for key, count in zip(keys, heads, strict=True)
    )


def ids_of(args: argparse.Namespace) -> jax.Array | None:
    """Segment ids of rows with several documents of one length; None for one document."""
    if args.documents == 1:
        return None
    ids_T = np.repeat(np.arange(1, args.documents + 1), args.length // args.documents)
    return jnp.asarray(np.tile(ids_T, (args.batch, 1)), jnp.int32)


def kernel_of(name: str, args: argparse.Namespace) -> Callable[..., jax.Array]:
    return functools.partial(
        attention,
        segment_ids_BT=ids_of(args),
        sliding_window=args.sliding_window,
        implementation=name,  # type: ignore[arg-type]
    )


def jax_attention(
    sliding_window: int | None, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """What jax computes by itself."""
    window = None if sliding_window is None else (sliding_window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)


def measure(
    kernels: dict[str, Callable[..., jax.Array]], inputs: Sequence[jax.Array], rounds: int
) -> list[Row]:
    """Runs every kernel once a round, forward, then forward and backward."""
    *qkv, dout = inputs

    def both(kernel: Callable[..., jax.Array], *inputs: jax.Array) -> Any:
        out, backward = jax.vjp(kernel, *inputs[:3])
        return out, backward(inputs[3])

    forward = {name: jax.jit(kernel) for name, kernel in kernels.items()}
    backward = {name: jax.jit(functools.partial(both, k)) for name, k in kernels.items()}
    results = {name: jax.block_until_ready(f(*qkv, dout)) for name, f in backward.items()}
    for f in forward.values():
        jax.block_until_ready(f(*qkv))
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in kernels}
    for _ in range(rounds):
        for name in kernels:
            seconds[name][0].append(timed(forward[name], *qkv))
            seconds[name][1].append(timed(backward[name], *qkv, dout))
    wanted = results[REFERENCE]
    return [Row(name, *seconds[name], difference(results[name], wanted)) for name in kernels]


def timed(f: Callable[..., Any], *inputs: jax.Array) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(f(*inputs))
    return time.perf_counter() - begin


def difference(got: Any, wanted: Any) -> float:
    """The largest difference of the output or of a gradient, of the largest value in it."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    wide = ((a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in wide)


def speed(row: list[float], reference: list[float]) -> float:
    """Times the speed of the reference."""
    return statistics.median(there / here for here, there in zip(row, reference, strict=True))


def print_table(rows: list[Row], args: argparse.Namespace) -> None:
    device = jax.devices()[0]
    print(
        f"\n{device.platform} ({device.device_kind}), jax {jax.__version__}, {args.dtype}, "
        f"{args.batch} x {args.length} tokens, {args.heads}/{args.kv_heads} heads of "
        f"{args.head_dim}, documents in a row: {args.documents}, window: {args.sliding_window}\n"
    )
    print("| attention | forward ms | speed | forward + backward ms | speed | difference |")
    print("|---|---|---|---|---|---|")
    reference = next(row for row in rows if row.name == REFERENCE)
    for row in rows:
        print(
            f"| {row.name} | {1e3 * statistics.median(row.forward):.2f} "
            f"| {speed(row.forward, reference.forward):.1f} "
            f"| {1e3 * statistics.median(row.both):.2f} "
            f"| {speed(row.both, reference.both):.1f} | {row.difference:.1e} |"
        )
    print()


def print_goal(rows: list[Row], taken: str, goal: float) -> int:
    """Prints the goal with what was measured. Returns the exit status."""
    by_name = {row.name: row for row in rows}
    measured = speed(by_name[taken].both, by_name[REFERENCE].both)
    met = measured >= goal
    print(
        f"goal {taken}: forward and backward at least {goal:g} times as fast as the reference; "
        f"measured {measured:.1f}; {'met' if met else 'missed'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
