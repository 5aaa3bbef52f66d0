"""The architecture of a model: sizes, rope, head, as the forward pass needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Who computes attention; `model.attention` says what each needs.
AttentionChoice = Literal["auto", "reference", "blockwise", "splash", "pallas_gpu", "cudnn"]
# What is kept for the backward pass; `model.remat` says what each keeps and costs.
Remat = Literal["none", "minimal", "attention", "full"]
RematChoice = Literal["auto", "none", "minimal", "attention", "full"]
Architecture = Literal["LlamaForCausalLM", "MistralForCausalLM"]
ARCHITECTURES: tuple[Architecture, ...] = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for positions beyond the pretraining length.

    `kind` "linear" divides every frequency by `factor`. "llama3" divides the low ones, keeps the
    high ones and blends between (transformers, `modeling_rope_utils`).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model. `num_blocks` counts all blocks: base and inserted."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None

    def size(self, dimension: str) -> int:
        """The size of a logical dimension, by its letter: V, D, F, H, K or C."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "H": self.num_heads,
            "K": self.num_kv_heads,
            "C": self.head_dim,
        }[dimension]
