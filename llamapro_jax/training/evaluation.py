"""The loss of held-out texts while a run trains: the learning and the forgetting curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from llamapro_jax.data.prefetch import Prefetcher
from llamapro_jax.launch.processes import settled
from llamapro_jax.training.batches import evaluation_batch
from llamapro_jax.training.step import Batch, Metrics


def held_out_loss(
    step: Callable[[Any, Batch], Metrics],
    params: Any,
    rows: Any,
    batch_size: int,
    max_batches: int | None,
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The mean loss of a text's first `max_batches` batches (None: of all its rows).

    step: as `training.step.build_eval_step` gives it. All processes of the mesh call this; rows
    may be of any number, padding fills the last batch. Returns loss (nats a token), perplexity,
    tokens (those predicted) and, where the number of bytes of the text is known, bits_per_byte.
    None when `stopped()` came true on the way.
    """
    count = math.ceil(len(rows) / batch_size)
    count = count if max_batches is None else min(count, max_batches)

    def batch(index: int) -> Batch:
        return evaluation_batch(rows, index * batch_size, batch_size, mesh)

    totals = {"nll": 0.0, "tokens": 0}
    waiting: list[Metrics] = []

    def collect(keep: int) -> None:
        while len(waiting) > keep:
            for name, value in jax.device_get(waiting.pop(0)).items():
                totals[name] += value.item()

    with Prefetcher(batch, 0, count) as batches:
        for one in batches:
            if stopped():
                return None
            waiting.append(settled(step(params, one)))
            # The device always has the next batch, and never a queue of many.
            collect(keep=1)
    collect(keep=0)
    return _figures(totals["nll"], int(totals["tokens"]), rows.counts)


def _figures(nll: float, tokens: int, counts: Mapping[str, Any] | None) -> dict[str, float]:
    loss = nll / tokens if tokens else math.nan
    figures: dict[str, float] = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "tokens": tokens,
    }
    if counts is not None and counts["bytes"]:
        # The loss stands also for the tokens that the cuts between rows leave unpredicted, and
        # that of a part of the text for the whole. The first token of a document is given.
        tokens_a_byte = (counts["tokens"] - counts["documents"]) / counts["bytes"]
        figures["bits_per_byte"] = loss / math.log(2) * tokens_a_byte
    return figures
