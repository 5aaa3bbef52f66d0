"""The peer: our model in `transformers`, of which PyTorch trains the same blocks with AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from llamapro_jax.config import OptimizerConfig
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.hf.config import render
from llamapro_jax.model.config import ModelConfig


def build(config: ModelConfig, plan: ExpansionPlan, dtype: str) -> Any:
    """With random weights on torch's default device; only the new blocks require gradients."""
    keys = render({}, config, plan, dtype) | {"use_cache": False}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(keys, attn_implementation="sdpa")
    )
    for parameter in model.parameters():
        # Not the buffers: the frequencies of RoPE stay in float32.
        parameter.data = parameter.data.to(getattr(torch, dtype))
        parameter.requires_grad = False
    for depth in plan.new_depths:
        for parameter in model.model.layers[depth].parameters():
            parameter.requires_grad = True
    return model


def adamw(parameters: Sequence[Any], config: OptimizerConfig, **options: Any) -> Any:
    """AdamW as ours: weight decay for matrices alone."""
    decayed = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
        **options,
    )
