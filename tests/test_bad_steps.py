"""Updates that are skipped: the state to the bit, the counts, the end of the run, going on."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same_run, run_config, shared_programs, write_model, write_texts
from steps import PLANS, begin, expanded_params, model_config, random_batch
from steps import run_config as step_config

from llamapro_jax import cli
from llamapro_jax import optimizer as optimizers
from llamapro_jax.checkpoint import committed_steps
from llamapro_jax.config import OptimizerConfig
from llamapro_jax.data.mixture import Mixture
from llamapro_jax.errors import UserError
from llamapro_jax.metrics import read_metrics
from llamapro_jax.optimizer import build_schedule
from llamapro_jax.training import bad_steps, guard, loop, step
from llamapro_jax.training.events import read_events
from llamapro_jax.training.loop import train
from llamapro_jax.training.state import TrainState, leaf_path
from llamapro_jax.training.step import build_train_step
from llamapro_jax.training.stopping import Stopped

PLAN = PLANS["2 of 4"]
CONFIG = model_config(PLAN)
PARAMS = expanded_params(CONFIG, PLAN)


def bits(tree: Any) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_path(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def spoiled(frozen: Any) -> Any:
    """Frozen weights of which one is no number, so that the loss is none."""
    return {**frozen, "embed": frozen["embed"].at[:].set(jnp.nan)}


# ------------------------------------------------------------------- in the step


def test_a_bad_step_changes_no_bit_but_the_number_of_steps() -> None:
    run = step_config(optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5))
    state, frozen, optimizer = begin(run, PARAMS)
    take = build_train_step(CONFIG, PLAN, run, optimizer)
    state, metrics = take(state, frozen, random_batch(0))
    assert [int(metrics[name]) for name in ("bad", "skipped", "in_a_row")] == [0, 0, 0]
    before = bits((state.trainable, state.opt_state))
    for number in (1, 2):
        state, metrics = take(state, spoiled(frozen), random_batch(number))
        assert math.isnan(float(metrics["loss"]))
        assert [int(metrics[n]) for n in ("bad", "skipped", "in_a_row")] == [1, number, number]
        assert bits((state.trainable, state.opt_state)) == before
        assert int(state.step) == 1 + number
    # As if the two had not been: the optimizer and its schedule count updates.
    state, metrics = take(state, frozen, random_batch(3))
    assert [int(metrics[name]) for name in ("bad", "skipped", "in_a_row")] == [0, 2, 0]
    schedule = build_schedule(run.optimizer, run.training.steps)
    assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(1)))
    other, frozen, _ = begin(run, PARAMS)
    for number in (0, 3):
        other, _ = take(other, frozen, random_batch(number))
    assert bits((state.trainable, state.opt_state)) == bits((other.trainable, other.opt_state))
    assert bits(state.trainable) != {path: before[f"0.{path}"] for path in bits(state.trainable)}


def test_a_gradient_that_is_no_number_is_skipped_though_the_loss_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflowing(*arguments: Any) -> Any:
        loss, gradients = gradients_of(*arguments)
        return loss, {**gradients, "new": jax.tree.map(lambda g: g * 1e30 * 1e30, gradients["new"])}

    gradients_of = step.loss_and_gradients
    monkeypatch.setattr(step, "loss_and_gradients", overflowing)
    run = step_config()
    state, frozen, optimizer = begin(run, PARAMS)
    before = bits(state.trainable)
    state, metrics = build_train_step(CONFIG, PLAN, run, optimizer)(state, frozen, random_batch())
    assert math.isfinite(float(metrics["loss"])) and not math.isfinite(float(metrics["grad_norm"]))
    assert int(metrics["bad"]) == guard.NOT_FINITE
    assert bits(state.trainable) == before


def test_the_check_costs_no_memory_and_the_state_is_written_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = step_config(rows=8, length=64, loss_chunk=64)
    state, frozen, optimizer = begin(run, PARAMS)
    batch = random_batch(rows=8, length=64)

    def memory() -> Any:
        lowered = build_train_step(CONFIG, PLAN, run, optimizer).lower(state, frozen, batch)
        return lowered.compile().memory_analysis()

    checked = memory()
    for module in (step, optimizers):
        monkeypatch.setattr(module, "chosen", lambda take, new, old: new)
    unchecked = memory()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert checked.alias_size_in_bytes == unchecked.alias_size_in_bytes == size
    assert checked.temp_size_in_bytes < 1.01 * unchecked.temp_size_in_bytes


def judged(
    losses: list[float], sigma: float | None
) -> tuple[list[int], guard.Guard, dict[str, jax.Array]]:
    judge = jax.jit(guard.judge, static_argnums=4)
    state, found = guard.initial(), []
    for number, loss in enumerate(losses):
        taken = jnp.int32(number) - state.skipped
        _, state, metrics = judge(state, jnp.float32(loss), jnp.float32(1), taken, sigma)
        found.append(int(metrics["bad"]))
    return found, state, metrics


def test_spikes_are_what_is_far_above_the_losses_before() -> None:
    usual = np.random.default_rng(0).normal(3.0, 0.1, guard.MEMORY).tolist()
    found, state, metrics = judged([9.0, *usual[1:], 3.3, 4.0, math.nan, 3.0, 1.0], 6.0)
    # The first loss is usual too: nothing is a spike before there is something to go by.
    assert found[: guard.MEMORY] == [0] * guard.MEMORY
    found, state, metrics = judged([*usual, 3.3, 4.0, math.nan, 3.0, 1.0], 6.0)
    assert found[guard.MEMORY :] == [0, guard.SPIKE, guard.NOT_FINITE, 0, 0]
    assert [int(state.skipped), int(state.in_a_row)] == [2, 0]
    _, state, _ = judged(usual, 6.0)
    assert float(state.mean) == pytest.approx(np.mean(usual), rel=1e-5)
    assert float(state.variance) == pytest.approx(np.var(usual), rel=1e-3)
    found, state, metrics = judged([*usual, 4.0], None)
    assert found[-1] == 0 and float(state.mean) == 0.0 and "spike_limit" not in metrics


def test_saved_numbers_give_the_same_bits() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.1, 7).tolist()
    _, state, _ = judged([*losses, math.nan], 6.0)
    values = json.loads(json.dumps(state.values()))
    mesh = jax.make_mesh((1,), ("data",))
    assert bits(guard.restored(values, mesh)) == bits(state)
    assert bits(guard.restored(None, mesh)) == bits(guard.initial())


@pytest.mark.parametrize("where", ["mkdir", "write"])
def test_a_full_disk_while_the_rows_are_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    mixture = SimpleNamespace(places=lambda number: [("prose", 3)])
    rows = {"train.prose": SimpleNamespace(path="texts", split="train")}
    setup: Any = SimpleNamespace(
        resume_step=None,
        files=tmp_path,
        data=SimpleNamespace(rows=rows, mixture=mixture),
        config=SimpleNamespace(training=SimpleNamespace(bad_steps=3)),
    )
    values = {"bad": guard.NOT_FINITE, "loss": math.nan, "grad_norm": 1.0, "learning_rate": 0.1}
    metrics = {name: jnp.asarray(v) for name, v in {**values, "in_a_row": 1, "skipped": 1}.items()}
    said: list[str] = []
    with monkeypatch.context() as inner:
        if where == "mkdir":
            inner.setattr(Path, "mkdir", full)
        else:
            inner.setattr(bad_steps, "write_json", full)
        steps = bad_steps.BadSteps(setup, said.append)
        steps.look(1, metrics)
    assert "step 1: loss is nan; its update was skipped" in said[0]
    assert "its rows could not be written to bad_steps/1.json (No space left on device)" in said[0]
    assert [event["step"] for event in read_events(tmp_path, "update skipped")] == [1]
    steps.look(2, metrics)
    assert "its rows are in bad_steps/2.json" in said[1]
    assert json.loads((tmp_path / "bad_steps/2.json").read_text())["rows"]


# ------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("bad-steps")
    with shared_programs():
        write_model(directory)
        write_texts(directory / "texts")
        yield directory


def config_of(work: Path, output: Path, **changes: Any) -> Any:
    quick = {"training__eval_every": None, "data__eval": [], "training__log_every": 1}
    return run_config(work / "model", work / "texts", output, **{**quick, **changes})


@pytest.fixture
def bad_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of some steps (from 1) no number."""

    def spoil(*numbers: int) -> None:
        def build(config: Any, plan: Any, run: Any, optimizer: Any) -> Any:
            loss = step.summed_loss

            def take(state: TrainState, frozen: Any, batch: Any) -> Any:
                bad = jnp.isin(state.step + 1, jnp.array(numbers))

                def spoiled_loss(params: Any, part: Any, **options: Any) -> jax.Array:
                    return jnp.where(bad, jnp.nan, 1.0) * loss(params, part, **options)

                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(step, "summed_loss", spoiled_loss)
                    return build_train_step(config, plan, run, optimizer)(state, frozen, batch)

            return jax.jit(take, donate_argnums=0)

        monkeypatch.setattr(loop, "build_train_step", build)

    return spoil


def test_a_run_passes_over_bad_steps_says_so_and_goes_on_to_the_same_bits(
    work: Path,
    tmp_path: Path,
    bad_at: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad_at(2, 5, 6)
    changes = {"training__spike_sigma": 8.0, "training__save_every": None}
    whole = train(config_of(work, tmp_path / "whole", **changes))
    out = capsys.readouterr().out
    assert "step 2: loss is nan and grad_norm is nan; its update was skipped (1 in a row" in out
    assert "step 6: loss is nan and grad_norm is nan; its update was skipped (2 in a row, 3" in out
    trained = [r for r in read_metrics(whole) if r["kind"] == "train"]
    assert [r["skipped"] for r in trained] == [0, 1, 1, 1, 2, 3, 3, 3]
    assert [r["loss"] is None for r in trained] == [r["step"] in (2, 5, 6) for r in trained]
    assert json.loads((whole / "summary.json").read_text())["updates_skipped"] == 3
    assert [event["step"] for event in read_events(whole, "update skipped")] == [2, 5, 6]

    # Stopped between two bad steps: the counts and the usual loss come back with the rest.
    written = loop.MetricsWriter.write

    def stopping(self: Any, kind: str, number: int, **values: Any) -> Any:
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return written(self, kind, number, **values)

    config = config_of(work, tmp_path / "again", **changes)
    with monkeypatch.context() as inner:
        inner.setattr(loop.MetricsWriter, "write", stopping)
        with pytest.raises(Stopped):
            train(config)
    assert committed_steps(tmp_path / "again/checkpoints") == [5]
    train(config)
    assert_same_run(tmp_path / "again", whole, 8)
    assert "8: loss" not in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run_and_name_the_rows(
    work: Path, tmp_path: Path, bad_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    bad_at(3, 4)
    run = tmp_path / "run"
    config = config_of(work, run, training__bad_steps=2, training__save_every=1)
    for _ in range(2):  # The same command meets the same batches.
        with pytest.raises(UserError, match=r"(?s)bad_steps: 2 steps.*step 4: .*those of step 2"):
            train(config)
        assert committed_steps(run / "checkpoints")[-1] == 3
    found = json.loads((run / "bad_steps/4.json").read_text())
    assert (found["step"], found["loss"]) == (4, None) and found["why"].startswith("loss is nan")
    assert len(found["rows"]) == config.data.batch_size
    # What is named is what the step read.
    data, row = found["sources"]["words"], found["rows"][1]["row"]
    capsys.readouterr()
    place = [data["data"], "--split", data["split"], "--row", str(row)]
    assert cli.main(["inspect", *place]) == 0
    shown = capsys.readouterr().out
    assert f"row {row}" in shown
    # A larger limit passes over them.
    assert train(config_of(work, run, training__bad_steps=3, training__save_every=1)) == run
    assert json.loads((run / "summary.json").read_text())["updates_skipped"] == 2


def test_a_diverging_run_ends_and_keeps_no_number_that_is_none(work: Path, tmp_path: Path) -> None:
    config = config_of(
        work, tmp_path / "run", optimizer__learning_rate=1e30, optimizer__warmup_steps=0
    )
    with pytest.raises(UserError, match="3 steps in a row .*lower optimizer.learning_rate"):
        train(config)


def test_the_places_of_a_batch_are_those_that_are_read() -> None:
    class Numbered:
        """Rows whose tokens are their own number."""

        sequence_length = 2

        def __init__(self, first: int, rows: int) -> None:
            self.first, self.rows = first, rows

        def __len__(self) -> int:
            return self.rows

        def read(self, indices: Any) -> dict[str, np.ndarray]:
            tokens = np.array([[self.first + i] * 2 for i in indices], np.int32)
            ones = np.ones_like(tokens)
            return {
                "tokens": tokens,
                "segment_ids": ones,
                "positions": ones,
                "loss_mask": ones.astype(bool),
            }

    mixture = Mixture([("a", Numbered(0, 7), 1.0), ("b", Numbered(100, 5), 0.5)], 6, seed=1)
    for at in range(4):
        tokens = mixture.batch(at)["tokens"][:, 0]
        places = [(100 if name == "b" else 0) + row for name, row in mixture.places(at)]
        assert tokens.tolist() == places
