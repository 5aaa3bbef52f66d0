"""The identity proof: the grown model computes, to the bit, what the base computes.

Hidden states of base and grown model are carried through one block at a time by one compiled
block function in float32, so that a 7B is proven in the memory of a few blocks. Beside the logits,
exactly the output projections of the new blocks are zero, every other tensor of a new block is
its source's copy, and the parameter counts are right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.data.prefetch import Prefetcher
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import find_tokenizer, load_tokenizer
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import Context, apply_block, rms_norm
from llamapro_jax.model.precision import full_precision
from llamapro_jax.model.rope import rope_tables
from llamapro_jax.model.weights import (
    OUTER_BY_NAME,
    Tensor,
    block_parameters,
    block_weights,
    total_parameters,
)
from llamapro_jax.sources import Source

log = logging.getLogger(__name__)

PROOF_TOKENS = 64
# The head is multiplied a slice of the vocabulary at a time.
HEAD_ROWS = 4096

PROOF_TEXT = """\
The quick brown fox jumps over the lazy dog, while seventeen engineers measure twice and cut once.
def area(radius: float) -> float:
    return 3.14159 * radius ** 2
"""


@dataclass(frozen=True)
class Proof:
    """What was shown, as numbers; printed, it is a sentence.

    tokens: of the text that both models read; random_tokens: there was no tokenizer for a text.
    logits: compared, all equal in every bit. zero_tensors: output projections found to be zero.
    parameters_new: of the last generation's blocks.
    """

    tokens: int
    random_tokens: bool
    logits: int
    new_blocks: int
    zero_tensors: int
    parameters_base: int
    parameters_new: int

    def __str__(self) -> str:
        ids = "random ids" if self.random_tokens else "ids of real text"
        return (
            f"identity proven: {self.logits:,} float32 logits of {self.tokens} tokens ({ids}) are "
            f"bitwise equal; exactly the {self.zero_tensors} output projections of the "
            f"{self.new_blocks} new blocks are zero; {self.parameters_base:,} + "
            f"{self.parameters_new:,} parameters"
        )


def proof_tokens(source: Source, seed: int = 0) -> tuple[np.ndarray, bool]:
    """Token ids [1, T] int32 of real text, or random ones when there is no tokenizer."""
    vocab = source.config.vocab_size
    length = min(PROOF_TOKENS, source.config.max_position_embeddings)
    if find_tokenizer(source.directory):
        ids = load_tokenizer(source.directory).encode(PROOF_TEXT)[:length]
        if ids and max(ids) < vocab:
            return np.asarray([ids], np.int32), False
        raise UserError(
            f"{source.directory}: the tokenizer gives id {max(ids, default=None)}, but the model's "
            f"vocabulary has {vocab}; it is another model's tokenizer."
        )
    log.warning("%s: has no tokenizer; the proof uses random ids", source.path)
    return np.random.default_rng(seed).integers(0, vocab, (1, length), np.int32), True


def _block(source: Source, depth: int) -> dict[str, jax.Array]:
    """The tensors of a block as they are stored: Hugging Face's layout and dtype."""
    rows = block_weights(source.config)
    return {row.name: jax.device_put(source.read(Tensor(row, depth))) for row in rows}


@partial(jax.jit, static_argnums=0)
def _step(config: ModelConfig, stored: Any, x_BTD: jax.Array, context: Context) -> jax.Array:
    # Cast and turned round in here, where XLA does both as part of the products.
    leaves = {
        row.name: row.from_hf(stored[row.name].astype(jnp.float32), config)
        for row in block_weights(config)
    }
    return apply_block(config, leaves, x_BTD, context)[0]


@partial(jax.jit, static_argnums=0)
def _final(config: ModelConfig, x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
    return rms_norm(x_BTD, scale_D.astype(jnp.float32), config.rms_norm_eps)


@jax.jit
def _scores(x_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD.astype(jnp.float32))


def _head_slices(source: Source) -> Iterator[jax.Array]:
    """The output projection as it is stored, HEAD_ROWS of the vocabulary at a time."""
    name = "embed" if source.config.tie_embeddings else "head"
    head = source.read(Tensor(OUTER_BY_NAME[name], None))
    for start in range(0, head.shape[0], HEAD_ROWS):
        yield jax.device_put(head[start : start + HEAD_ROWS])


def _start(source: Source, tokens_BT: np.ndarray) -> jax.Array:
    embedding = source.read(Tensor(OUTER_BY_NAME["embed"], None))
    return jnp.asarray(embedding[tokens_BT].astype(np.float32))


def final_states(source: Source, tokens_BT: np.ndarray) -> jax.Array:
    """The final normed hidden states [B, T, D] float32, in the memory of two blocks."""
    context = _context(source.config, tokens_BT)
    x_BTD = _start(source, tokens_BT)
    # The number of blocks is not the block's business: one compiled function for both models.
    config = replace(source.config, num_blocks=0)
    # One block is read while another is computed, so that two are in memory, as they are stored.
    with Prefetcher(partial(_block, source), 0, source.config.num_blocks, depth=1) as blocks:
        for stored in blocks:
            x_BTD = _step(config, stored, x_BTD, context).block_until_ready()
    norm = jax.device_put(source.read(Tensor(OUTER_BY_NAME["final_norm"], None)))
    return _final(config, x_BTD, norm)


def _context(config: ModelConfig, tokens_BT: np.ndarray) -> Context:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return Context(*rope_tables(config, positions_BT))


def compare_logits(
    first: Source, second: Source, tokens_BT: np.ndarray
) -> tuple[int, int, float]:
    """Number of logits, how many differ in a bit, and the largest difference, in float32.

    Both models are run a block at a time by one compiled block function.
    """
    with full_precision(jnp.float32):
        return _compare(first, second, tokens_BT)


def _compare(first: Source, second: Source, tokens_BT: np.ndarray) -> tuple[int, int, float]:
    x, y = final_states(first, tokens_BT), final_states(second, tokens_BT)
    count = different = 0
    largest = 0.0
    for a, b in zip(_head_slices(first), _head_slices(second), strict=True):
        p, q = np.asarray(_scores(x, a)), np.asarray(_scores(y, b))
        count += p.size
        different += int((p.view(np.uint32) != q.view(np.uint32)).sum())
        largest = max(largest, float(np.abs(p - q).max()))
    return count, different, largest


def prove_identity(base: Source, grown: Source) -> Proof:
    """Compares logits, zeros, copies and counts of the two models, a block at a time in float32.

    grown: `base` with one more generation. Raises UserError, naming what is not as it should be,
    unless every logit is the same in every bit.
    """
    zeros = _check_new_blocks(grown)
    parameters = total_parameters(grown.config) - total_parameters(base.config)
    expected = grown.plan.num_new * block_parameters(grown.config)
    if parameters != expected:
        raise UserError(f"{grown.path}: has {parameters:,} new parameters instead of {expected:,}.")
    tokens_BT, random = proof_tokens(base)
    count, different, largest = compare_logits(base, grown, tokens_BT)
    if different:
        raise UserError(
            f"{grown.path}: {different:,} of {count:,} logits differ from {base.path} (by up to "
            f"{largest:.3g}); it does not compute what the base computes."
        )
    return Proof(
        tokens=tokens_BT.size,
        random_tokens=random,
        logits=count,
        new_blocks=grown.plan.num_new,
        zero_tensors=zeros,
        parameters_base=total_parameters(base.config),
        parameters_new=parameters,
    )


def _check_new_blocks(grown: Source) -> int:
    """Exactly the projections are zero, and the rest are copies. Returns how many are zero."""
    zeros = 0
    for depth in grown.plan.new_depths:
        parent = grown.plan.blocks[depth].copied_from
        for weight in block_weights(grown.config):
            tensor = Tensor(weight, depth)
            array = grown.read(tensor)
            if weight.zeroed:
                zeros += 1
                if array.view(np.uint8).any():
                    raise UserError(f"{grown.path}: {tensor.name} is not zero in a new block.")
            elif not np.array_equal(
                array.view(np.uint8), grown.read(Tensor(weight, parent)).view(np.uint8)
            ):
                raise UserError(
                    f"{grown.path}: {tensor.name} is no copy of {Tensor(weight, parent).name}."
                )
            elif weight.multiplies and not array.any():
                raise UserError(
                    f"{grown.path}: {tensor.name} is zero in a new block, so that the block would "
                    "never train; its source is zero too."
                )
    return zeros

