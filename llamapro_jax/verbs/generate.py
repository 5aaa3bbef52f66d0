"""Continue a text, or answer with --chat. What is made is printed as it is made, after the prompt.

With --chat PROMPT is what a user says: it is put into the model's own chat template, the answer
alone is printed, and it ends where the template ends an answer.

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
llamapro generate runs/llama2_7b_pro "The capital of France is" --generations 0
llamapro generate runs/llama2_7b_pro_instruct "What is the capital of France?" --chat"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model")
    add("prompt", metavar="PROMPT", help="the text to continue, or what a user says")
    add("--chat", action="store_true", help="answer PROMPT in the model's chat template")
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
    from llamapro_jax import generate
    from llamapro_jax.model.api import open_model
    from llamapro_jax.sampling import Sampling

    # Checked before a model loads.
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    opened = open_model(
        args.model,
        dtype=args.dtype,
        generation=args.generations,
        strength=args.strength,
        allow_bin=args.allow_bin,
    )
    messages = [{"role": "user", "content": args.prompt}]
    ids = (
        generate.chat_ids(opened, messages)
        if args.chat
        else generate.prompt_ids(opened, args.prompt)
    )
    generate.check_length(opened, ids, args.max_tokens)
    model = opened.load()
    if args.chat:
        pieces = generate.stream_answer(
            model, messages, max_tokens=args.max_tokens, sampling=sampling
        )
    else:
        pieces = generate.stream_text(
            model, args.prompt, max_tokens=args.max_tokens, sampling=sampling
        )
        print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
