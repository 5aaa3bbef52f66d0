"""Cross-entropy over a large vocabulary without holding the logits of all tokens.

N tokens, D model, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def _logits(x_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
    head_VD = head_VD.astype(x_ND.dtype)
    return jnp.einsum("ND,VD->NV", x_ND, head_VD, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed_cross_entropy(
    x_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    chunk: int,
) -> jax.Array:
    """The weighted sum of the tokens' losses, a float32 scalar, `chunk` tokens at a time.

    The gradients are taken in the forward pass, chunk by chunk, while the logits are there: the
    head is multiplied once for the loss and once for the gradient of `x`, and once more only when
    the head itself trains. Gradients with respect to `weights_N` are not defined.
    """
    total, _ = _forward(x_ND, head_VD, targets_N, weights_N, chunk, False, False)
    return total


def _forward(
    x_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    chunk: int,
    wants_x: bool,
    wants_head: bool,
) -> tuple[jax.Array, tuple[Any, Any]]:
    tokens, width = x_ND.shape
    chunk = min(chunk, tokens)
    padding = -tokens % chunk

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape((tokens + padding) // chunk, chunk, *array.shape[1:])

    def one(carry: Any, inputs: Any) -> Any:
        total, head_grad = carry
        x_ND, targets_N, weights_N = inputs
        logits_NV = _logits(x_ND, head_VD)
        lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
        chosen_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        total += jnp.sum((lse_N - chosen_N) * weights_N)
        if not (wants_x or wants_head):
            return (total, head_grad), None
        slope_NV = jnp.exp(logits_NV - lse_N[:, None]) * weights_N[:, None]
        slope_NV = slope_NV.at[jnp.arange(slope_NV.shape[0]), targets_N].add(-weights_N)
        slope_NV = slope_NV.astype(x_ND.dtype)
        if wants_head:
            head_grad += jnp.einsum(
                "NV,ND->VD", slope_NV, x_ND, preferred_element_type=jnp.float32
            )
        x_grad = None
        if wants_x:
            x_grad = jnp.einsum("NV,VD->ND", slope_NV, head_VD.astype(x_ND.dtype))
        return (total, head_grad), x_grad

    head_start = jnp.zeros(head_VD.shape, jnp.float32) if wants_head else None
    with jax.named_scope("loss"):
        (total, head_grad), x_grad = jax.lax.scan(
            one,
            (jnp.zeros((), jnp.float32), head_start),
            (split(x_ND), split(targets_N), split(weights_N.astype(jnp.float32))),
        )
    if wants_x:
        x_grad = x_grad.reshape(tokens + padding, width)[:tokens]
    return total, (x_grad, head_grad)


def _fwd(x: Any, head: Any, targets: Any, weights: Any, chunk: int) -> Any:
    # With symbolic zeros jax says which arguments are differentiated: a frozen head costs nothing.
    total, (x_grad, head_grad) = _forward(
        x.value, head.value, targets.value, weights.value, chunk, x.perturbed, head.perturbed
    )
    # The empty array carries the head's dtype to the backward pass.
    return total, (x_grad, head_grad, jnp.zeros((0,), head.value.dtype))


def _bwd(chunk: int, residuals: Any, slope: jax.Array) -> Any:
    x_grad, head_grad, like_head = residuals
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        slope = jnp.zeros((), jnp.float32)
    if x_grad is not None:
        x_grad = (x_grad.astype(jnp.float32) * slope).astype(x_grad.dtype)
    if head_grad is not None:
        head_grad = (head_grad * slope).astype(like_head.dtype)
    return x_grad, head_grad, None, None


summed_cross_entropy.defvjp(_fwd, _bwd, symbolic_zeros=True)
