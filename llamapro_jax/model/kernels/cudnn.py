"""Attention by cuDNN, through `jax.nn.dot_product_attention`: the fastest on Hopper.

The public function knows lengths, not segment ids, so it serves rows of one document each. (A mask
or a bias would express segments, and would be read whole: [T, T] a row.)
"""

from __future__ import annotations

import importlib.util

import jax

from llamapro_jax.errors import UserError
from llamapro_jax.model.kernels import Problem

# jax finds cuDNN through its CUDA plugin.
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Hopper allows 256; this is what every GPU that cuDNN's flash attention supports allows.
LARGEST_HEAD = 128


def obstacle(problem: Problem) -> str | None:
    """Why cuDNN cannot solve the problem, with the mend; None when it can."""
    if problem.platform != "gpu":
        return (
            f"it runs on an NVIDIA GPU, and this is for platform {problem.platform!r}; "
            "set attention to auto or blockwise"
        )
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        return (
            "jax's CUDA plugin, which brings cuDNN, is not installed; "
            "install llamapro_jax[cuda13] or llamapro_jax[cuda12], or set attention to pallas_gpu"
        )
    if problem.packed:
        return (
            "rows are packed with several documents, and jax's public interface to cuDNN takes no "
            "segment ids; set attention to auto or pallas_gpu"
        )
    if problem.context > 1:
        return (
            f"rows are shared by {problem.context} devices (mesh.context), and cuDNN takes them "
            "whole; set attention to auto or pallas_gpu"
        )
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype is {problem.dtype}, and cuDNN takes bfloat16 or float16; set compute_dtype"
    if problem.head_dim > LARGEST_HEAD or problem.head_dim % 8:
        return (
            f"heads have {problem.head_dim} dimensions, and cuDNN takes multiples of 8 up to "
            f"{LARGEST_HEAD}; set attention to auto or pallas_gpu"
        )
    return None


def attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array:
    """Causal self-attention, [B, T, H, C]; see `llamapro_jax.model.attention.attention`."""
    if segment_ids_BT is not None:
        raise UserError("attention: cudnn takes no segment ids; set attention to pallas_gpu")
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BTKC,
        v_BTKC,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )
