"""Steps whose update was skipped: said at once, written down, and too many of them end the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from llamapro_jax.errors import UserError
from llamapro_jax.files import write_json
from llamapro_jax.launch.processes import is_first
from llamapro_jax.training.events import record_event
from llamapro_jax.training.guard import SPIKE
from llamapro_jax.training.setup import Setup

BAD_STEPS = "bad_steps"
SKIPPED = "update skipped"


class BadSteps:
    """Looks at the metrics of each step, in order, as soon as they are there.

    say: takes a line for the log. All processes see the same numbers and do the same.
    """

    def __init__(self, setup: Setup, say: Callable[[str], None]) -> None:
        self._setup = setup
        self._say = say
        self._seen = setup.resume_step or 0

    def look(self, step: int, metrics: Mapping[str, jax.Array] | None) -> None:
        """Waits for the metrics of a step; the same step may be given again.

        Raises UserError when it was one bad step too many in a row.
        """
        if metrics is None or step <= self._seen:
            return
        self._seen = step
        if not int(metrics["bad"]):
            return
        values = {name: value.item() for name, value in jax.device_get(dict(metrics)).items()}
        why = _reason(values)
        rows = f"its rows are in {BAD_STEPS}/{step}.json"
        try:
            self._write_down(step, values, why)
        except OSError as error:  # a full disk ends no run
            reason = error.strerror or error
            rows = f"its rows could not be written to {BAD_STEPS}/{step}.json ({reason})"
        if is_first():
            record_event(self._setup.files, SKIPPED, step, why=why)
        self._say(
            f"WARNING: step {step}: {why}; its update was skipped ({values['in_a_row']} in a row, "
            f"{values['skipped']} in all), {rows}"
        )
        if values["in_a_row"] >= self._setup.config.training.bad_steps:
            raise UserError(self._too_many(step, values, why))

    def _write_down(self, step: int, values: Mapping[str, Any], why: str) -> None:
        """What `llamapro inspect DATA --split SPLIT --row ROW` takes, for each row of the batch."""
        if not is_first():
            return
        directory, data = self._setup.files, self._setup.data
        places = {where.partition(".")[2]: rows for where, rows in data.rows.items()
                  if not where.startswith("eval.")}  # fmt: skip
        batch = data.mixture.places(step - 1)
        (directory / BAD_STEPS).mkdir(exist_ok=True)
        record = {
            "step": step,
            "why": why,
            "loss": _number(values["loss"]),
            "grad_norm": _number(values["grad_norm"]),
            "learning_rate": values["learning_rate"],
            "sources": {
                name: {"data": str(places[name].path), "split": places[name].split}
                for name in sorted({name for name, _ in batch})
            },
            "rows": [{"source": name, "row": row} for name, row in batch],
        }
        write_json(directory / BAD_STEPS / f"{step}.json", record)

    def _too_many(self, step: int, values: Mapping[str, Any], why: str) -> str:
        directory, many = self._setup.directory, values["in_a_row"]
        return (
            f"{directory}: training.bad_steps: {many} steps in a row gave no usable numbers, the "
            f"last one step {step}: {why}. Their updates were skipped, the weights are those of "
            f"step {step - many}. The same command goes on from the newest checkpoint and meets "
            f"the same batches again, so look at them first: {BAD_STEPS}/{step}.json names each "
            "row, and `llamapro inspect DATA --split SPLIT --row ROW` shows it. When they are to "
            "blame, take out the text, with a new output, or pass over them with a larger "
            "training.bad_steps. When they are not, training diverged: take a lower "
            "optimizer.learning_rate, a longer warmup or a smaller optimizer.clip_norm, with a "
            "new output."
        )


def _reason(values: Mapping[str, Any]) -> str:
    if values["bad"] == SPIKE:
        return f"loss {values['loss']:.4g} is a spike, above {values['spike_limit']:.4g}"
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    return " and ".join(f"{name} is {values[name]}" for name in broken)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
