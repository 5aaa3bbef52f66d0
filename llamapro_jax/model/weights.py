"""The table of weights. Shapes, init, import, export, labels, counts and FLOPs derive from it.

Dimensions: V vocabulary, D model, F feed-forward, H query heads, K key/value heads, C head dim.
A new tensor is one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamapro_jax.model.config import ModelConfig


def _always(config: ModelConfig) -> bool:
    return True


@dataclass(frozen=True)
class Weight:
    """One row: a tensor of ours and the Hugging Face tensor that it is.

    dims: our logical dimensions, a letter each: the shape and the logical axes.
    hf_dims: the dimensions of the Hugging Face tensor; "HC" is heads and head dim in one.
    zeroed: set to zero in an inserted block, so that the block adds nothing at first.
    multiplies: takes part in a matrix product, hence counts in FLOPs.
    present: whether a model of this configuration has it.
    """

    name: str
    dims: str
    hf_name: str
    hf_dims: tuple[str, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    zeroed: bool = False
    multiplies: bool = False
    present: Callable[[ModelConfig], bool] = _always

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(config.size(d) for d in self.dims)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(math.prod(config.size(d) for d in group) for group in self.hf_dims)

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices: norms and biases are exempt."""
        return self.init == "normal"

    @property
    def contracted(self) -> str:
        """The dimensions that a product with this matrix sums over; the others are its output."""
        return "D" if self.dims[0] == "D" else self.dims[:-1]

    def size(self, config: ModelConfig) -> int:
        return math.prod(self.shape(config))

    def from_hf(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The Hugging Face tensor in our layout. A view where the memory order allows it."""
        order = "".join(self.hf_dims)
        split = array.reshape([config.size(d) for d in order])
        return split.transpose([order.index(d) for d in self.dims])

    def to_hf(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Our array in the layout of the Hugging Face tensor, contiguous."""
        order = "".join(self.hf_dims)
        moved = array.transpose([self.dims.index(d) for d in order])
        return np.ascontiguousarray(moved).reshape(self.hf_shape(config))


def _attention_bias(config: ModelConfig) -> bool:
    return config.attention_bias


def _mlp_bias(config: ModelConfig) -> bool:
    return config.mlp_bias


def _untied(config: ModelConfig) -> bool:
    return not config.tie_embeddings


# fmt: off
BLOCK: tuple[Weight, ...] = (
    Weight("attention_norm", "D", "input_layernorm.weight", ("D",), init="ones"),
    Weight("q", "DHC", "self_attn.q_proj.weight", ("HC", "D"), multiplies=True),
    Weight("k", "DKC", "self_attn.k_proj.weight", ("KC", "D"), multiplies=True),
    Weight("v", "DKC", "self_attn.v_proj.weight", ("KC", "D"), multiplies=True),
    Weight("o", "HCD", "self_attn.o_proj.weight", ("D", "HC"), zeroed=True, multiplies=True),
    Weight("q_bias", "HC", "self_attn.q_proj.bias", ("HC",), "zeros", present=_attention_bias),
    Weight("k_bias", "KC", "self_attn.k_proj.bias", ("KC",), "zeros", present=_attention_bias),
    Weight("v_bias", "KC", "self_attn.v_proj.bias", ("KC",), "zeros", present=_attention_bias),
    Weight("o_bias", "D", "self_attn.o_proj.bias", ("D",), "zeros", zeroed=True,
           present=_attention_bias),
    Weight("mlp_norm", "D", "post_attention_layernorm.weight", ("D",), init="ones"),
    Weight("gate", "DF", "mlp.gate_proj.weight", ("F", "D"), multiplies=True),
    Weight("up", "DF", "mlp.up_proj.weight", ("F", "D"), multiplies=True),
    Weight("down", "FD", "mlp.down_proj.weight", ("D", "F"), zeroed=True, multiplies=True),
    Weight("gate_bias", "F", "mlp.gate_proj.bias", ("F",), "zeros", present=_mlp_bias),
    Weight("up_bias", "F", "mlp.up_proj.bias", ("F",), "zeros", present=_mlp_bias),
    Weight("down_bias", "D", "mlp.down_proj.bias", ("D",), "zeros", zeroed=True, present=_mlp_bias),
)
OUTER: tuple[Weight, ...] = (
    Weight("embed", "VD", "model.embed_tokens.weight", ("V", "D")),
    Weight("final_norm", "D", "model.norm.weight", ("D",), init="ones"),
    Weight("head", "VD", "lm_head.weight", ("V", "D"), multiplies=True, present=_untied),
)
# fmt: on

BLOCK_BY_NAME = {weight.name: weight for weight in BLOCK}
OUTER_BY_NAME = {weight.name: weight for weight in OUTER}


def block_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows of one block of this model."""
    return tuple(weight for weight in BLOCK if weight.present(config))


def outer_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows outside the blocks: embedding, final norm, and the head unless it is tied."""
    return tuple(weight for weight in OUTER if weight.present(config))


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor of a model: its row, and its block in depth order (None: outside)."""

    weight: Weight
    block: int | None

    @property
    def name(self) -> str:
        if self.block is None:
            return self.weight.hf_name
        return f"model.layers.{self.block}.{self.weight.hf_name}"


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor that a Hugging Face checkpoint of this model has, from embedding to head."""
    yield Tensor(OUTER_BY_NAME["embed"], None)
    for block in range(config.num_blocks):
        for weight in block_weights(config):
            yield Tensor(weight, block)
    for weight in outer_weights(config):
        if weight.name != "embed":
            yield Tensor(weight, None)


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block."""
    return sum(weight.size(config) for weight in block_weights(config))


def total_parameters(config: ModelConfig) -> int:
    """Parameters of the model; a tied head counts once."""
    outside = sum(weight.size(config) for weight in outer_weights(config))
    return outside + config.num_blocks * block_parameters(config)
