"""Memory and time of convert, expand and export at the shapes of LLaMA2-7B.

Writes a synthetic checkpoint (bf16, several shards) and runs the three verbs on it one after the
other, each in a process of its own, with the identity proof and the self-check of the export.
Printed for each: the peak of its anonymous memory, sampled over the process tree, and its time
beside a plain copy of what it wrote. Exit status 1 when a goal is missed, 2 when it cannot run.

    python benchmarks/convert_7b.py --work-directory /scratch

Linux only. Anonymous memory (RssAnon, with what was swapped out) is what a process owns; pages of
files that it reads or writes are the system's, which takes them back at need.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from llamapro_jax.files import write_json
from llamapro_jax.hf.config import parse
from llamapro_jax.hf.safetensors import Planned, SafetensorsWriter
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import block_parameters, tensors, total_parameters

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
BF16 = np.dtype(ml_dtypes.bfloat16)
SAMPLE_SECONDS = 0.05
COPY_BUFFER = 16 * 2**20
# Random values made once; every tensor repeats them from another offset.
POOL_VALUES = 2**24
# Shards of a 7B are about this large on the hub.
MODEL_FRACTION_PER_SHARD = 0.3


@dataclass(frozen=True)
class Row:
    """One verb: bytes it wrote, its peak of anonymous memory, its seconds and those of a copy."""

    verb: str
    written: int
    peak: int
    seconds: float
    copy_seconds: float


def main() -> int:
    args = parse_arguments()
    if not Path("/proc/self/status").is_file():
        print("error: this benchmark reads /proc, which this system lacks", file=sys.stderr)
        return 2
    values = architecture(args.blocks, args.shrink)
    config = parse(values)
    args.work_directory.mkdir(parents=True, exist_ok=True)
    # The largest moment: the expanded model and its export, or a model and the plain copy of it.
    expanded = 2 * (total_parameters(config) + args.new_blocks * block_parameters(config))
    needed = int(2.05 * expanded)
    free = shutil.disk_usage(args.work_directory).free
    if free < needed:
        print(
            f"error: {args.work_directory}: has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} "
            "GB are needed; name another place with --work-directory",
            file=sys.stderr,
        )
        return 2
    # The temporary directory is removed when the process is asked to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="convert_7b-", dir=args.work_directory) as directory:
        rows = measure(Path(directory), values, args.new_blocks)
    print_table(rows, config)
    return print_goals(rows, args.limit_gib)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the base (32)")
    parser.add_argument("--new-blocks", type=int, default=8, help="blocks to insert (8)")
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        choices=(1, 2, 4, 8, 16, 32),
        help="divide width, heads, feed-forward and vocabulary by this, for a quick look (1)",
    )
    parser.add_argument("--limit-gib", type=float, default=2.5, help="goal for each verb (2.5)")
    parser.add_argument(
        "--work-directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the models are written and removed; about 35 GB at full size",
    )
    return parser.parse_args()


def architecture(blocks: int, shrink: int) -> dict[str, object]:
    """The config.json of LLaMA2-7B with other sizes: the very keys of the published file."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096 // shrink,
        "initializer_range": 0.02,
        "intermediate_size": 11008 // shrink,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32 // shrink,
        "num_hidden_layers": blocks,
        "num_key_value_heads": 32 // shrink,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000 // shrink,
    }


def write_checkpoint(directory: Path, values: dict[str, object]) -> None:
    """A Hugging Face directory whose weights have the scale of a fresh LLaMA; no tokenizer."""
    directory.mkdir()
    write_json(directory / "config.json", values)
    config = parse(values)
    planned = [Planned(t.name, t.weight.hf_shape(config), BF16) for t in tensors(config)]
    shard_bytes = int(MODEL_FRACTION_PER_SHARD * 2 * total_parameters(config))
    pool = (0.02 * np.random.default_rng(0).standard_normal(POOL_VALUES, np.float32)).astype(BF16)
    writer = SafetensorsWriter(directory, planned, shard_bytes)
    for number, tensor in enumerate(planned):
        if len(tensor.shape) == 1:
            array = np.ones(tensor.shape, BF16)
        else:
            array = np.resize(pool[7919 * number % (POOL_VALUES // 2) :], tensor.shape)
        writer.write(tensor.name, array)
    writer.close()


def measure(directory: Path, values: dict[str, object], new_blocks: int) -> list[Row]:
    """Runs the verbs in turn; what the next one does not read is removed at once."""
    source = directory / "source"
    begin = time.perf_counter()
    write_checkpoint(source, values)
    print(f"synthetic checkpoint written in {time.perf_counter() - begin:.0f} s", flush=True)
    rows = []
    for verb, options in (
        ("convert", []),
        ("expand", ["--blocks", str(new_blocks)]),
        ("export", []),
    ):
        destination = directory / verb
        command = [sys.executable, "-m", "llamapro_jax.cli", verb]
        command += [str(source), str(destination), *options]
        os.sync()
        begin = time.perf_counter()
        peak = run_sampled(command)
        os.sync()
        seconds = time.perf_counter() - begin
        shutil.rmtree(source)
        begin = time.perf_counter()
        written = plain_copy(destination, directory / "copy")
        os.sync()
        copy_seconds = time.perf_counter() - begin
        shutil.rmtree(directory / "copy")
        rows.append(Row(verb, written, peak, seconds, copy_seconds))
        print(f"{verb}: {peak / GIB:.2f} GiB, {seconds:.0f} s", flush=True)
        source = destination
    return rows


def run_sampled(command: list[str]) -> int:
    """Runs a command from the root of the repository. Returns its peak of anonymous bytes.

    The samples are taken over the whole process tree. What the command printed is shown when it
    fails, and then the benchmark ends.
    """
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
        if process.returncode:
            print(text, file=sys.stderr)
            raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
        print(text, end="")
    return peak


def process_tree(pid: int) -> Iterator[int]:
    """The process and all its descendants that still live."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                yield from process_tree(int(child))
        except OSError:
            continue


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process tree now, resident or swapped out."""
    total = 0
    for member in process_tree(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(
            1024 * int(line.split()[1])
            for line in lines
            if line.startswith(("RssAnon:", "VmSwap:"))
        )
    return total


def plain_copy(source: Path, destination: Path) -> int:
    """Copies a directory by reading and writing alone. Returns the number of bytes."""
    total = 0
    for path in sorted(source.rglob("*")):
        target = destination / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as reading, open(target, "wb") as writing:
            shutil.copyfileobj(reading, writing, COPY_BUFFER)
        total += path.stat().st_size
    return total


def print_table(rows: list[Row], config: ModelConfig) -> None:
    print(
        f"\n{total_parameters(config):,} parameters in {config.num_blocks} blocks, bf16, on "
        f"{os.cpu_count()} cores; seconds include the flush to the disk\n"
    )
    print("| verb | GB written | peak anonymous GiB | seconds | plain copy, seconds | ratio |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.verb} | {row.written / 1e9:.2f} | {row.peak / GIB:.2f} | {row.seconds:.1f} "
            f"| {row.copy_seconds:.1f} | {row.seconds / row.copy_seconds:.1f} |"
        )
    print()


def print_goals(rows: list[Row], limit_gib: float) -> int:
    """Prints each goal with what was measured. Returns the exit status."""
    met = [row.peak <= limit_gib * GIB for row in rows]
    for row, ok in zip(rows, met, strict=True):
        print(
            f"goal {row.verb}: anonymous memory at most {limit_gib:g} GiB; "
            f"measured {row.peak / GIB:.2f} GiB; {'met' if ok else 'missed'}"
        )
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
