"""A training step of the new blocks beside full fine-tuning, and beside transformers + PyTorch.

One model of 16 + 4 blocks, 512 wide, with random weights, in float32 with AdamW and clipping:

- new: our step, which trains the new blocks;
- all: our step, which trains the same model as a whole;
- torch: transformers + PyTorch, which trains the same new blocks from the same weights (left out
  where PyTorch is not installed). Its losses must be ours.

The three take their steps in turn in this process, so that a busy machine slows them alike, and
the ratios are of steps next to each other. Exit status 1 when a goal is missed, 2 when the losses
differ.

    python benchmarks/step.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from llamapro_jax.expansion import ExpansionPlan, spread
from llamapro_jax.flops import step_flops
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import Params
from llamapro_jax.model.params import block_row, init_params
from llamapro_jax.model.precision import full_precision
from llamapro_jax.model.weights import BLOCK_BY_NAME, tensors, total_parameters
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.training.state import init_state, labels, merge, partition
from llamapro_jax.training.step import build_train_step

# For `benchmarks.torch_model`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The frozen step may take this much more of the full step's time than it does of its FLOPs.
SLACK = 1.05
# The frozen step may take this much of PyTorch's time, with the same blocks frozen.
OF_TORCH = 1.5
# Largest relative difference of a loss of ours and PyTorch's in any step.
LOSS_TOLERANCE = 1e-3
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0)

Batch = dict[str, np.ndarray]
# One figure a step, by contender.
Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Contender:
    """step: takes a batch and returns its loss when the step is done. temporary: bytes or None."""

    name: str
    step: Callable[[Batch], float]
    temporary: int | None = None


def main() -> int:
    args = parse_arguments()
    plan = ExpansionPlan(args.blocks).expand(spread(args.blocks, args.new_blocks))
    config = architecture(args, plan)
    params = grown_params(config, plan)
    batches = [random_batch(args, config, seed) for seed in range(args.rounds + 1)]
    contenders = [
        ours("new", ("new",), config, plan, params, batches[0]),
        ours("all", ("all",), config, plan, params, batches[0]),
    ]
    if not args.no_torch and (other := torch_contender(config, plan, params, args.threads)):
        contenders.append(other)
    print_header(args, config)
    seconds, cpu, losses = take_turns(contenders, batches)
    print_table(contenders, seconds, cpu, config, plan, args)
    if "torch" in losses and not same_losses(losses):
        return 2
    print(f"CPU seconds of new / all: {ratio(cpu, 'new', 'all'):.3f} (steadier on a busy machine)")
    return print_goals(seconds, config, plan, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--feed-forward", type=int, default=1376)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=16, help="blocks of the base (16)")
    parser.add_argument("--new-blocks", type=int, default=4, help="blocks inserted (4)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each (7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (all)")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model, to see that the benchmark runs"
    )
    args = parser.parse_args()
    if args.small:
        args.width, args.feed_forward, args.vocabulary = 64, 160, 256
        args.blocks, args.new_blocks, args.rows, args.length, args.rounds = 4, 2, 2, 32, 2
    return args


def architecture(args: argparse.Namespace, plan: ExpansionPlan) -> ModelConfig:
    heads = args.width // 64 or 1
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.feed_forward,
        num_blocks=plan.num_blocks,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=args.width // heads,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=args.length,
        tie_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        sliding_window=None,
    )


def grown_params(config: ModelConfig, plan: ExpansionPlan) -> Params:
    """Random weights; the projections of the new blocks that an expansion zeroes are zero."""
    params = init_params(jax.random.key(0), config, plan, jnp.float32)
    for leaves in params["new"]:
        for name in leaves:
            if BLOCK_BY_NAME[name].zeroed:
                leaves[name] = jnp.zeros_like(leaves[name])
    return params


def random_batch(args: argparse.Namespace, config: ModelConfig, seed: int) -> Batch:
    shape = (args.rows, args.length)
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, config.vocab_size, shape, dtype=np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(args.length, dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, np.bool_),
    }


def ours(
    name: str,
    spec: tuple[str, ...],
    config: ModelConfig,
    plan: ExpansionPlan,
    params: Params,
    batch: Batch,
) -> Contender:
    rows, length = batch["tokens"].shape
    run = RunConfig(
        model="random weights",
        output="none",
        data=DataConfig(length, rows, (SourceConfig("random", "none"),)),
        training=TrainingConfig(steps=1000),
        trainable=spec,
        compute_dtype="float32",
        optimizer=OPTIMIZER,
    )
    # A step uses up its state, so each contender has its own.
    trainable, frozen = partition(jax.tree.map(jnp.copy, params), spec)
    optimizer = build_optimizer(
        run.optimizer, run.training.steps, labels(merge(trainable, frozen), spec)
    )
    state = init_state(trainable, frozen, optimizer)
    with full_precision(jnp.float32):
        step = build_train_step(config, plan, run, optimizer).lower(state, frozen, batch).compile()

    def take(batch: Batch) -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return Contender(name, take, step.memory_analysis().temp_size_in_bytes)


def torch_contender(
    config: ModelConfig, plan: ExpansionPlan, params: Params, threads: int
) -> Contender | None:
    """The model of `params` in transformers, of which the same blocks train."""
    try:
        import torch
    except ImportError:
        return None
    from benchmarks import torch_model

    torch.set_num_threads(threads)
    model = torch_model.build(config, plan, "float32")
    state = {}
    for tensor in tensors(config):
        leaves = params if tensor.block is None else block_row(params, plan, tensor.block)
        array = np.asarray(leaves[tensor.weight.name])
        # A copy, since PyTorch trains in place.
        state[tensor.name] = torch.from_numpy(tensor.weight.to_hf(array, config).copy())
    model.load_state_dict(state)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch_model.adamw(trained, OPTIMIZER)

    def take(batch: Batch) -> float:
        tokens = torch.from_numpy(batch["tokens"]).long()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Contender("torch", take)


def take_turns(contenders: list[Contender], batches: list[Batch]) -> tuple[Figures, ...]:
    """Seconds, CPU seconds and losses of the steps. The first batch warms up and is not timed."""
    seconds, cpu, losses = ({contender.name: [] for contender in contenders} for _ in range(3))
    for number, batch in enumerate(batches):
        for contender in contenders:
            began, cpu_began = time.perf_counter(), time.process_time()
            losses[contender.name].append(contender.step(batch))
            if number:
                seconds[contender.name].append(time.perf_counter() - began)
                cpu[contender.name].append(time.process_time() - cpu_began)
    return seconds, cpu, losses


def print_header(args: argparse.Namespace, config: ModelConfig) -> None:
    print(
        f"{args.blocks} + {args.new_blocks} blocks, {args.width} wide, {args.feed_forward} "
        f"feed-forward, vocabulary {args.vocabulary}: {total_parameters(config):,} parameters; "
        f"{args.rows} x {args.length} tokens, float32; {jax.default_backend()}, "
        f"{os.cpu_count()} cores; {args.rounds} rounds after one to warm up\n"
    )


def print_table(
    contenders: list[Contender],
    seconds: Figures,
    cpu: Figures,
    config: ModelConfig,
    plan: ExpansionPlan,
    args: argparse.Namespace,
) -> None:
    tokens = args.rows * args.length
    print(
        f"{'':8}{'s/step':>9}{'CPU s':>9}{'tokens/s':>11}{'useful GFLOP/s':>16}"
        f"{'temporary MiB':>15}"
    )
    for contender in contenders:
        name = contender.name
        spec = ("all",) if name == "all" else ("new",)
        rate = tokens / statistics.median(seconds[name])
        useful = rate * step_flops(config, plan, spec, args.length).total / 1e9
        memory = "" if contender.temporary is None else f"{contender.temporary / 2**20:.0f}"
        print(
            f"{name:8}{statistics.median(seconds[name]):9.3f}{statistics.median(cpu[name]):9.3f}"
            f"{rate:11.0f}{useful:16.1f}{memory:>15}"
        )
    print()


def same_losses(losses: Figures) -> bool:
    """Whether PyTorch did the same work: its losses are ours in every step, updates included."""
    pairs = zip(losses["new"], losses["torch"], strict=True)
    difference = max(abs(one - other) / abs(other) for one, other in pairs)
    same = difference <= LOSS_TOLERANCE
    print(
        f"losses of new and torch differ by {difference:.1e} at most over {len(losses['new'])} "
        f"steps: {'the same work' if same else 'NOT the same work, the times do not compare'}"
    )
    return same


def ratio(seconds: Figures, one: str, other: str) -> float:
    """The median over the rounds of the one's time as a share of the other's."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def print_goals(
    seconds: Figures,
    config: ModelConfig,
    plan: ExpansionPlan,
    args: argparse.Namespace,
) -> int:
    """Prints the ratios and the goals. Returns the exit status."""
    flops = {s: step_flops(config, plan, (s,), args.length).total for s in ("new", "all")}
    of_flops = flops["new"] / flops["all"]
    print(f"useful FLOPs of new / all: {of_flops:.3f}")
    limit = SLACK * of_flops
    goals = [("all", limit, f"{limit:.3f}, the ratio of the FLOPs x {SLACK}")]
    if "torch" in seconds:
        goals.append(("torch", OF_TORCH, f"{OF_TORCH}"))
    else:
        print("time of new / torch: not measured")
    status = 0
    for other, most, text in goals:
        measured = ratio(seconds, "new", other)
        word = "met" if measured <= most else "missed"
        status = status if measured <= most else 1
        print(f"goal time of new / {other}: at most {text}; measured {measured:.3f}; {word}")
    return status


if __name__ == "__main__":
    sys.exit(main())
