"""How fast a run is."""

from __future__ import annotations

import time

from llamapro_jax.flops import step_flops
from llamapro_jax.training.setup import Setup


class Rate:
    """Tokens a second between two lines of the log, evaluation and saving left out."""

    def __init__(self, setup: Setup, step: int) -> None:
        source, data = setup.source, setup.config.data
        self.tokens_a_step = data.batch_size * data.sequence_length
        self.flops_a_token = step_flops(
            source.config, source.plan, setup.config.trainable, data.sequence_length
        ).total
        self._since = (step, time.monotonic())

    def pause(self, seconds: float) -> None:
        step, since = self._since
        self._since = (step, since + seconds)

    def take(self, step: int) -> dict[str, float]:
        before, since = self._since
        now = time.monotonic()
        self._since = (step, now)
        rate = (step - before) * self.tokens_a_step / max(now - since, 1e-9)
        return {
            "tokens_per_second": rate,
            "useful_flops_per_second": rate * self.flops_a_token,
        }
