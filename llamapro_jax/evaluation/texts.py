"""How well a model predicts texts, and how far it moved from its base on them.

For each text: perplexity, bits per byte, the token shift against the base (the share of positions
whose most likely token has rank 1, 2 to 3, or a later one under the base) and the mean KL
divergence from the base. With the new blocks on, off, and at strengths between, from one copy of
the parameters. `docs/evaluation.md` defines the figures.

Legend: B batch, T row length, N = B * T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamapro_jax.config import load_config
from llamapro_jax.data.packing import pack
from llamapro_jax.data.readers.documents import Content, input_files, texts
from llamapro_jax.data.rows import Row, stack_rows, targets_and_weights
from llamapro_jax.errors import UserError
from llamapro_jax.evaluation.comparison import (
    Comparison,
    Setting,
    check_base,
    check_strengths,
    compare,
    recorded_original,
    scaled,
)
from llamapro_jax.evaluation.progress import tracked
from llamapro_jax.expansion import Segment
from llamapro_jax.hf.tokenizer import Tokenizer
from llamapro_jax.model.api import OpenedModel
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import Params, head_weight, hidden_states
from llamapro_jax.model.precision import full_precision
from llamapro_jax.training import run_directory

LONGEST_DEFAULT = 2048
DOCUMENTS_AT_ONCE = 64
# Float32 scores that exist at the same time for one model: 128 MiB.
SCORES_AT_ONCE = 2**25
MARGINAL_RANK = 3


# ------------------------------------------------------------------- texts


@dataclass
class Text:
    """The rows of one text, and for bits per byte what its documents hold.

    tokens: all but the first of each document, which nothing predicts. A last document that
    `max_rows` cut counts whole in `tokens` and `bytes`: only their ratio is used.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    bytes: int = 0


def text_files(path: str | Path) -> list[Path]:
    """The files of a text. Raises UserError where there are none."""
    return input_files(_content(path))


def _content(path: str | Path) -> Content:
    return Content(str(path), configured=False)


def read_text(
    name: str,
    path: str | Path,
    tokenizer: Tokenizer,
    sequence_length: int,
    max_rows: int | None = None,
) -> Text:
    """The first `max_rows` rows of the text at `path`, documents in order, packed as for training.

    Raises UserError as `documents.texts` does, and for a text that is empty.
    """
    text = Text(name)
    documents = texts(_content(path))

    def encoded() -> Iterator[list[int]]:
        while group := list(islice(documents, DOCUMENTS_AT_ONCE)):
            for one, ids in zip(
                group, tokenizer.encode_batch(group, bos=True, eos=True), strict=True
            ):
                text.tokens += len(ids) - 1
                text.bytes += len(one.encode())
                yield ids

    text.rows = list(islice(pack(encoded(), sequence_length), max_rows))
    if not text.rows:
        raise UserError(f"{path}: holds no text; name one that is not empty.")
    return text


# ------------------------------------------------------------------- what is computed


@partial(jax.jit, static_argnames=("config", "segments", "dtype", "with_new"))
def _states(
    params: Params,
    batch: Mapping[str, jax.Array],
    strength: jax.Array,
    *,
    config: ModelConfig,
    segments: tuple[Segment, ...],
    dtype: np.dtype,
    with_new: bool,
) -> jax.Array:
    """The final hidden states [B, T, D], with what the new blocks add times `strength`."""

    with full_precision(dtype):
        return hidden_states(
            {**params, "new": scaled(params["new"], strength)},
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            config=config,
            segments=segments,
            dtype=dtype,
            with_new=with_new,
        )


@jax.jit
def _compare(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    base_x_BTD: jax.Array,
    base_head_VD: jax.Array,
    targets_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each token -log p(target), KL(model || base), both float32, and the rank, int32.

    The rank is that of the model's most likely token under the base, from 1. Scores exist for a
    chunk of tokens at a time.
    """
    tokens = targets_BT.size
    chunk = min(max(SCORES_AT_ONCE // head_VD.shape[0], 16), tokens)
    padding = -tokens % chunk

    def split(array: jax.Array) -> jax.Array:
        flat = array.reshape(tokens, *array.shape[2:])
        padded = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(-1, chunk, *flat.shape[1:])

    def scores(x_ND: jax.Array, head_VD: jax.Array) -> jax.Array:
        head_VD = head_VD.astype(x_ND.dtype)
        return jnp.einsum("ND,VD->NV", x_ND, head_VD, preferred_element_type=jnp.float32)

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        x_ND, base_x_ND, targets_N = inputs
        log_p_NV = jax.nn.log_softmax(scores(x_ND, head_VD))
        log_q_NV = jax.nn.log_softmax(scores(base_x_ND, base_head_VD))
        nll_N = -jnp.take_along_axis(log_p_NV, targets_N[:, None], axis=-1)[:, 0]
        best_N1 = jnp.argmax(log_p_NV, axis=-1)[:, None]
        rank_N = 1 + jnp.sum(log_q_NV > jnp.take_along_axis(log_q_NV, best_N1, axis=-1), axis=-1)
        kl_N = jnp.sum(jnp.exp(log_p_NV) * (log_p_NV - log_q_NV), axis=-1)
        return nll_N, kl_N, rank_N.astype(jnp.int32)

    with jax.named_scope("compare"), full_precision(x_BTD.dtype):
        chunks = jax.lax.map(one, (split(x_BTD), split(base_x_BTD), split(targets_BT)))
    return jax.tree.map(lambda a: a.reshape(-1)[:tokens].reshape(targets_BT.shape), chunks)


def _states_of(setting: Setting, batch: Row) -> jax.Array:
    model = setting.model
    return _states(
        model.params,
        batch,
        np.float32(setting.factor),
        config=model.config,
        segments=model.plan.segments,
        dtype=model.dtype,
        # Strength 0 is the base itself: its own program, not one that adds zeros.
        with_new=setting.factor != 0,
    )


@dataclass
class Sums:
    """Totals over the predicted tokens of a text, in float64."""

    targets: int = 0
    nll: float = 0.0
    kl: float = 0.0
    unshifted: int = 0
    marginal: int = 0
    shifted: int = 0

    def add(self, figures: Sequence[jax.Array], counts_BT: np.ndarray) -> None:
        nll, kl, rank = (np.asarray(array)[counts_BT] for array in figures)
        self.targets += nll.size
        self.nll += float(nll.sum(dtype=np.float64))
        self.kl += float(kl.sum(dtype=np.float64))
        self.unshifted += int((rank == 1).sum())
        self.marginal += int(((rank > 1) & (rank <= MARGINAL_RANK)).sum())
        self.shifted += int((rank > MARGINAL_RANK).sum())


# ------------------------------------------------------------------- the evaluation


def default_sequence_length(model: OpenedModel) -> int:
    """Of a run, that of its configuration; else what the model has positions for, at most 2048."""
    if run_directory.is_run(model.source.directory):
        path = model.source.directory / run_directory.CONFIG_FILE
        return load_config(path).data.sequence_length
    return min(model.config.max_position_embeddings, LONGEST_DEFAULT)


def evaluate(
    model: OpenedModel,
    texts: Mapping[str, str | Path],
    *,
    strengths: Sequence[float] | None = None,
    base: OpenedModel | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_rows: int | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One dict for each text and setting; all texts are read before anything is computed.

    model, base: loaded; or only opened, then their parameters are read when all else is checked.
    texts: name -> text file, JSONL or directory. strengths: factors on what the new blocks add;
    None: 1 and 0. Strength 0 leaves them out: the base, to the bit. base: what to compare with
    instead of the model's own base; where more than the new blocks was trained, that is the model
    recorded in the lineage. sequence_length: None as `default_sequence_length`.

    The dicts have: text, model (the setting), strength, targets (predicted tokens), nll (nats, in
    all), loss (nats a token), perplexity, bits_per_byte, and against the base unshifted, marginal,
    shifted (shares of the targets) and kl (nats a token), None where there is no base.

    Raises:
      UserError: no tokenizer, no text or one that cannot be read, a value out of range, a `base`
        with another vocabulary or tokenizer.
    """
    check_strengths(model, strengths)
    if base is not None:
        check_base(model, base)
    if not texts:
        raise UserError("no text to evaluate on; name at least one.")
    read = read_texts(
        model, texts, sequence_length=sequence_length, batch_size=batch_size, max_rows=max_rows
    )
    base = base or recorded_original(model)
    comparison = compare(model.load(), strengths, None if base is None else base.load())
    return measure(comparison, read, batch_size, progress)


def read_texts(
    model: OpenedModel,
    texts: Mapping[str, str | Path],
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
    max_rows: int | None = None,
) -> list[Text]:
    """The rows of each text, for `measure`; raises UserError as `evaluate` does."""
    if sequence_length is None:
        sequence_length = default_sequence_length(model)
    _check_sizes(model, sequence_length, batch_size, max_rows)
    tokenizer = model.require_tokenizer()
    read = [read_text(n, p, tokenizer, sequence_length, max_rows) for n, p in texts.items()]
    for text in read:
        # Before the others, so that a tokenizer of another model is found at once.
        model.check_tokens([row["tokens"] for row in text.rows])
    return read


def measure(
    comparison: Comparison, texts: Sequence[Text], batch_size: int, progress: bool = False
) -> list[dict[str, Any]]:
    """The dicts that `evaluate` returns."""
    results = []
    for text in texts:
        sums = _evaluate_text(comparison, text, batch_size, progress)
        results += [
            _figures(text, setting, sums[i], comparison.base is not None)
            for i, setting in enumerate(comparison.settings)
        ]
    return results


def _check_sizes(
    model: OpenedModel, sequence_length: int, batch_size: int, max_rows: int | None
) -> None:
    longest = model.config.max_position_embeddings
    if not 2 <= sequence_length <= longest:
        raise UserError(
            f"sequence_length is {sequence_length}; this model takes 2 to {longest} "
            "(max_position_embeddings)."
        )
    for name, value in (("batch_size", batch_size), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")


def _evaluate_text(
    comparison: Comparison, text: Text, batch_size: int, progress: bool
) -> list[Sums]:
    sums = [Sums() for _ in comparison.settings]
    starts: Any = range(0, len(text.rows), batch_size)
    for start in tracked(starts, text.name) if progress else starts:
        batch = stack_rows(text.rows[start : start + batch_size], batch_size)
        targets_BT, weights_BT = targets_and_weights(batch)
        base_states = None if comparison.base is None else _states_of(comparison.base, batch)
        for total, setting in zip(sums, comparison.settings, strict=True):
            is_base = comparison.base is not None and setting.label == comparison.base.label
            states = base_states if is_base else _states_of(setting, batch)
            head = head_weight(setting.model.params)
            # Without a base the model is compared with itself: one program for all, so that the
            # same states give the same bits.
            if comparison.base is None:
                against = states, head
            else:
                against = base_states, head_weight(comparison.base.model.params)
            total.add(_compare(states, head, *against, targets_BT), weights_BT > 0)
    return sums


def _figures(text: Text, setting: Setting, sums: Sums, compared: bool) -> dict[str, Any]:
    def mean(total: float) -> float:
        return total / sums.targets if sums.targets else math.nan

    loss = mean(sums.nll)
    return {
        "text": text.name,
        "model": setting.label,
        "strength": setting.strength,
        "targets": sums.targets,
        "nll": sums.nll,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        # The loss stands also for the tokens that the cuts between rows leave unpredicted.
        "bits_per_byte": loss / math.log(2) * text.tokens / text.bytes,
        "unshifted": mean(sums.unshifted) if compared else None,
        "marginal": mean(sums.marginal) if compared else None,
        "shifted": mean(sums.shifted) if compared else None,
        "kl": mean(sums.kl) if compared else None,
    }


# ------------------------------------------------------------------- what is shown and kept

COLUMNS = {
    "text": "text",
    "model": "model",
    "targets": "tokens",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "unshifted": "unshifted",
    "marginal": "marginal",
    "shifted": "shifted",
    "kl": "KL to base",
}


def as_table(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The results as `{"columns": [...], "rows": [[...]]}`, as a run's report takes them."""
    rows = [[_finite(result[key]) for key in COLUMNS] for result in results]
    return {"columns": list(COLUMNS.values()), "rows": rows}


def as_json(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results as JSON can hold them: null for what is not finite."""
    return [{key: _finite(value) for key, value in result.items()} for result in results]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
