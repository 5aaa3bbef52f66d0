"""The bytes of a run's checkpoint, and the time for which saving one holds the training step up.

Bytes: of LLaMA2-7B + 8 new blocks, from the shapes of what is saved, with `trainable: new` and with
everything trained; and of a smaller model, from its shapes and on disk.

Time: of that model's steps, with a save and without, in turn in one process, so that a busy machine
slows both alike. A save costs what it holds the step up for (the checksums of the frozen weights,
those of what is saved, and its copy), and what the steps lose while it is written behind them.
Beside that stands what memory and disk do with as many bytes. The goal is for the interval of
configs/llama2_7b_pro.yaml. Exit status 1 when a goal is missed.

    python benchmarks/checkpoint.py --directory /path/on/the/disk/in/question
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.architecture import described
from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_files import COMMIT_FILE
from llamapro_jax.checksum import checksums
from llamapro_jax.config import MeshConfig, RunConfig, load_config
from llamapro_jax.expansion import ExpansionPlan, spread
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.params import init_params
from llamapro_jax.model.precision import full_precision
from llamapro_jax.model.weights import total_parameters
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.sharding import build_mesh
from llamapro_jax.training.abstract import abstract_arguments
from llamapro_jax.training.state import init_state, labels, merge, partition
from llamapro_jax.training.step import build_train_step

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "llama2_7b_pro.yaml"
PLANNED = ROOT / "docs" / "capacity.json"

# Of the bytes of a checkpoint of the same model of which everything trains.
OF_FULL = 0.20
# Of the arrays' bytes: the descriptions beside them, less what compression saves.
ON_DISK = 1.01
# Of the time of training, at the interval of the recipe.
STALL = 0.05
# Bytes of a checkpoint whose time is that of its bytes, and not of its many files.
LARGE = 10**8
NEW, ALL = ("new",), ("all",)


@dataclass(frozen=True)
class Save:
    """One save, in seconds. frozen, state: for which the step stood still. behind: until it was on
    disk. slower: what the steps beside it took more than steps without."""

    frozen: float
    state: float
    behind: float
    slower: float

    @property
    def total(self) -> float:
        return self.frozen + self.state + self.slower


def main() -> int:
    args = parse_arguments()
    recipe = load_config(RECIPE)
    plan = ExpansionPlan(args.blocks).expand(spread(args.blocks, args.new_blocks))
    config = shrunk(recipe, plan, args)
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="checkpoint-") as directory:
        run = Run(config, plan, small_run(recipe, args), Path(directory))
        print_header(args, config)
        plain, saves = run.measure(args.rounds, args.steps)
        sizes = run.sizes()
        status = print_bytes(recipe, config, plan, sizes)
        limits = physical(Path(directory), sizes)
    print_saves(saves, sizes, limits)
    return print_stall(recipe, plain, saves, sizes) | status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--directory", help="where checkpoints are written, and removed again")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--feed-forward", type=int, default=5504)
    parser.add_argument("--blocks", type=int, default=8, help="blocks of the base (8)")
    parser.add_argument("--new-blocks", type=int, default=2, help="blocks inserted (2)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a step (256)")
    parser.add_argument("--rounds", type=int, default=5, help="saves (5)")
    parser.add_argument("--steps", type=int, default=4, help="steps after each, and without (4)")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model, to see that the benchmark runs"
    )
    args = parser.parse_args()
    if args.small:
        args.width, args.feed_forward, args.blocks, args.length = 128, 320, 4, 32
        args.rounds, args.steps = 2, 2
    return args


# ------------------------------------------------------------------- models


def shrunk(recipe: RunConfig, plan: ExpansionPlan, args: argparse.Namespace) -> ModelConfig:
    """The recipe's model with fewer and narrower blocks, and a small vocabulary."""
    assert recipe.architecture is not None
    config, _ = described(recipe.architecture)
    heads = args.width // config.head_dim
    return replace(
        config,
        vocab_size=8192,
        hidden_size=args.width,
        intermediate_size=args.feed_forward,
        num_heads=heads,
        num_kv_heads=heads,
        num_blocks=plan.num_blocks,
        max_position_embeddings=args.length,
    )


def small_run(recipe: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The recipe for a row at a time in float32, which is what a CPU computes with."""
    return replace(
        recipe,
        data=replace(recipe.data, sequence_length=args.length, batch_size=1),
        training=replace(recipe.training, remat="none", microbatch=1),
        compute_dtype="float32",
    )


def saved_bytes(config: ModelConfig, plan: ExpansionPlan, run: RunConfig) -> int:
    """Of the arrays of a checkpoint: what trains, and the optimizer's state."""
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = abstract_arguments(config, plan, run, mesh).state
    leaves = jax.tree.leaves((state.trainable, state.opt_state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class Run:
    """A training step on random weights, and saves as `training.loop` makes them."""

    def __init__(
        self, config: ModelConfig, plan: ExpansionPlan, run: RunConfig, directory: Path
    ) -> None:
        self._directory, self._keep, self._number = directory, run.training.keep, 0
        params = init_params(jax.random.key(0), config, plan, jnp.float32)
        trainable, self._frozen = partition(params, NEW)
        del params
        optimizer = build_optimizer(
            run.optimizer, run.training.steps, labels(merge(trainable, self._frozen), NEW)
        )
        self._state = init_state(trainable, self._frozen, optimizer)
        self._batch = batch(run, config)
        with full_precision(jnp.float32):
            step = build_train_step(config, plan, run, optimizer)
            self._step = step.lower(self._state, self._frozen, self._batch).compile()
        self._before = checksums(self._frozen)

    def measure(self, rounds: int, steps: int) -> tuple[float, list[Save]]:
        """The seconds of a step without a save, and each save. The first one warms up."""
        plain: list[float] = []
        saves: list[Save] = []
        with Checkpoints(self._directory, self._keep) as checkpoints:
            self._take(1)
            self._saved(checkpoints, 1)
            for _ in range(rounds):
                plain += (before := self._take(steps))
                frozen, state, behind, taken = self._saved(checkpoints, steps)
                slower = sum(taken) - steps * statistics.median(before)
                saves.append(Save(frozen, state, behind, slower))
        if checkpoints.saved != self._number:
            raise SystemExit("error: a save failed")
        return statistics.median(plain), saves

    def sizes(self) -> dict[str, int]:
        """Bytes: of the frozen weights, of what is saved, and of its files."""
        files = (self._directory / str(self._number)).rglob("*")
        saved = (self._state.trainable, self._state.opt_state)
        return {
            "frozen": sum(leaf.nbytes for leaf in jax.tree.leaves(self._frozen)),
            "state": sum(leaf.nbytes for leaf in jax.tree.leaves(saved)),
            "disk": sum(file.stat().st_size for file in files if file.is_file()),
        }

    def _take(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            self._state, _ = self._step(self._state, self._frozen, self._batch)
            jax.block_until_ready(self._state)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _saved(
        self, checkpoints: Checkpoints, steps: int
    ) -> tuple[float, float, float, list[float]]:
        """Seconds of the frozen checksums, of what `save` keeps the caller for, and until the
        step is on disk; and those of the steps beside."""
        self._number += 1
        began = time.perf_counter()
        assert checksums(self._frozen) == self._before
        frozen = time.perf_counter() - began
        state = self._state
        # As in a run, it looks at the save before, which has long ended, and deletes an older one.
        checkpoints.save(self._number, state.trainable, state.opt_state, {})
        kept = time.perf_counter() - began - frozen
        del state
        written = _Written(self._directory / str(self._number) / COMMIT_FILE)
        taken = self._take(steps)
        behind = written.seconds()
        return frozen, kept, behind, taken


class _Written:
    """Waits for a file beside the steps."""

    def __init__(self, file: Path) -> None:
        self._file, self._began, self._took = file, time.perf_counter(), 0.0
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def seconds(self) -> float:
        self._thread.join()
        return self._took

    def _wait(self) -> None:
        while not self._file.is_file() and self._took < 600:
            time.sleep(0.01)
            self._took = time.perf_counter() - self._began


def batch(run: RunConfig, config: ModelConfig) -> Mapping[str, np.ndarray]:
    shape = (run.data.batch_size, run.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    return {
        "tokens": tokens,
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, np.bool_),
    }


def physical(directory: Path, sizes: Mapping[str, int]) -> dict[str, float]:
    """Seconds in which one thread reads and copies so many bytes, and the disk takes them."""
    data = np.random.default_rng(0).integers(0, 2**32, sizes["state"] // 4, dtype=np.uint32)
    copy = np.zeros_like(data)
    began = time.perf_counter()
    data.max()
    read = time.perf_counter() - began
    began = time.perf_counter()
    np.copyto(copy, data)
    copied = time.perf_counter() - began
    file = directory / "plain"
    began = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        left = memoryview(data).cast("B")
        while left:
            left = left[out.write(left[: 2**26]) :]
        os.fsync(out.fileno())
    written = time.perf_counter() - began
    file.unlink()
    scale = sizes["frozen"] / data.nbytes
    return {"frozen": read * scale, "state": copied, "disk": written}


# ------------------------------------------------------------------- what is printed


def print_header(args: argparse.Namespace, config: ModelConfig) -> None:
    print(
        f"{args.blocks} + {args.new_blocks} blocks, {args.width} wide, {args.feed_forward} "
        f"feed-forward: {total_parameters(config):,} parameters, float32, {args.length} tokens a "
        f"step; {jax.default_backend()}, {os.cpu_count()} cores; {args.rounds} saves after one to "
        "warm up\n"
    )


def print_bytes(
    recipe: RunConfig, config: ModelConfig, plan: ExpansionPlan, sizes: Mapping[str, int]
) -> int:
    """The table of bytes and its goals. Returns the exit status."""
    assert recipe.architecture is not None
    print(f"{'bytes of a checkpoint':28}{'trains new':>18}{'trains all':>18}{'share':>9}")
    found = []
    for name, (model, its_plan) in {
        "LLaMA2-7B + 8 new blocks": described(recipe.architecture),
        "this model": (config, plan),
    }.items():
        new, everything = (
            saved_bytes(model, its_plan, replace(recipe, trainable=spec)) for spec in (NEW, ALL)
        )
        found.append((new, everything))
        print(f"{name:28}{new:18,}{everything:18,}{new / everything:9.2%}")
    print(f"{'  its arrays':28}{sizes['state']:18,}\n{'  on disk':28}{sizes['disk']:18,}\n")
    (new, everything), (shapes, _) = found
    status = print_goal("bytes, 7B", OF_FULL, new / everything, "of a full checkpoint's")
    status |= print_goal("on disk", ON_DISK, sizes["disk"] / shapes, "of what the shapes say")
    if sizes["state"] != shapes:
        print("the arrays are NOT what the shapes say")
        status = 1
    print()
    return status


def print_saves(saves: list[Save], sizes: Mapping[str, int], limits: Mapping[str, float]) -> None:
    """A save by its parts, and the same bytes by what memory and disk do."""

    def line(what: str, name: str, size: str = "", limit: str = "") -> None:
        seconds = statistics.median(getattr(save, name) for save in saves)
        beside = f"{sizes[size] / 1e9:8.2f}" if size else " " * 8
        against = f"{limits[size]:9.2f}  {limit}" if size else ""
        print(f"{what:40}{beside}{seconds:9.2f}{against}")

    print(f"{f'a save, median of {len(saves)}':40}{'GB':>8}{'s':>9}{'limit, s':>9}")
    line("checksums of the frozen weights", "frozen", "frozen", "one thread reads them")
    line("checksums and copy of what is saved", "state", "state", "one thread copies it")
    line("slower steps while it is written", "slower")
    line("in all, what training pays", "total")
    line("until it is on disk, beside the steps", "behind", "disk", "a plain file and its flush")
    print()


def print_stall(recipe: RunConfig, step: float, saves: list[Save], sizes: Mapping[str, int]) -> int:
    """The goal of the time, and what it comes to for the 7B. Returns the exit status."""
    every = recipe.training.save_every
    assert every is not None
    total = statistics.median(save.total for save in saves)
    print(f"a step without a save takes {step:.2f} s; {RECIPE.name} saves every {every} steps")
    print(f"{STALL:.0%} would be reached with a save every {total / STALL / step:.0f} steps")
    status = print_goal("stall", STALL, total / (every * step), "of the time of training")
    if sizes["state"] > LARGE:
        print_estimate(recipe, every, saves, sizes)
    return status


def print_estimate(
    recipe: RunConfig, every: int, saves: list[Save], sizes: Mapping[str, int]
) -> None:
    """What the 7B would pay, were its hosts as fast as this one: arithmetic, not a measurement."""
    assert recipe.architecture is not None
    config, plan = described(recipe.architecture)
    state = saved_bytes(config, plan, recipe)
    # Frozen weights are kept in bfloat16; new ones have a master and two moments in float32.
    frozen = 2 * (total_parameters(config) - state // 12)
    seconds = frozen / sizes["frozen"] * statistics.median(save.frozen for save in saves)
    seconds += state / sizes["state"] * statistics.median(save.state for save in saves)
    print(
        f"\nestimate, LLaMA2-7B + 8: {frozen / 1e9:.1f} GB frozen and {state / 1e9:.1f} GB saved "
        f"would hold a step up for {seconds:.0f} s, at the rates above and on a single host"
    )
    planned = json.loads(PLANNED.read_text())
    for machine in ("h200-1", "v5p-128"):
        least = planned[f"{RECIPE.stem} {machine}"]["step_seconds_roofline"]
        print(
            f"  {machine}: {every} steps take at least {every * least:,.0f} s by `llamapro plan`; "
            f"that would be {seconds / (every * least):.2%} of them"
        )


def print_goal(name: str, most: float, measured: float, of: str) -> int:
    met = measured <= most
    print(
        f"goal {name}: at most {most:.1%} {of}; measured {measured:.2%}; "
        f"{'met' if met else 'missed'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
