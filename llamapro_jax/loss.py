"""Cross-entropy over a large vocabulary without holding the logits of all tokens.

B batch, T length, N tokens of one chunk, D model, V vocabulary. On a mesh each device has its own
tokens, and the part of the vocabulary that its place along `tensor` says.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llamapro_jax.model.weights import OUTER_BY_NAME
from llamapro_jax.sharding import LAYOUT, activation, current_mesh, use

HEAD = OUTER_BY_NAME["head"]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed_cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
) -> jax.Array:
    """The weighted sum of the tokens' losses, a float32 scalar, `chunk` tokens at a time.

    chunk: tokens of one device. The gradients are taken in the forward pass, chunk by chunk, while
    the logits are there: the head is gathered once, multiplied once for the loss and once for the
    gradient of `x`, and once more only when the head itself trains. Gradients with respect to
    `weights_BT` are not defined.
    """
    total, _ = _forward(x_BTD, head_VD, targets_BT, weights_BT, _Wanted(chunk, False, False))
    return total


class _Wanted(NamedTuple):
    chunk: int
    x: bool
    head: bool


def _forward(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    wanted: _Wanted,
) -> tuple[jax.Array, tuple[Any, Any]]:
    weights_BT = weights_BT.astype(jnp.float32)
    head_VD = use(head_VD.astype(x_BTD.dtype), HEAD)
    mesh = current_mesh()
    if mesh is None:
        return _local(wanted, _Axes(), x_BTD, head_VD, targets_BT, weights_BT)
    tokens, x_spec = activation("BT"), activation("BTD")
    # What is not wanted is None, which takes no specification.
    gradients = (
        x_spec if wanted.x else None,
        LAYOUT.stored(HEAD) if wanted.head else None,
    )
    local = jax.shard_map(
        partial(_local, wanted, _Axes(("data", "context"), "fsdp", "tensor")),
        in_specs=(x_spec, LAYOUT.used(HEAD), tokens, tokens),
        out_specs=(jax.P(), gradients),
        check_vma=False,
    )
    return local(x_BTD, head_VD, targets_BT, weights_BT)


class _Axes(NamedTuple):
    """Mesh axes by what lies over them; none without a mesh.

    tokens: tokens alone. stored: tokens, and the width of the head as it is stored. vocabulary:
    the rows of the head.
    """

    tokens: tuple[str, ...] = ()
    stored: str | None = None
    vocabulary: str | None = None

    def over_tokens(self, x: jax.Array) -> jax.Array:
        return x if self.stored is None else lax.psum(x, (*self.tokens, self.stored))

    def over_vocabulary(self, x: jax.Array) -> jax.Array:
        return x if self.vocabulary is None else lax.psum(x, self.vocabulary)

    def highest(self, x: jax.Array) -> jax.Array:
        return x if self.vocabulary is None else lax.pmax(x, self.vocabulary)

    def first_row(self, rows: int) -> jax.Array | int:
        return 0 if self.vocabulary is None else lax.axis_index(self.vocabulary) * rows

    def store(self, head_grad_VD: jax.Array) -> jax.Array:
        """The sum over all tokens, of which each device keeps what it stores of the head."""
        if self.stored is None:
            return head_grad_VD
        part = lax.psum_scatter(head_grad_VD, self.stored, scatter_dimension=1, tiled=True)
        return lax.psum(part, self.tokens)


def _local(
    wanted: _Wanted,
    axes: _Axes,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """What one device computes: the loss of all devices' tokens, and its part of the gradients."""
    rows, width = head_VD.shape
    tokens = targets_BT.size
    chunk = min(wanted.chunk, tokens)
    padding = -tokens % chunk
    first_row = axes.first_row(rows)

    def split(array: jax.Array, *rest: int) -> jax.Array:
        padded = jnp.pad(array.reshape(tokens, *rest), [(0, padding)] + [(0, 0)] * len(rest))
        return padded.reshape((tokens + padding) // chunk, chunk, *rest)

    def one(carry: Any, inputs: Any) -> Any:
        total, head_grad = carry
        x_ND, targets_N, weights_N = inputs
        logits_NV = jnp.einsum("ND,VD->NV", x_ND, head_VD, preferred_element_type=jnp.float32)
        highest_N = axes.highest(jnp.max(logits_NV, axis=-1))
        sums_N = axes.over_vocabulary(jnp.sum(jnp.exp(logits_NV - highest_N[:, None]), axis=-1))
        lse_N = highest_N + jnp.log(sums_N)
        # A comparison fuses with what reads it; a scatter into the logits would copy them. A target
        # in another device's part of the vocabulary hits nothing here.
        hit_NV = (targets_N - first_row)[:, None] == jnp.arange(rows)
        chosen_N = axes.over_vocabulary(jnp.sum(jnp.where(hit_NV, logits_NV, 0.0), axis=-1))
        total += jnp.sum((lse_N - chosen_N) * weights_N)
        if not (wanted.x or wanted.head):
            return (total, head_grad), None
        slope_NV = jnp.exp(logits_NV - lse_N[:, None]) - hit_NV
        slope_NV = (slope_NV * weights_N[:, None]).astype(x_ND.dtype)
        if wanted.head:
            head_grad += jnp.einsum("NV,ND->VD", slope_NV, x_ND, preferred_element_type=jnp.float32)
        x_grad = None
        if wanted.x:
            x_grad = axes.over_vocabulary(jnp.einsum("NV,VD->ND", slope_NV, head_VD))
        return (total, head_grad), x_grad

    start = jnp.zeros(head_VD.shape, jnp.float32) if wanted.head else None
    with jax.named_scope("loss"):
        (total, head_grad), x_grad = lax.scan(
            one,
            (jnp.zeros((), jnp.float32), start),
            (split(x_BTD, width), split(targets_BT), split(weights_BT)),
        )
    if wanted.x:
        x_grad = x_grad.reshape(tokens + padding, width)[:tokens].reshape(x_BTD.shape)
    if wanted.head:
        head_grad = axes.store(head_grad)
    return axes.over_tokens(total), (x_grad, head_grad)


def _fwd(x: Any, head: Any, targets: Any, weights: Any, chunk: int) -> Any:
    # With symbolic zeros jax says which arguments are differentiated: a frozen head costs nothing.
    wanted = _Wanted(chunk, x.perturbed, head.perturbed)
    total, (x_grad, head_grad) = _forward(
        x.value, head.value, targets.value, weights.value, wanted
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
