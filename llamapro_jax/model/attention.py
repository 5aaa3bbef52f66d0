"""Causal grouped-query attention: the reference, and the choice of a fused kernel.

B batch, T query length, S key length, H query heads, K key/value heads, G = H/K, C head dim.

A forward pass over whole rows calls `attention`; generation with a key/value cache, whose queries
and keys differ in length, calls `reference_attention` with a mask.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from llamapro_jax.errors import UserError, nearest
from llamapro_jax.model import context
from llamapro_jax.model.config import AttentionChoice
from llamapro_jax.model.kernels import RESIDUALS, WHOLE, Part, Problem, take_spans
from llamapro_jax.sharding import activation, axis_size, current_mesh, current_platform

IMPLEMENTATIONS: tuple[AttentionChoice, ...] = get_args(AttentionChoice)

# What `auto` tries, in this order; the last one runs anywhere.
PREFERRED: dict[str, tuple[AttentionChoice, ...]] = {
    "tpu": ("splash", "blockwise"),
    "gpu": ("cudnn", "pallas_gpu", "blockwise"),
    "cpu": ("blockwise",),
}
# Below this length a CPU gains little by blocks, and the scores of all pairs take little memory.
CPU_BLOCKWISE_LENGTH = 512
# The primitive of cuDNN's forward pass: jax gives its residuals no name of ours.
CUDNN_PRIMITIVE = "dot_product_attention_fwd_wrapper"

log = logging.getLogger(__name__)


def attention_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    """Which key each query may see, [B, T, S] bool: same segment, not later, inside the window."""
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])
    if sliding_window is not None:
        seen_BTS &= distance_BTS < sliding_window
    return seen_BTS


def reference_attention(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention with float32 scores, [B, T, H, C] in the dtype of `q`.

    A query that may see nothing (padding) gets the mean of the values, not NaN: its row is all
    the lowest finite score.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum(
        "BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32
    ) * (C**-0.5)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKC.dtype)
    out_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", weights_BKGTS, v_BSKC)
    return out_BTKGC.reshape(B, T, H, C)


def attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    sliding_window: int | None = None,
    implementation: AttentionChoice = "auto",
    platform: str | None = None,
) -> jax.Array:
    """Causal self-attention over packed rows, [B, T, H, C] in the dtype of `q`.

    A query sees the keys of its own segment that are not later and, with a `sliding_window`, less
    than so many tokens before it. A segment is a run of equal ids; rows of one document each,
    padded at the end or not, need no ids (None), which lets more kernels run. Padding is a segment
    like any other: its outputs are finite and mean nothing.

    Between the keys and values of a segment, distances in position equal distances in index, so no
    positions are asked for. Heads may be grouped: H is a multiple of K.

    platform: what the program is compiled for, when that is neither the current mesh's nor
    `jax.default_backend()`. Under a mesh the arrays are laid out as `sharding.LAYOUT` says, and
    rows that devices share as `context.spread` orders them.

    Raises UserError when `implementation` is unknown or cannot run here; says what would.
    """
    name = choose(
        implementation, problem_of(q_BTHC, k_BTKC, segment_ids_BT, sliding_window, platform)
    )
    local = functools.partial(_local, name, sliding_window)
    mesh = current_mesh()
    if mesh is None:
        return local(q_BTHC, k_BTKC, v_BTKC, segment_ids_BT)
    # Each device has its own rows and heads. All four axes are named, so that nothing here is
    # replicated, and no gradient waits to be summed over an axis.
    queries, keys = activation("BTHC"), activation("BTKC")
    ids = None if segment_ids_BT is None else activation("BT")
    return jax.shard_map(
        local, in_specs=(queries, keys, keys, ids), out_specs=queries, check_vma=False
    )(q_BTHC, k_BTKC, v_BTKC, segment_ids_BT)


def _local(
    name: str,
    sliding_window: int | None,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """What one device computes: its rows and heads, and its part of each row."""
    kernel = _kernel(name)
    if axis_size(context.AXIS) > 1:
        kernel = functools.partial(context.attention, kernel)
    return kernel(
        q_BTHC, k_BTKC, v_BTKC, segment_ids_BT=segment_ids_BT, sliding_window=sliding_window
    )


def problem_of(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    platform: str | None,
) -> Problem:
    """What the choice depends on, from the arguments of `attention`. Raises UserError."""
    _, length, query_heads, head_dim = q_BTHC.shape
    kv_heads = k_BTKC.shape[2]
    if query_heads % kv_heads:
        raise UserError(
            f"attention: {query_heads} query heads are no multiple of {kv_heads} key/value heads; "
            "make num_attention_heads a multiple of num_key_value_heads"
        )
    if sliding_window is not None and sliding_window < 1:
        raise UserError(
            f"sliding_window: {sliding_window} leaves a token nothing to see; it must be at least "
            "1, or null for none"
        )
    return Problem(
        platform=platform_of(platform or current_platform()),
        dtype=jnp.dtype(q_BTHC.dtype).name,
        length=length,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        packed=segment_ids_BT is not None,
        sliding_window=sliding_window,
        context=axis_size(context.AXIS),
    )


def platform_of(backend: str) -> str:
    """One of cpu, gpu and tpu, for a name that jax gives a backend."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(backend, backend)


def choose(implementation: str, problem: Problem) -> str:
    """The implementation that runs: the one asked for, or what "auto" takes (logged once).

    Raises UserError when the one asked for is unknown or cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention: {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}."
            f"{nearest(implementation, IMPLEMENTATIONS)}"
        )
    if implementation == "auto":
        candidates = PREFERRED.get(problem.platform, ("blockwise",))
        if problem.platform == "cpu" and problem.length < CPU_BLOCKWISE_LENGTH:
            candidates = ("reference",)
        name = next(name for name in candidates if obstacle(name, problem) is None)
        _log_once(name, problem)
        return name
    reason = obstacle(implementation, problem)
    if reason is not None:
        raise UserError(f"attention: {implementation!r} cannot run here: {reason}")
    return implementation


def obstacle(implementation: str, problem: Problem) -> str | None:
    """Why an implementation cannot solve the problem, with the mend; None when it can."""
    if implementation in ("reference", "blockwise"):
        return None
    return _module(implementation).obstacle(problem)


def save_residuals(*names: str) -> Callable[..., Any]:
    """A policy for `jax.checkpoint` that keeps what attention's backward pass needs.

    That is the output and its log-sum-exp, of whichever kernel runs, so that none runs its forward
    pass again; and the other values of these names.
    """
    named = jax.checkpoint_policies.save_only_these_names(RESIDUALS, *names)

    def is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name == CUDNN_PRIMITIVE

    return jax.checkpoint_policies.save_from_both_policies(named, is_cudnn)


@functools.cache
def _log_once(name: str, problem: Problem) -> None:
    log.info(
        "attention: auto takes %s on %s (%s, length %d, %d/%d heads of %d%s%s)",
        name,
        problem.platform,
        problem.dtype,
        problem.length,
        problem.query_heads,
        problem.kv_heads,
        problem.head_dim,
        ", packed" if problem.packed else "",
        f", window {problem.sliding_window}" if problem.sliding_window else "",
    )


def _module(implementation: str) -> Any:
    # Pallas takes a while to import: only when it is used.
    return importlib.import_module(f"llamapro_jax.model.kernels.{implementation}")


def _kernel(implementation: str) -> Callable[..., jax.Array]:
    return _reference if implementation == "reference" else _module(implementation).attention


def _reference(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
    part: Part = WHOLE,
) -> jax.Array:
    B, S = k_BSKC.shape[:2]
    keys_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    ids_BS = jnp.zeros_like(keys_BS) if segment_ids_BT is None else segment_ids_BT
    starts, span = part.starts(S), q_BTHC.shape[1] // part.spans
    queries_BT, ids_BT = (take_spans(x_BS, starts, span) for x_BS in (keys_BS, ids_BS))
    mask_BTS = attention_mask(queries_BT, keys_BS, ids_BT, ids_BS, sliding_window)
    return reference_attention(q_BTHC, k_BSKC, v_BSKC, mask_BTS)
