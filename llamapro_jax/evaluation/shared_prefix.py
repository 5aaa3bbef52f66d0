"""Rows that begin alike, as examples before every question make them: the beginning goes through
the model once, and the rest of all rows after it as one row, in which each part sees the beginning
and itself.

Legend: B batch (1), T tokens after the beginning, S slots of the beginning, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from os.path import commonprefix

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.generate import Cache, Program, empty_cache, grow, run_masked, run_with_cache
from llamapro_jax.model.attention import attention_mask
from llamapro_jax.model.llama import Params, rms_norm

# A beginning shorter than this is not worth a program of its own.
SHORTEST = 128
# Rests of rows that go through the model together: about the work of a batch without a beginning.
TOKENS_AT_ONCE = 1024


@dataclass
class Row:
    """Tokens that go through the model once, and which requests want what of them.

    asked: (request, index that its first token would have in `tokens`, continuation).
    """

    tokens: tuple[int, ...]
    asked: list[tuple[int, int, Sequence[int]]] = field(default_factory=list)


def row_length(tokens: int) -> int:
    """The padded length of a row: 16, 32, 48, 64, 96, 128, 192, ...; at most half of it padding."""
    power = max(16, 1 << (tokens - 1).bit_length())
    half_step = power * 3 // 4
    return half_step if 32 <= half_step and tokens <= half_step else power


def split(rows: Sequence[Row]) -> tuple[list[Row], list[tuple[int, list[Row]]]]:
    """Rows that are better off alone, longest first, and batches of others with how many tokens
    they begin alike; batches of one beginning follow one another."""
    alone: list[Row] = []
    together: list[tuple[int, list[Row]]] = []
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.tokens[:SHORTEST], []).append(row)
    for group in groups.values():
        shared = len(commonprefix([row.tokens for row in group]))
        # The token before the first one that is asked about has to be among the rest.
        shared = min(shared, *(first - 1 for row in group for _, first, _ in row.asked))
        batches = _packed(group, shared)
        work = row_length(max(shared, 1)) + sum(row_length(_rest(b, shared)) for b in batches)
        if shared >= SHORTEST and 2 * work <= sum(len(row.tokens) for row in group):
            together += [(shared, batch) for batch in batches]
        else:
            alone += group
    return sorted(alone, key=lambda row: -len(row.tokens)), together


def _rest(rows: Sequence[Row], shared: int) -> int:
    return sum(len(row.tokens) - shared for row in rows)


def _packed(rows: Sequence[Row], shared: int) -> list[list[Row]]:
    """Batches of rows whose rests are together at most `TOKENS_AT_ONCE`, or one row each."""
    batches: list[list[Row]] = []
    for row in rows:
        if batches and _rest([*batches[-1], row], shared) <= TOKENS_AT_ONCE:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


class Beginning:
    """Runs rows after their common beginning; keeps the keys and values of the last one."""

    def __init__(self, program: Program, params: Params) -> None:
        self._program, self._params = program, params
        self._tokens: tuple[int, ...] = ()
        self._cache: Cache | None = None

    def states(self, rows: Sequence[Row], shared: int) -> tuple[jax.Array, list[tuple[int, int]]]:
        """The final hidden states [1, T, D] of what follows the first `shared` tokens of each row,
        and for each row (0, where in T its first token would be)."""
        beginning = rows[0].tokens[:shared]
        slots = row_length(shared)
        if self._cache is None or beginning != self._tokens:
            self._tokens, self._cache = beginning, None  # the old one goes before the new one comes
            tokens_BS = np.zeros((1, slots), np.int32)
            tokens_BS[0, slots - shared :] = beginning
            self._cache = _prefill(self._program, self._params, tokens_BS, np.int32(slots - shared))
        length = row_length(_rest(rows, shared))
        tokens_BT, positions_BT, parts_BT = np.zeros((3, 1, length), np.int32)
        places, end = [], 0
        for part, row in enumerate(rows, start=1):
            start, end = end, end + len(row.tokens) - shared
            tokens_BT[0, start:end] = row.tokens[shared:]
            positions_BT[0, start:end] = np.arange(shared, len(row.tokens))
            parts_BT[0, start:end] = part
            places.append((0, start - shared))
        x_BTD = _states_after(
            self._program,
            self._params,
            self._cache,
            np.int32(slots - shared),
            *(tokens_BT, positions_BT, parts_BT),
        )
        return x_BTD, places


@partial(jax.jit, static_argnums=0)
def _prefill(program: Program, params: Params, tokens_BS: jax.Array, padding: jax.Array) -> Cache:
    """Keys and values of a beginning that is padded at the left."""
    cache = empty_cache(program, tokens_BS.shape[1])
    return run_with_cache(program, params, cache, tokens_BS, jnp.int32(0), padding)[1]


@partial(jax.jit, static_argnums=0)
def _states_after(
    program: Program,
    params: Params,
    cache: Cache,
    padding: jax.Array,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    parts_BT: jax.Array,
) -> jax.Array:
    slots, length = jax.tree.leaves(cache)[0].shape[3], tokens_BT.shape[1]
    beginning_BS = jnp.arange(slots)[None] - padding
    window = program.config.sliding_window
    seen = (
        attention_mask(
            positions_BT,
            beginning_BS,
            jnp.zeros_like(positions_BT),
            (beginning_BS < 0).astype(jnp.int32),
            window,
        ),
        attention_mask(positions_BT, positions_BT, parts_BT, parts_BT, window),
    )
    x_BTD, _ = run_masked(
        program,
        params,
        grow(cache, slots + length),
        tokens_BT,
        jnp.int32(slots),
        positions_BT,
        jnp.concatenate(seen, axis=-1),
    )
    return rms_norm(x_BTD, params["final_norm"], program.config.rms_norm_eps)
