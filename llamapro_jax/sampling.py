"""How the next token is chosen from the model's scores. V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llamapro_jax.errors import UserError


class Draw(NamedTuple):
    """A choice's settings as arrays, so that none of them costs a compilation.

    temperature 0 takes the most likely token. top_k and top_p keep the tokens to draw from.
    """

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    def at(self, position: jax.Array) -> Draw:
        """The same with a key of its own for this position."""
        return self._replace(key=jax.random.fold_in(self.key, position))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k None and top_p 1 leave nothing out.

    First the scores are divided by `temperature`, then all but the `top_k` best are dropped, then
    all but the fewest tokens whose probability together reaches `top_p`. The order is that of
    transformers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or above.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be from 0 to 4294967295.")

    def draw(self, vocab_size: int) -> Draw:
        top_k = vocab_size if self.top_k is None else min(self.top_k, vocab_size)
        return Draw(
            jax.random.key(self.seed),
            jnp.float32(self.temperature),
            jnp.int32(top_k),
            jnp.float32(self.top_p),
        )


def choose(scores_V: jax.Array, draw: Draw) -> jax.Array:
    """The id of the next token, an int32 scalar."""
    greedy = draw.temperature == 0
    return jax.lax.cond(greedy, _best, _sample, scores_V.astype(jnp.float32), draw)


def _best(scores_V: jax.Array, draw: Draw) -> jax.Array:
    return jnp.argmax(scores_V).astype(jnp.int32)


def _sample(scores_V: jax.Array, draw: Draw) -> jax.Array:
    # The sort is stable: of equal scores the smaller id is first, as argmax has it.
    ids_V = jnp.argsort(-scores_V).astype(jnp.int32)
    scores_V = scores_V[ids_V] / draw.temperature
    rank_V = jnp.arange(scores_V.shape[0])
    scores_V = jnp.where(rank_V < draw.top_k, scores_V, -jnp.inf)
    probability_V = jax.nn.softmax(scores_V)
    before_V = jnp.cumsum(probability_V) - probability_V
    # The best token stays whatever rounding does.
    kept_V = (before_V < draw.top_p) | (rank_V == 0)
    return ids_V[jax.random.categorical(draw.key, jnp.where(kept_V, scores_V, -jnp.inf))]
