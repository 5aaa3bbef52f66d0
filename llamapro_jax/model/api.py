"""A model in memory: open it, take logits, generate. Documented in `docs/api.md`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax import generate
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan, Segment
from llamapro_jax.hf.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llamapro_jax.model import llama
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.params import load_params
from llamapro_jax.model.precision import full_precision
from llamapro_jax.sampling import Sampling
from llamapro_jax.sources import Source, altered_by, open_source
from llamapro_jax.views import Strength, Until

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")


@partial(jax.jit, static_argnames=("config", "segments", "dtype", "with_new"))
def _logits(
    params: llama.Params,
    tokens_BT: jax.Array,
    *,
    config: ModelConfig,
    segments: tuple[Segment, ...],
    dtype: np.dtype,
    with_new: bool,
) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    with full_precision(dtype):
        x_BTD = llama.hidden_states(
            params,
            tokens_BT,
            positions_BT,
            jnp.ones_like(tokens_BT),
            config=config,
            segments=segments,
            dtype=dtype,
            with_new=with_new,
        )
        return llama.logits(params, x_BTD)


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenedModel:
    """A model of which no parameter is in memory: what can be checked before `load` reads them.

    tokenizer: None when there is none beside the model. source: where the tensors come from.
    dtype: that of the parameters in memory and of the computation. base_altered_by: the training
    after which the model without its new blocks is not the original any more, an entry of the
    lineage; None: it is.
    """

    config: ModelConfig
    plan: ExpansionPlan
    tokenizer: Tokenizer | None = field(repr=False)
    source: Source = field(repr=False)
    dtype: np.dtype = np.dtype(np.float32)
    base_altered_by: Mapping[str, Any] | None = None

    def load(self) -> Model:
        """Reads the parameters into memory."""
        opened = {one.name: getattr(self, one.name) for one in fields(OpenedModel)}
        return Model(**opened, params=load_params(self.source, lambda stack, weight: self.dtype))

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError that names the files looked for when there is none."""
        return self.tokenizer or load_tokenizer(self.source.directory)

    def check_tokens(self, tokens_BT: Any) -> np.ndarray:
        """`tokens_BT` as int32 [B, T]. Raises UserError for another shape, type or range."""
        try:
            array = np.asarray(tokens_BT)
        except ValueError:
            raise UserError("tokens: rows differ in length; pad them to one length.") from None
        if array.ndim != 2 or array.size == 0:
            raise UserError(
                f"tokens: have shape {list(array.shape)}; they must be [B, T], neither being 0."
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"tokens: are {array.dtype}; they must be integers.")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.config.vocab_size:
            raise UserError(
                f"tokens: id {low if low < 0 else high} is not in the vocabulary, which has "
                f"{self.config.vocab_size} (0 to {self.config.vocab_size - 1})."
            )
        return array.astype(np.int32)

    def check_new_blocks(self, new_blocks: bool) -> None:
        """Raises UserError when leaving the new blocks out would not give the original."""
        if not new_blocks and self.base_altered_by is not None:
            raise UserError(
                f"{self.source.path}: the base was trained too "
                f"(trainable: {', '.join(self.base_altered_by['trainable'])}), so without the new "
                f"blocks this is not the original; load {self.base_altered_by['source']} instead."
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(OpenedModel):
    """A model whose parameters are in memory. params: the layout of `llamapro_jax.model.llama`.

    A text is tokenised by the model's own tokenizer; each row of tokens is one document from
    position 0.
    """

    params: llama.Params = field(repr=False)

    def load(self) -> Model:
        """Itself."""
        return self

    def logits(self, tokens_BT: Any, *, new_blocks: bool = True) -> jax.Array:
        """Scores of the next token at each position, [B, T, V] float32.

        tokens_BT: integers [B, T], of numpy, jax or nested lists of one length. A new shape
        compiles once. new_blocks=False leaves the inserted blocks of the last generation out: the
        base, from the same memory.

        Raises:
          UserError: tokens of another shape or type, an id outside the vocabulary; with
            new_blocks=False, a model whose base is not the original.
        """
        self.check_new_blocks(new_blocks)
        return _logits(
            self.params,
            self.check_tokens(tokens_BT),
            config=self.config,
            segments=self.plan.segments,
            dtype=self.dtype,
            with_new=new_blocks,
        )

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Any) -> list[int]: ...
    def generate(self, prompt: str | Sequence[int], **options: Any) -> str | list[int]:
        """What follows `prompt`: text after text, ids after ids. The options are `stream`'s."""
        pieces = self.stream(prompt, **options)
        return "".join(pieces) if isinstance(prompt, str) else list(pieces)

    @overload
    def stream(self, prompt: str, **options: Any) -> Iterator[str]: ...
    @overload
    def stream(self, prompt: Sequence[int], **options: Any) -> Iterator[int]: ...
    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        new_blocks: bool = True,
    ) -> Iterator[str] | Iterator[int]:
        """What follows `prompt`, as it is made, until an end token (left out) or `max_tokens`.

        max_tokens: None means 128, or what fits into the model. temperature 0 takes the most
        likely token; above it, tokens are drawn, reproducibly for a seed: the scores are divided
        by it, then cut to the `top_k` best, then to the fewest whose probabilities reach `top_p`,
        as in transformers. new_blocks: as for `logits`. The prompt goes through the model once,
        padded to a power of two (above 1024, to a multiple of 1024), then each token is one call
        of a program that is compiled once for each padded size; no option costs a compilation.
        The end tokens are those of `generation_config.json`, `config.json` and the tokenizer.

        Raises:
          UserError: an option out of range, an empty prompt, an id outside the vocabulary, more
            tokens than the model has positions, or a text for a model without a tokenizer.
        """
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "sampling": Sampling(temperature, top_k, top_p, seed),
            "new_blocks": new_blocks,
        }
        if isinstance(prompt, str):
            return generate.stream_text(self, prompt, **options)
        return generate.stream_tokens(self, prompt, **options)


def load(
    path: str,
    *,
    dtype: str = "float32",
    generation: int | None = None,
    strength: float = 1.0,
    allow_bin: bool = False,
) -> Model:
    """Opens a Flax checkpoint, a run, a Hugging Face directory or a hub id (`org/name@revision`).

    Of a run, the newest checkpoint, what was trained in float32 as it was trained. The whole model
    is in memory: 27 GB for a 7B in float32, half in bfloat16.

    dtype: of the parameters in memory and of the computation, "float32" or "bfloat16"; logits are
    float32 in either. float32 means float32 on every device: by default TPUs and GPUs round the
    factors of float32 products. generation: the model as it was after that expansion, 0 the
    original; when a later training changed those blocks too, a warning names the model that is
    meant. strength: a factor from 0 to 1 on what the new blocks add (on their two output
    projections). allow_bin: read pickled `.bin` files, as weights only; needs PyTorch.

    Raises:
      UserError: what is wrong with the files or an argument, and the mend.
    """
    return open_model(
        path, dtype=dtype, generation=generation, strength=strength, allow_bin=allow_bin
    ).load()


def open_model(
    path: str,
    *,
    dtype: str = "float32",
    generation: int | None = None,
    strength: float = 1.0,
    allow_bin: bool = False,
) -> OpenedModel:
    """Opens a model and reads no parameter yet: the result's `load` does. Arguments as of `load`.

    Raises UserError as `load` does, for everything but damaged tensors.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    whole = open_source(str(path), allow_bin=allow_bin, masters=True)
    source: Source = whole if generation is None else Until(whole, generation)
    generation = source.plan.generation
    altered = altered_by(whole, generation)
    if altered is not None:
        log.warning(
            "%s: a later training changed generation %d too (trainable: %s); this is not what the "
            "model was then, which is %s",
            *(path, generation, ", ".join(altered["trainable"]), altered["source"]),
        )
    if strength != 1.0:
        source = Strength(source, strength)
    found = find_tokenizer(source.directory)
    return OpenedModel(
        config=source.config,
        plan=source.plan,
        tokenizer=load_tokenizer(source.directory) if found else None,
        source=source,
        dtype=np.dtype(jnp.dtype(dtype)),
        base_altered_by=altered_by(whole, generation - 1),
    )
