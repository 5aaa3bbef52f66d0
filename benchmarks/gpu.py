"""LLaMA2-7B + 8 new blocks on one GPU, beside transformers + PyTorch with the same blocks trained.

Random weights, made on the card; 4,096 tokens a row, bfloat16, one document a row. Each part runs
in a process of its own, for one leaves no room on the card for another:

- kernels: every attention kernel against the reference, forward and backward: packed rows, grouped
  heads, odd lengths; and its speed;
- ours: our step, in every setting (remat, microbatch) that may be the fastest; and the rate of a
  large matrix product on this card;
- torch: transformers + PyTorch, likewise (attention, compiled, microbatch, checkpointing).

Then both take turns, each in its best setting. Exit status 1 when a goal is missed, 2 when a part
could not run. The goals are for an H200; on another card nothing is judged.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts kernels,ours --quick
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The package need not be installed.
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.common import Task, architecture, describe, fastest  # noqa: E402
from llamapro_jax import xla  # noqa: E402
from llamapro_jax.config import XlaConfig  # noqa: E402
from llamapro_jax.machines import CHIPS  # noqa: E402

MODULES = {"kernels": "kernels", "ours": "ours", "torch": "torch_step"}
# Of the time that is left, which a part may take; what remains is for the rounds.
SHARES = {"kernels": 0.2, "ours": 0.45, "torch": 0.6}
# Goals on an H200.
USEFUL_RATE = 475e12
TIMES_TORCH = 1.3
JUDGED = "h200"

Found = dict[str, Any]


def main() -> int:
    args = parse_arguments()
    began = time.monotonic()
    end = began + 60 * args.minutes
    with tempfile.TemporaryDirectory() as directory:
        runner = Runner(args, Path(directory), end)
        found = {part: runner.run(part, SHARES[part]) for part in args.parts}
        rounds = take_turns(runner, found, args.rounds)
    print_kernels(found.get("kernels"))
    rates = print_steps(found, rounds, args)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    status = print_goals(found, rates, args.tiny)
    return 2 if runner.failed else status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--parts", default=",".join(MODULES), help="some of kernels,ours,torch (all)"
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch, one update (4)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row (4096)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each at the end (2)")
    parser.add_argument("--minutes", type=float, default=9.0, help="to have ended after (9)")
    parser.add_argument("--quick", action="store_true", help="only the likeliest setting of each")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on any device, to see that all runs"
    )
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    for part in args.parts:
        if part not in MODULES:
            parser.error(f"--parts: {part!r} is not one of {', '.join(MODULES)}")
    if args.tiny:
        args.rows, args.length = 2, 64
    return args


class Runner:
    """Runs parts, each until the share of the time is over that it is given."""

    def __init__(self, args: argparse.Namespace, directory: Path, end: float) -> None:
        self._args, self._directory, self._end = args, directory, end
        self.failed = False
        defaults = {
            # What a round needs again was compiled when the settings were tried.
            "JAX_COMPILATION_CACHE_DIR": str(directory / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(directory / "torch"),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environ = {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        print(*xla.apply(XlaConfig(), self._environ), sep="\n")

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def run(self, part: str, share: float, setting: Found | None = None) -> Found | None:
        """What the part found; None when it failed before it found anything that counts."""
        print(f"{part}:" if setting is None else f"{part}, again:", flush=True)
        args, result = self._args, self._directory / "result.json"
        result.unlink(missing_ok=True)
        seconds = max(0.0, share * self.left)
        task = Task(
            str(result), args.rows, args.length, seconds, args.tiny, args.quick, setting
        )
        task.write(self._directory / "task.json")
        command = [sys.executable, "-m", f"benchmarks.gpu_parts.{MODULES[part]}"]
        try:
            # A part ends by itself when its time is over; this is for one that hangs.
            done = subprocess.run(
                [*command, str(self._directory / "task.json")],
                env=self._environ,
                timeout=max(1.0, self.left),
            )
            problem = None if done.returncode == 0 else f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            problem = "was stopped when all the time was over"
        if problem:
            self.failed = True
            print(f"error: {part} {problem}", file=sys.stderr)
        found: Found = json.loads(result.read_text()) if result.exists() else {}
        counts = found.get("checks") or fastest(found.get("candidates", []))
        return found if counts else None


def take_turns(
    runner: Runner, found: dict[str, Found | None], rounds: int
) -> dict[str, list[float]]:
    """Seconds of a step in each round, of ours and of PyTorch's, in the best setting of each.

    The first round is that in which the settings were tried, when there is time for no other.
    """
    best = {
        part: fastest(found[part]["candidates"]) for part in ("ours", "torch") if found.get(part)
    }
    taken: dict[str, list[float]] = {part: [] for part in best}
    needed = 0.0
    for _ in range(rounds if len(best) == 2 else 0):
        if runner.left < 1.2 * needed:
            break
        began, turn = runner.left, {}
        for part, row in best.items():
            again = runner.run(part, 1.0, row["setting"])
            if again:
                turn[part] = statistics.median(again["candidates"][0]["seconds"])
        if len(turn) < len(best):
            break
        for part, seconds in turn.items():
            taken[part].append(seconds)
        needed = began - runner.left
    for part, row in best.items():
        taken[part] = taken[part] or [statistics.median(row["seconds"])]
    return taken


def print_kernels(found: Found | None) -> None:
    if not found:
        return
    print(f"\nAttention on {found['device']}, {found['version']}:\n")
    print("| rows | kernel | difference | allowed | |")
    print("|---|---|---|---|---|")
    for row in found["checks"]:
        print(
            f"| {row['case']} | {row['kernel']} | {row['difference']:.1e} "
            f"| {row['tolerance']:.0e} | {'agrees' if row['agrees'] else 'DIFFERS'} |"
        )
    if found["speeds"]:
        print("\n| rows | kernel | forward, TFLOP/s | forward + backward, TFLOP/s |")
        print("|---|---|---|---|")
    for row in found["speeds"]:
        print(
            f"| {row['case']} | {row['kernel']} | {row['forward_flops'] / 1e12:.0f} "
            f"| {row['both_flops'] / 1e12:.0f} |"
        )


def print_steps(
    found: dict[str, Found | None], rounds: dict[str, list[float]], args: argparse.Namespace
) -> dict[str, Any]:
    """Prints the table of steps. Returns `useful` (FLOPs a second) and `ratio`, where measured."""
    # It imports jax, which must not be there yet when flags are set for the parts.
    from llamapro_jax.flops import step_flops

    config, plan = architecture(args.tiny)
    tokens = args.rows * args.length
    useful = step_flops(config, plan, ("new",), args.length).total
    rates: dict[str, Any] = {}
    for part, seconds in rounds.items():
        values = found[part]
        rate = tokens / statistics.median(seconds)
        print(
            f"\n{part}: {values['version']}, {values['trained']:,} parameters train; best: "
            f"{describe(fastest(values['candidates']))}\n"
            f"{part}: {rate:,.0f} tokens/s, {rate * useful / 1e12:.1f} useful TFLOP/s "
            f"({useful / 1e9:.2f} GFLOP a token); s a step: "
            f"{', '.join(f'{s:.3f}' for s in seconds)}"
        )
        if part == "ours":
            rates["useful"] = rate * useful
    if len(rounds) == 2:
        pairs = zip(rounds["ours"], rounds["torch"], strict=True)
        rates["ratio"] = statistics.median(other / own for own, other in pairs)
    return rates


def peak_of(device: str) -> float | None:
    """The published peak of a card, of dense bfloat16 products."""
    return next(
        (chip.peak_flops for name, chip in CHIPS.items() if name in device.lower()), None
    )


def print_goals(found: dict[str, Found | None], rates: dict[str, Any], tiny: bool) -> int:
    """Prints the goals with what was measured. Returns the exit status."""
    device = next((part["device"] for part in found.values() if part and "device" in part), "")
    judged = JUDGED in device.lower() and not tiny
    goals: list[tuple[str, bool]] = []
    if kernels := found.get("kernels"):
        agree = [row["agrees"] for row in kernels["checks"]]
        text = "goal kernels: all agree with the reference, forward and backward; measured "
        goals.append((f"{text}{sum(agree)} of {len(agree)}", all(agree)))
    if "useful" in rates:
        matmul, peak = found["ours"]["matmul_flops"], peak_of(device)
        of_peak = f"{rates['useful'] / peak:.1%} of the peak, {peak / 1e12:.0f}; " if peak else ""
        goals.append(
            (
                f"goal useful rate: at least {USEFUL_RATE / 1e12:.0f} TFLOP/s; measured "
                f"{rates['useful'] / 1e12:.1f} ({of_peak}{rates['useful'] / matmul:.1%} of the "
                f"rate of a matrix product here, {matmul / 1e12:.0f})",
                rates["useful"] >= USEFUL_RATE,
            )
        )
    if "ratio" in rates:
        text = f"goal tokens/s: at least {TIMES_TORCH} times PyTorch's; measured "
        goals.append((f"{text}{rates['ratio']:.2f}", rates["ratio"] >= TIMES_TORCH))
    for text, met in goals:
        print(f"{text}; {('met' if met else 'missed') if judged else 'not judged here'}")
    # A kernel that is wrong is wrong anywhere.
    wrong = kernels is not None and not all(row["agrees"] for row in kernels["checks"])
    return 1 if wrong or (judged and not all(met for _, met in goals)) else 0


if __name__ == "__main__":
    sys.exit(main())
