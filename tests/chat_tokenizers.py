"""Two small tokenizers for tests of chat data: one as LLaMA 2 has it, one as LLaMA 3."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llamapro_jax.files import write_json
from llamapro_jax.hf.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [inspect.getsource(random), "<|user|>\n<|assistant|>\n naïve café “quoted” 你好\n" * 40]
# The pattern of LLaMA 3.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|header|>", "<|header_end|>", "<|turn_end|>"]


def sentencepiece_tokenizer(directory: Path) -> Tokenizer:
    """BPE of SentencePiece with a dummy prefix and byte fallback; `<s>` and `</s>`."""
    return train_tokenizer(TEXTS, 900, directory)


def byte_level_tokenizer(directory: Path) -> Tokenizer:
    """Byte-level BPE; `<|begin|>`, and `<|end|>` as the end token."""
    engine = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(TEXTS, trainer)
    engine.add_special_tokens(SPECIAL)
    engine.add_tokens(["<think>"])
    directory.mkdir(parents=True, exist_ok=True)
    engine.save(str(directory / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    write_json(directory / "tokenizer_config.json", names)
    return load_tokenizer(directory)
