"""How likely a model finds given texts, and what it says next, many at a time: the two things that
lm-evaluation-harness asks of a model.

Rows are padded to a few lengths, each compiled once. Of a likelihood only the tokens that are asked
about meet the vocabulary, requests that differ in their last token alone (choices A, B, C, D) are
one row, and a long beginning that rows share goes through the model once (`shared_prefix`).

Legend: B batch, T row length, S slots of the cache, N tokens asked about, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.errors import UserError
from llamapro_jax.evaluation.progress import tracked
from llamapro_jax.evaluation.shared_prefix import Beginning, Row, row_length, split
from llamapro_jax.generate import (
    DECODER_CONTEXT,
    Cache,
    Program,
    empty_cache,
    grow,
    last_scores,
    run_with_cache,
    stop_ids,
)
from llamapro_jax.hf.tokenizer import Tokenizer
from llamapro_jax.model.api import Model
from llamapro_jax.model.llama import Params, head_weight, hidden_states
from llamapro_jax.model.precision import full_precision

# Tokens whose scores over the vocabulary exist at the same time: 128 MiB of float32 at V = 131072.
SCORES_AT_ONCE = 256

Request = tuple[Sequence[int], Sequence[int]]
# (request, row of the batch, index in it of the token before, target)
Asked = tuple[int, int, int, int]


@partial(jax.jit, static_argnums=0)
def _states(program: Program, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The final hidden states [B, T, D] of rows that are padded at the end."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    with full_precision(program.dtype):
        return hidden_states(
            params,
            tokens_BT,
            positions_BT,
            None,
            config=program.config,
            segments=program.segments,
            dtype=program.dtype,
            with_new=program.with_new,
            attention="auto",
        )


@jax.jit
def _log_p(
    x_BTD: jax.Array, head_VD: jax.Array, row_N: jax.Array, at_N: jax.Array, target_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p of the target after token `at` of `row`, [N] float32, and if it is the likeliest."""
    x_ND = x_BTD[row_N, at_N]
    with full_precision(x_ND.dtype):
        head_VD = head_VD.astype(x_ND.dtype)
        scores_NV = jnp.einsum("ND,VD->NV", x_ND, head_VD, preferred_element_type=jnp.float32)
    log_p_NV = jax.nn.log_softmax(scores_NV)
    log_p_N = jnp.take_along_axis(log_p_NV, target_N[:, None], axis=-1)[:, 0]
    return log_p_N, jnp.argmax(scores_NV, axis=-1) == target_N


def _rows(requests: Sequence[Request], max_length: int) -> list[Row]:
    """The distinct rows."""
    rows: dict[tuple[int, ...], Row] = {}
    for index, (context, continuation) in enumerate(requests):
        # As the harness: from the left, and the last token is only ever a target.
        tokens = (*context, *continuation)[-(max_length + 1) :][:-1]
        row = rows.setdefault(tokens, Row(tokens))
        row.asked.append((index, len(tokens) + 1 - len(continuation), continuation))
    return list(rows.values())


def check_max_length(model: Model, max_length: int | None) -> int:
    """How many tokens a row may have; None: what the model has positions for. Raises UserError."""
    longest = model.config.max_position_embeddings
    if max_length is None:
        return longest
    if not 1 <= max_length <= longest:
        raise UserError(
            f"max_length is {max_length}; this model takes 1 to {longest} "
            "(max_position_embeddings)."
        )
    return max_length


def check_batch_size(batch_size: int) -> None:
    """Raises UserError below 1."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")


def loglikelihoods(
    model: Model,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    new_blocks: bool = True,
    progress: str | None = None,
) -> list[tuple[float, bool]]:
    """For each (context, continuation) of ids: log p of the continuation given the context, in
    nats, and whether greedy decoding would give it.

    The sum over the continuation's tokens is in float64, over float32 figures. max_length: tokens
    that go through the model at once, None for all its positions; what is longer loses its
    beginning, as in lm-evaluation-harness. new_blocks=False leaves the inserted blocks out.
    progress: shows a bar of this name on a terminal.

    Raises:
      UserError: an empty context or continuation (give a text without context the begin token), a
        continuation longer than `max_length`, an id outside the vocabulary, a value out of range.
    """
    max_length = check_max_length(model, max_length)
    check_batch_size(batch_size)
    model.check_new_blocks(new_blocks)
    _check_requests(model, requests, max_length)
    program = Program(model.config, model.plan.segments, model.dtype, new_blocks)
    batches = _batches(_rows(requests, max_length), batch_size)
    beginning = Beginning(program, model.params)
    log_p = [0.0] * len(requests)
    greedy = [True] * len(requests)
    for batch in batches if progress is None else tracked(batches, progress):
        x_BTD, asked = batch.run(beginning, program, model.params)
        for request, value, best in _scored(model, x_BTD, asked):
            log_p[request] += value
            greedy[request] &= best
    return list(zip(log_p, greedy, strict=True))


@dataclass(frozen=True)
class _Batch:
    """Rows that go through the model together; `shared` tokens at their beginning are the same."""

    rows: Sequence[Row]
    size: int
    shared: int = 0

    def run(
        self, beginning: Beginning, program: Program, params: Params
    ) -> tuple[jax.Array, Iterator[Asked]]:
        """The final hidden states [B, T, D], and what is asked of them."""
        if self.shared:
            x_BTD, places = beginning.states(self.rows, self.shared)
        else:
            tokens_BT = np.zeros((self.size, row_length(len(self.rows[0].tokens))), np.int32)
            for padded, row in zip(tokens_BT, self.rows, strict=False):
                padded[: len(row.tokens)] = row.tokens
            x_BTD = _states(program, params, tokens_BT)
            places = [(i, 0) for i in range(len(self.rows))]
        return x_BTD, (
            (request, at, start + first - 1 + i, target)
            for (at, start), row in zip(places, self.rows, strict=True)
            for request, first, continuation in row.asked
            for i, target in enumerate(continuation)
        )


def _batches(rows: Sequence[Row], batch_size: int) -> list[_Batch]:
    alone, together = split(rows)
    batches = [_Batch(rows, batch_size, shared) for shared, rows in together]
    for start in range(0, len(alone), batch_size):
        batches.append(_Batch(alone[start : start + batch_size], batch_size))
    return batches


def _scored(
    model: Model, x_BTD: jax.Array, asked: Iterator[Asked]
) -> Iterator[tuple[int, float, bool]]:
    """(request, log p, whether the likeliest) for each token that is asked about."""
    while group := list(islice(asked, SCORES_AT_ONCE)):
        columns_3N = np.zeros((3, SCORES_AT_ONCE), np.int32)
        columns_3N[:, : len(group)] = np.transpose([one[1:] for one in group])
        log_p_N, best_N = _log_p(x_BTD, head_weight(model.params), *columns_3N)
        values, best = np.asarray(log_p_N), np.asarray(best_N)
        for (request, *_), value, is_best in zip(group, values, best, strict=False):
            yield request, float(value), bool(is_best)


# ------------------------------------------------------------------- greedy texts


@partial(jax.jit, static_argnums=0)
def _prefill(
    program: Program, params: Params, tokens_BT: jax.Array, padding_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """The likeliest token after each row, [B], and a cache of T slots."""
    cache = empty_cache(program, tokens_BT.shape[1], len(tokens_BT))
    return _next(program, params, cache, tokens_BT, jnp.int32(0), padding_B)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: Program,
    params: Params,
    cache: Cache,
    tokens_B: jax.Array,
    slot: jax.Array,
    padding_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """The likeliest token after `tokens`, which go into `slot` of each row."""
    return _next(program, params, cache, tokens_B[:, None], slot, padding_B)


def _next(
    program: Program,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    slot: jax.Array,
    padding_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    x_BTD, cache = run_with_cache(program, params, cache, tokens_BT, slot, padding_B)
    scores_BV = last_scores(program, params, x_BTD[:, -1:])
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32), cache


class _Text:
    """The text that follows one prompt, as its ids come in, until something ends it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], until: Sequence[str]) -> None:
        self.text, self.done = "", False
        self._until = until
        self._decoder = tokenizer.stream_decoder()
        for token in prompt[-DECODER_CONTEXT:]:
            self._decoder.push(token)

    def push(self, token: int) -> None:
        self._add(self._decoder.push(token))

    def end(self) -> None:
        if not self.done:
            self._add(self._decoder.flush())
            self.done = True

    def _add(self, piece: str) -> None:
        before = len(self.text)
        self.text += piece
        found = (self.text.find(s, max(before - len(s) + 1, 0)) for s in self._until)
        ends = [at for at in found if at >= 0]
        if ends:
            self.text, self.done = self.text[: min(ends)], True


def generate_until(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    until: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int | None = None,
    new_blocks: bool = True,
    progress: str | None = None,
) -> list[str]:
    """The text that greedy decoding puts after each prompt of ids.

    It ends before the first of the strings `until`, before an end token, or after `max_tokens`.
    max_length: of prompt and text together, in tokens, None for all the model's positions; of a
    longer prompt the beginning is left out, as in lm-evaluation-harness. The text is decoded as it
    stands behind its prompt: a space or an indentation before its first word is part of it.

    Raises:
      UserError: an empty prompt or stop, an id outside the vocabulary, a value out of range, a
        model without a tokenizer.
    """
    max_length = check_max_length(model, max_length)
    check_batch_size(batch_size)
    model.check_new_blocks(new_blocks)
    if not 1 <= max_tokens < max_length:
        raise UserError(
            f"max_tokens is {max_tokens}; it must be from 1 to {max_length - 1}, so that of the "
            f"{max_length} positions one is left for the prompt."
        )
    if "" in until:
        raise UserError("until: holds an empty string, which would end every text; remove it.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number}: is empty; give it the begin token.")
    _check_ids(model, prompts)
    tokenizer = model.require_tokenizer()
    cut = [list(prompt)[max_tokens - max_length :] for prompt in prompts]
    texts = [_Text(tokenizer, prompt, until) for prompt in cut]
    order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))
    program = Program(model.config, model.plan.segments, model.dtype, new_blocks)
    starts = range(0, len(order), batch_size)
    for start in starts if progress is None else tracked(starts, progress):
        batch = order[start : start + batch_size]
        _continue(
            *(model, program, [cut[i] for i in batch], [texts[i] for i in batch]),
            *(max_tokens, batch_size),
        )
    return [text.text for text in texts]


def _continue(
    model: Model,
    program: Program,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[_Text],
    max_tokens: int,
    batch_size: int,
) -> None:
    """Gives each text the ids that follow its prompt; the longest prompt is the first."""
    stops, length = stop_ids(model), row_length(len(prompts[0]))
    tokens_BT = np.zeros((batch_size, length), np.int32)
    padding_B = np.full(batch_size, length - 1, np.int32)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, length - len(prompt) :] = prompt
        padding_B[i] = length - len(prompt)
    tokens_B, cache = _prefill(program, model.params, tokens_BT, padding_B)
    cache = grow(cache, row_length(length + max_tokens))
    for slot in range(length, length + max_tokens):
        made = tokens_B
        if slot + 1 < length + max_tokens:
            # Started before these tokens are looked at, so that the device does not wait for us.
            tokens_B, cache = _decode(program, model.params, cache, made, np.int32(slot), padding_B)
        for token, text in zip(np.asarray(made).tolist(), texts, strict=False):
            if token in stops:
                text.end()
            elif not text.done:
                text.push(token)
        if all(text.done for text in texts):
            return
    for text in texts:
        text.end()


# ------------------------------------------------------------------- checks


def _check_requests(model: Model, requests: Sequence[Request], max_length: int) -> None:
    for number, (context, continuation) in enumerate(requests):
        if not len(context):
            raise UserError(
                f"request {number}: has no context; give a text without one the begin token."
            )
        if not len(continuation):
            raise UserError(f"request {number}: has no token to score.")
        if len(continuation) > max_length:
            raise UserError(
                f"request {number}: has {len(continuation)} tokens to score, more than the "
                f"{max_length} that go through the model at once; shorten it, or score it in parts."
            )
    _check_ids(model, [ids for pair in requests for ids in pair])


def _check_ids(model: Model, rows: Sequence[Sequence[int]]) -> None:
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    if ids.size:
        model.check_tokens(ids[None])
