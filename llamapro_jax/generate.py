"""Text from a model, token by token, with a key/value cache.

The prompt goes through the model once, padded to a length of few choices; then each token is one
call of one compiled program for each size of the cache. Padding is never seen: a padded slot lies
after every query that runs before the slot is overwritten.

Legend: B batch (1 here), T query length, S slots of the cache, D model, K key/value heads, C head
dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.data.chat import BadRecord, ChatTemplate, Message
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import Segment
from llamapro_jax.hf.tokenizer_config import optional_json
from llamapro_jax.model.attention import attention_mask
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import (
    Context,
    KeyValues,
    Params,
    apply_block,
    embed,
    logits,
    rms_norm,
    run_blocks,
)
from llamapro_jax.model.precision import full_precision
from llamapro_jax.model.rope import rope_tables
from llamapro_jax.sampling import Draw, Sampling, choose

if TYPE_CHECKING:
    from llamapro_jax.model.api import Model, OpenedModel

DEFAULT_MAX_TOKENS = 128
# So many ids before the text decide how its first piece is written (the space before a word).
DECODER_CONTEXT = 16

# (base, new): for each segment the KeyValues [repeats, blocks, B, S, K, C], or None.
Cache = tuple[list[Any], list[Any]]


@dataclass(frozen=True)
class Program:
    """What a compiled program depends on besides the shapes of its arguments."""

    config: ModelConfig
    segments: tuple[Segment, ...]
    dtype: np.dtype
    with_new: bool


def padded_length(tokens: int) -> int:
    """Powers of two from 16 to 1024, then multiples of 1024: few programs, little padding."""
    if tokens > 1024:
        return -(-tokens // 1024) * 1024
    return max(16, 1 << (tokens - 1).bit_length())


def empty_cache(program: Program, slots: int, rows: int = 1) -> Cache:
    """Zeros of the cache's shape, for the blocks that run."""
    config = program.config

    def of(repeats: int, blocks: int) -> KeyValues | None:
        shape = (repeats, blocks, rows, slots, config.num_kv_heads, config.head_dim)
        return KeyValues(jnp.zeros(shape, program.dtype), jnp.zeros(shape, program.dtype))

    base = [of(s.repeats, s.base) if s.base else None for s in program.segments]
    with_new = program.with_new
    new = [of(s.repeats, s.new) if s.new and with_new else None for s in program.segments]
    return base, new


def run_with_cache(
    program: Program,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    start: jax.Array,
    padding_B: jax.Array | int = 0,
) -> tuple[jax.Array, Cache]:
    """The blocks for tokens in slots start, start + 1, ...: [B, T, D] before the last norm.

    The first `padding` slots of a row are never seen; its positions count from the one after.
    """
    slots = jax.tree.leaves(cache)[0].shape[3]
    padding_B1 = jnp.reshape(jnp.asarray(padding_B, jnp.int32), (-1, 1))
    positions_BT = start + jnp.arange(tokens_BT.shape[1])[None] - padding_B1
    slot_positions_BS = jnp.arange(slots)[None] - padding_B1
    # Slots are in the order of positions, so that causality hides the unwritten ones.
    mask_BTS = attention_mask(
        positions_BT,
        slot_positions_BS,
        jnp.zeros_like(positions_BT),
        (slot_positions_BS < 0).astype(jnp.int32),
        program.config.sliding_window,
    )
    return run_masked(program, params, cache, tokens_BT, start, positions_BT, mask_BTS)


def run_masked(
    program: Program,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    start: jax.Array,
    positions_BT: jax.Array,
    mask_BTS: jax.Array,
) -> tuple[jax.Array, Cache]:
    """`run_with_cache` for tokens at any positions, which see the slots that the mask says."""
    config = program.config
    context = Context(*rope_tables(config, positions_BT), mask_BTS, start)

    def body(x_BTD: jax.Array, of_block: Any) -> tuple[jax.Array, KeyValues | None]:
        leaves, keys_values = of_block
        return apply_block(config, leaves, x_BTD, context, keys_values)

    base = list(zip(params["base"], cache[0], strict=True))
    new = list(zip(params["new"], cache[1], strict=True))
    with full_precision(program.dtype):
        x_BTD = embed(params, tokens_BT, program.dtype)
        return run_blocks(body, x_BTD, program.segments, base, new, program.with_new)


def last_scores(program: Program, params: Params, x_B1D: jax.Array) -> jax.Array:
    """The scores [B, V] of the token after the only one in each row of `x`."""
    x_B1D = rms_norm(x_B1D, params["final_norm"], program.config.rms_norm_eps)
    with full_precision(program.dtype):
        return logits(params, x_B1D)[:, 0]


@partial(jax.jit, static_argnums=0)
def _prefill(
    program: Program, params: Params, tokens_BT: jax.Array, length: jax.Array, draw: Draw
) -> tuple[jax.Array, Cache]:
    """The first new token, and a cache of as many slots as the padded prompt has tokens."""
    cache = empty_cache(program, tokens_BT.shape[1])
    x_BTD, cache = run_with_cache(program, params, cache, tokens_BT, jnp.int32(0))
    last_BTD = jax.lax.dynamic_slice_in_dim(x_BTD, length - 1, 1, axis=1)
    return choose(last_scores(program, params, last_BTD)[0], draw.at(length)), cache


@partial(jax.jit, static_argnums=1)
def grow(cache: Cache, slots: int) -> Cache:
    """The cache with more slots."""

    def longer(array: jax.Array) -> jax.Array:
        missing = slots - array.shape[3]
        return jnp.pad(array, [(0, missing if axis == 3 else 0) for axis in range(array.ndim)])

    return jax.tree.map(longer, cache)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: Program,
    params: Params,
    cache: Cache,
    token: jax.Array,
    position: jax.Array,
    draw: Draw,
) -> tuple[jax.Array, Cache]:
    """The token after `token`, which stands at `position`."""
    x_BTD, cache = run_with_cache(program, params, cache, token[None, None], position)
    return choose(last_scores(program, params, x_BTD)[0], draw.at(position + 1)), cache


def stop_ids(model: Model) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, config.json and the tokenizer."""
    ids: set[int] = set()
    generation = optional_json(model.source.directory / "generation_config.json")
    for values in (generation, model.source.hf_config):
        value = values.get("eos_token_id")
        ids |= set(value) if isinstance(value, list) else {value}
    if model.tokenizer is not None:
        ids.add(model.tokenizer.eos_id)
    return frozenset(ids - {None})


def prompt_ids(model: OpenedModel, prompt: str) -> list[int]:
    """The ids of a prompt. Raises UserError without a tokenizer, and when there is no id."""
    ids = model.require_tokenizer().encode(prompt)
    if not ids:
        raise UserError("the prompt is empty, and the model has no begin token; give it a word.")
    return ids


def chat_ids(model: OpenedModel, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation in the model's own chat template, with the answer begun.

    messages: as `llamapro_jax.data.chat.messages_of` gives them, the last one a user's.

    Raises:
      UserError: no tokenizer, no chat template, or one that cannot render these messages.
    """
    try:
        return ChatTemplate.of_tokenizer(model.require_tokenizer()).prompt(messages)
    except BadRecord as error:
        raise UserError(f"the conversation cannot be rendered: {error}.") from None


def check_length(
    model: OpenedModel, prompt: Sequence[int], max_tokens: int | None
) -> tuple[np.ndarray, int]:
    """The prompt as int32 [T], and how many tokens may follow.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, more tokens than the model has
        positions.
    """
    tokens = model.check_tokens([list(prompt)])[0]
    room = model.config.max_position_embeddings - len(tokens)
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, max(room, 1))
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1.")
    if max_tokens > room:
        raise UserError(
            f"the prompt has {len(tokens)} tokens and max_tokens is {max_tokens}, together more "
            f"than the model's {model.config.max_position_embeddings} positions; "
            + (f"take max_tokens {room} or less." if room > 0 else "shorten the prompt.")
        )
    return tokens, max_tokens


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    new_blocks: bool = True,
    stops: Iterable[int] = (),
) -> Iterator[int]:
    """Ids that follow `prompt`, as they are made, until a stop id (left out) or `max_tokens`.

    max_tokens: None means 128, or what fits into the model. new_blocks=False: without them.
    stops: stop ids besides those of the model.

    Raises UserError as `check_length` does.
    """
    model.check_new_blocks(new_blocks)
    tokens, max_tokens = check_length(model, prompt, max_tokens)
    sampling = sampling or Sampling()
    program = Program(model.config, model.plan.segments, model.dtype, new_blocks)
    draw = sampling.draw(model.config.vocab_size)
    return _stream(model, program, tokens, max_tokens, draw, stop_ids(model).union(stops))


def _stream(
    model: Model,
    program: Program,
    tokens: np.ndarray,
    max_tokens: int,
    draw: Draw,
    stops: frozenset[int],
) -> Iterator[int]:
    length = len(tokens)
    padded = np.zeros((1, padded_length(length)), np.int32)
    padded[0, :length] = tokens
    token, cache = _prefill(program, model.params, padded, np.int32(length), draw)
    cache = grow(cache, padded_length(length + max_tokens))
    for position in range(length, length + max_tokens):
        made = token
        if position + 1 < length + max_tokens:
            # Started before this token is looked at, so that the device does not wait for us.
            token, cache = _decode(program, model.params, cache, made, np.int32(position), draw)
        value = int(made)
        if value in stops:
            return
        yield value


def stream_text(
    model: Model,
    prompt: str,
    *,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    new_blocks: bool = True,
) -> Iterator[str]:
    """Pieces of the text that follows `prompt`, as `stream_tokens` makes them.

    Raises:
      UserError: the model has no tokenizer, or what `stream_tokens` raises.
    """
    ids = prompt_ids(model, prompt)
    tokens = stream_tokens(
        model, ids, max_tokens=max_tokens, sampling=sampling, new_blocks=new_blocks
    )
    return _decoded(model, ids, tokens)


def stream_answer(
    model: Model,
    messages: Sequence[Message],
    *,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    new_blocks: bool = True,
) -> Iterator[str]:
    """Pieces of the model's answer to `messages`, in its own chat template, as they are made.

    messages: mappings with `role` (system, user or assistant) and `content`; the last is a user's.
    max_tokens: None means 128, or what fits. sampling: None is greedy. It ends where the template
    ends an answer, at an end token of the model's, or after `max_tokens`.

    Raises UserError for a model without a tokenizer or a chat template, for messages that the
    template does not take, and for more tokens than the model has positions.
    """
    ids = chat_ids(model, messages)
    end = ChatTemplate.of_tokenizer(model.require_tokenizer()).end_id
    tokens = stream_tokens(
        model,
        ids,
        max_tokens=max_tokens,
        sampling=sampling,
        new_blocks=new_blocks,
        stops=() if end is None else (end,),
    )
    return _decoded(model, ids, tokens)


def _decoded(model: Model, before: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, which follow the ids `before`."""
    decoder = model.require_tokenizer().stream_decoder()
    for token in before[-DECODER_CONTEXT:]:
        decoder.push(token)
    for token in tokens:
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.flush():
        yield piece
