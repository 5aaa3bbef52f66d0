"""`train(config)`: from a configuration to a finished run, in any number of goes.

What a run has done is a function of its configuration and the number of steps: the batch is one
of (seed, step), and a checkpoint holds all else. So a run that was killed and started again gives
the same bits as one that was not.

Of several processes (`llamapro_jax.launch.processes`) all go the same way through this module and
call whatever runs on the devices in the same order; the first one alone writes and speaks, but for
checkpoints, which all write.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_files import Directory
from llamapro_jax.checkpoint_restore import abstract
from llamapro_jax.checksum import checksums
from llamapro_jax.compilation_cache import enabled as compilation_cache
from llamapro_jax.config import RunConfig, validate
from llamapro_jax.data.prefetch import Prefetcher
from llamapro_jax.errors import UserError
from llamapro_jax.files import write_json
from llamapro_jax.launch.processes import count, from_first, is_first, settled
from llamapro_jax.metrics import Key, MetricsWriter, ProgressDisplay, duration
from llamapro_jax.model.llama import Params
from llamapro_jax.model.precision import full_precision
from llamapro_jax.profiling import Profile
from llamapro_jax.training.abstract import abstract_arguments
from llamapro_jax.training.agreement import (
    Comparison,
    require_same_command,
    require_same_inputs,
)
from llamapro_jax.training.bad_steps import BadSteps
from llamapro_jax.training.batches import place_batch
from llamapro_jax.training.beginning import differing, load, restore
from llamapro_jax.training.evaluation import held_out_loss
from llamapro_jax.training.events import (
    EVENTS_FILE,
    METRICS_LOST,
    SAVE_FAILED,
    SET_ASIDE,
    read_events,
    record_event,
)
from llamapro_jax.training.fit import Fitted, device_memory, resolve
from llamapro_jax.training.lease import Lease
from llamapro_jax.training.rate import Rate
from llamapro_jax.training.run_directory import CHECKPOINTS, SUMMARY_FILE
from llamapro_jax.training.run_files import RunFiles
from llamapro_jax.training.setup import Setup, finished, prepare
from llamapro_jax.training.state import (
    TrainState,
    format_table,
    merge,
    trainable_table,
)
from llamapro_jax.training.step import Batch, build_eval_step, build_train_step
from llamapro_jax.training.stopping import StopSignals
from llamapro_jax.training.watchdog import Watchdog

T = TypeVar("T")


def train(config: RunConfig, *, takeover: bool = False) -> Directory:
    """Trains until the last step, or on from the last checkpoint. Returns the run directory.

    takeover: ends another run that trains in the directory, instead of being refused.

    Raises UserError for bad input before anything is written, `training.stopping.Stopped` when
    SIGINT or SIGTERM asked it to stop and what it had done is saved, and
    `training.lease.TakenOver` when another run took the directory over.
    """
    validate(config)
    with (
        compilation_cache(config.compilation_cache),
        StopSignals() as stop,
        Lease(takeover) as lease,
        RunFiles(config.output, lease.confirm) as place,
    ):
        directory = place.run
        with stop.at_once(
            f"{directory}: stopped while it was prepared. Run the same command again to go on."
        ):
            require_same_command(config)
            summary = from_first(lambda: finished(config, place))
            if summary is not None:
                steps = summary["steps"]
                _say(f"{directory}: is finished ({steps} steps). {_frozen_line(summary)}.")
                return directory
            setup = prepare(config, lease, place)
            require_same_inputs(setup)
        with (
            jax.set_mesh(setup.mesh),
            Watchdog(config.training.watchdog, place.files, place) as watchdog,
        ):
            place.keep_copying()
            _run(setup, lease, stop, watchdog)
    return directory


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


@dataclass
class _Progress:
    """What one go of a run carries along.

    seconds: spent training before this go. waiting: the metrics of the newest step, which may
    still be running. told: the newest step that the log says is saved.
    """

    setup: Setup
    lease: Lease
    state: TrainState
    frozen: Params
    optimizer: optax.GradientTransformation
    checkpoints: Checkpoints
    metrics: MetricsWriter
    display: ProgressDisplay
    stop: StopSignals
    watchdog: Watchdog
    bad_steps: BadSteps
    compare: Comparison
    seconds: float
    evaluate_step: Any
    compiled_step: Any = None
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    waiting: Any = None
    told: int | None = None

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def look(self) -> None:
        """Waits for the newest step. Raises UserError after too many bad ones."""
        self.bad_steps.look(self.step, self.waiting)

    @property
    def saved(self) -> int | None:
        """The newest step on disk, as far as it is known."""
        saved = self.checkpoints.saved
        return self.setup.resume_step if saved is None else saved


def _run(setup: Setup, lease: Lease, stop: StopSignals, watchdog: Watchdog) -> None:
    config, source = setup.config, setup.source
    spec, dtype = config.trainable, config.compute_dtype
    _say(format_table(trainable_table(source.config, source.plan, spec, dtype)))
    _say(setup.data.passes(config.training.steps))
    stop.agree_over(setup.mesh)
    with stop.at_once(_nothing_lost(setup)):
        watchdog.progress("finding what fits in memory", slow=True)
        fitted = _fitted(setup, stop)
        setup = replace(setup, config=fitted.run)
        watchdog.progress("loading the model", slow=True)
        setup, state, frozen, optimizer = load(setup)
        seconds = 0.0
        if setup.resume_step is not None:
            watchdog.progress("loading a checkpoint", slow=True)
            from_first(lease.confirm)  # damaged steps are set aside
            wanted = abstract((state.trainable, state.opt_state))
            del state  # or there would be two in memory
            setup, state, seconds = restore(setup, *wanted)
    watchdog.progress("opening the log", slow=True)
    with (
        Checkpoints(
            setup.directory / CHECKPOINTS,
            config.training.keep,
            partial(_save_failed, setup),
            permitted=lease.confirm,
            before=setup.place.copy,
        ) as checkpoints,
        MetricsWriter(
            setup.files,
            resume_step=setup.resume_step,
            tensorboard=config.tracking.tensorboard,
            wandb_project=config.tracking.wandb_project,
            wandb_mode=config.tracking.wandb_mode,
            config=asdict(config),
            silent=not is_first(),
            lost=partial(_metrics_lost, setup),
        ) as metrics,
        ProgressDisplay(
            config.training.steps, setup.resume_step or 0, silent=not is_first()
        ) as display,
        full_precision(jnp.dtype(dtype)),
    ):
        if setup.resume_step is not None:
            display.message(f"{setup.directory}: going on from step {setup.resume_step}")
        run = _Progress(
            setup=setup,
            lease=lease,
            state=state,
            frozen=frozen,
            optimizer=optimizer,
            checkpoints=checkpoints,
            metrics=metrics,
            display=display,
            stop=stop,
            watchdog=watchdog,
            bad_steps=BadSteps(setup, display.message),
            compare=Comparison(setup, config.training.compare_every),
            seconds=seconds,
            evaluate_step=build_eval_step(
                source.config,
                source.plan,
                dtype,
                loss_chunk=config.training.loss_chunk,
                attention=config.training.attention,
            ),
            compiled_step=fitted.compiled,
            step=setup.resume_step or 0,
        )
        del state, frozen
        _evaluate_if_due(run)
        _stop_if_asked(run)
        if run.step < config.training.steps:
            _take_steps(run)
        _have_saved(run)
        watchdog.progress("ending the run", slow=True)
        _finish(run)
        checkpoints.finish()


def _nothing_lost(setup: Setup) -> str:
    step = setup.resume_step
    where = "before the first step" if step is None else f"saved at step {step}"
    return (
        f"{setup.directory}: stopped, {where} of {setup.config.training.steps}. Run the same "
        "command again to go on."
    )


def _fitted(setup: Setup, stop: StopSignals) -> Fitted:
    """The run with what its configuration left to `auto`, found before a weight is read.

    Where memory decides, the step is compiled for that; the same on all processes.
    """
    config, source = setup.config, setup.source

    def compile_candidate(run: RunConfig) -> jax.stages.Compiled:
        shapes = abstract_arguments(source.config, source.plan, run, setup.mesh)
        step = build_train_step(source.config, source.plan, run, shapes.optimizer)
        lowered = step.lower(shapes.state, shapes.frozen, shapes.batch)
        return stop.interruptible(lowered.compile)

    memory = from_first(lambda: device_memory(jax.local_devices()))
    with full_precision(jnp.dtype(config.compute_dtype)):
        return resolve(
            config, source.config, source.plan, setup.mesh.shape, memory, compile_candidate, _say
        )


def _batch(setup: Setup, step: int) -> Batch:
    mixture = setup.data.mixture
    return place_batch(
        partial(mixture.rows, step), mixture.batch_size, mixture.sequence_length, setup.mesh
    )


def _take_steps(run: _Progress) -> None:
    setup, training = run.setup, run.setup.config.training
    run.watchdog.progress("comparing the processes", slow=True)
    run.compare(run.step, run.state, run.frozen)
    compiled = run.compiled_step or _compile(run)
    _stop_if_asked(run)

    run.watchdog.progress(f"taking step {run.step + 1}", slow=True)
    rate = Rate(setup, run.step)
    with (
        Profile(
            setup.config.profile, setup.files, run.step, run.display.message, setup.directory
        ) as profile,
        Prefetcher(
            lambda step: (_batch(setup, step), run.compare.batch(step)), run.step, training.steps
        ) as batches,
    ):
        for batch, number in _readable(run, batches):
            run.state, metrics = settled(
                profile.take(run.step + 1, run.waiting, compiled, run.state, run.frozen, batch)
            )
            run.lease.check()
            # One step waits while another runs: the device is busy, and a stop is never far.
            run.look()
            run.step += 1
            run.waiting = metrics
            if run.compare.due(run.step):
                run.compare(run.step, run.state, run.frozen, number)
            last = run.step == training.steps
            if last or run.step % training.log_every == 0:
                _log(run, metrics, rate)
            run.display.advance(run.step)
            pause = time.monotonic()
            _evaluate_if_due(run)
            if last or _due(run.step, training.save_every):
                _save(run)
            rate.pause(time.monotonic() - pause)
            _stop_if_asked(run)
            run.watchdog.progress(f"taking step {run.step + 1}")


def _compile(run: _Progress) -> jax.stages.Compiled:
    setup, source = run.setup, run.setup.source
    run.watchdog.progress("compiling the step", slow=True)
    began = time.monotonic()
    with run.stop.at_once(_nothing_lost(setup)):
        step = build_train_step(source.config, source.plan, setup.config, run.optimizer)
        lowered = step.lower(run.state, run.frozen, _batch(setup, run.step))
        compiled = run.stop.interruptible(lowered.compile)
    run.display.message(f"compiled the step in {time.monotonic() - began:.1f} s")
    return compiled


def _readable(run: _Progress, batches: Iterator[T]) -> Iterator[T]:
    """The batches. When one cannot be read, what was done until then is saved first."""
    try:
        yield from batches
    except UserError:
        # The others of several processes do not know of it, and saving takes them all.
        if count() == 1 and run.step:
            _have_saved(run)
        raise


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _log(run: _Progress, metrics: Any, rate: Rate) -> None:
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    record = run.metrics.write(
        "train",
        run.step,
        loss=values["loss"],
        learning_rate=values["learning_rate"],
        grad_norm=values["grad_norm"],
        skipped=values["skipped"],
        tokens=run.step * rate.tokens_a_step,
        **rate.take(run.step),
        seconds=run.elapsed(),
    )
    run.display.log(record)


def _evaluate_if_due(run: _Progress) -> None:
    """Writes the losses of the held-out texts that the log does not have yet."""
    setup, config = run.setup, run.setup.config
    training = config.training
    ends = run.step in (0, training.steps)
    if not (ends or _due(run.step, training.eval_every)):
        return
    for name, rows in setup.data.held_out.items():
        if run.metrics.recorded("eval", run.step, name):
            continue

        def stopped(first: Iterator[bool], name: str = name) -> bool:
            # The first batch may compile.
            run.lease.check()
            run.watchdog.progress(f"evaluating {name}", slow=next(first))
            return run.stop.requested()

        figures = held_out_loss(
            run.evaluate_step,
            merge(run.state.trainable, run.frozen),
            rows,
            config.data.batch_size,
            training.eval_batches,
            setup.mesh,
            partial(stopped, chain([True], repeat(False))),
        )
        if figures is None:
            return
        run.display.log(run.metrics.write("eval", run.step, name=name, **figures))


def _save(run: _Progress) -> None:
    run.look()
    run.watchdog.progress(f"saving step {run.step}")
    _require_frozen(run)
    meta = {
        "model_digest": run.setup.record.model_digest,
        "compute_dtype": run.setup.config.compute_dtype,
        "data_position": run.step,
        "seconds": run.elapsed(),
        "guard": run.state.guard.values(),
    }
    _wait(run)
    run.display.message(f"step {run.step}: saving, 0 frozen bits changed")
    run.checkpoints.save(run.step, run.state.trainable, run.state.opt_state, meta)


def _have_saved(run: _Progress) -> None:
    """Returns when this step is on disk. A save that failed is tried once more."""
    run.watchdog.progress(f"saving step {run.step}", slow=True)
    while not (_wait(run) and run.saved == run.step):
        _save(run)


def _wait(run: _Progress) -> bool:
    """As `Checkpoints.wait`, and says, for who reads the log, which step is whole on disk."""
    done = run.checkpoints.wait()
    if run.checkpoints.saved != run.told:
        run.told = run.checkpoints.saved
        run.display.message(f"step {run.told}: saved")
    return done


def _save_failed(setup: Setup, step: int, reason: str) -> None:
    print(
        f"WARNING: {setup.directory / CHECKPOINTS}: step {step} could not be saved ({reason}); "
        "training goes on, and ends when the next save fails too",
        flush=True,
    )
    record_event(setup.files, SAVE_FAILED, step, reason=reason)


def _metrics_lost(setup: Setup, lines: list[Key]) -> None:
    record_event(setup.files, METRICS_LOST, lines[0][1], lines=lines)


def _require_frozen(run: _Progress) -> None:
    """Raises RuntimeError unless the frozen weights are those of the start, to the bit."""
    changed = differing(run.setup.record.frozen, checksums(run.frozen))
    if changed:
        raise RuntimeError(
            f"{run.setup.directory}: frozen weights changed while training: "
            f"{', '.join(changed[:5])}. The run is not to be trusted past step {run.saved or 0}, "
            "which was saved before; please report this."
        )


def _stop_if_asked(run: _Progress) -> None:
    run.lease.check()
    if not run.stop.requested():
        return
    if run.step:
        _have_saved(run)
    where = f"saved at step {run.step}" if run.step else "before the first step"
    raise run.stop.stopped(
        f"{run.setup.directory}: stopped, {where} of {run.setup.config.training.steps}. "
        "Run the same command again to go on."
    )


def _finish(run: _Progress) -> None:
    """Proves that the frozen weights are those of the start, and writes summary.json."""
    _require_frozen(run)
    from_first(run.lease.confirm)
    if is_first():
        _summarise(run)


def _summarise(run: _Progress) -> None:
    setup = run.setup
    records = run.metrics.records()
    # A later go may have written them after all, when it went on from an earlier step.
    lost = {tuple(r) for e in read_events(setup.files, METRICS_LOST) for r in e["lines"]}
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in (("trainable", run.state.trainable), ("frozen", run.frozen))
    }
    leaves = jax.tree.leaves(run.frozen)
    summary = {
        "steps": run.step,
        "tokens": run.step * setup.config.data.batch_size * setup.config.data.sequence_length,
        "seconds": run.elapsed(),
        "final_losses": {
            "train": next(r["loss"] for r in reversed(records) if r["kind"] == "train"),
            "eval": {
                r["name"]: r["loss"]
                for r in records
                if r["kind"] == "eval" and r["step"] == run.step
            },
        },
        "frozen_bits": sum(leaf.nbytes * 8 for leaf in leaves),
        "frozen_bits_changed": 0,
        "updates_skipped": run.state.guard.values()["skipped"],
        "steps_set_aside": [e["step"] for e in read_events(setup.files, SET_ASIDE)],
        "saves_failed": [e["step"] for e in read_events(setup.files, SAVE_FAILED)],
        "metrics_lost": sum(not run.metrics.recorded(*record) for record in lost)
        + len(run.metrics.waiting()),
        "parameters": {**sizes, "total": sum(sizes.values())},
    }
    write_json(setup.files / SUMMARY_FILE, summary)
    setup.place.copy()
    run.display.message(f"{setup.directory}: {run.step} steps in {duration(run.elapsed())}")
    run.display.message(_frozen_line(summary))
    for what in ("steps_set_aside", "saves_failed", "metrics_lost"):
        if summary[what]:
            run.display.message(f"{what.replace('_', ' ')}: {summary[what]}, see {EVENTS_FILE}")


def _frozen_line(summary: dict[str, Any]) -> str:
    if not summary["frozen_bits"]:
        return "everything trained, nothing was frozen"
    return f"{summary['frozen_bits_changed']} of {summary['frozen_bits']:,} frozen bits changed"
