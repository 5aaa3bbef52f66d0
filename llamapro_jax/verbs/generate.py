"""Continue a text. It is printed as it is made, after the prompt.

MODEL may be a Flax checkpoint, a run, a Hugging Face directory or a hub id. Without
--temperature the most likely token is taken each time.
"""

from __future__ import annotations

import argparse

from llamapro_jax.compilation_cache import AUTO, enabled

HELP = "continue a text"
EXAMPLE = """\
llamapro generate runs/llama2_7b_pro "def fibonacci(n):"
llamapro generate runs/llama2_7b_pro "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
llamapro generate runs/llama2_7b_pro "The capital of France is" --generations 0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model")
    add("prompt", metavar="PROMPT", help="the text to continue")
    add("--max-tokens", type=int, metavar="N", help="most new tokens (default 128, or what fits)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (the default)")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (default 1: all)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of what is drawn (default 0)")
    add("--strength", type=float, default=1.0, metavar="S", help="of the new blocks, 0 to 1")
    add("--generations", type=int, metavar="G", help="the model after G expansions; 0 the original")
    add("--dtype", default="float32", metavar="TYPE", help="float32 (the default) or bfloat16")
    add("--allow-bin", action="store_true", help="read .bin weights, which needs PyTorch")


@enabled(AUTO)
def run(args: argparse.Namespace) -> None:
    from llamapro_jax.generate import check_length, prompt_ids
    from llamapro_jax.model.api import open_model
    from llamapro_jax.sampling import Sampling

    Sampling(args.temperature, args.top_k, args.top_p, args.seed)  # checked before a model loads
    opened = open_model(
        args.model,
        dtype=args.dtype,
        generation=args.generations,
        strength=args.strength,
        allow_bin=args.allow_bin,
    )
    check_length(opened, prompt_ids(opened, args.prompt), args.max_tokens)
    pieces = opened.load().stream(
        args.prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
