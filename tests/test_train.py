from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import full_disk
import numpy as np
import pytest
from runs import (
    VOCABULARY,
    assert_same_run,
    digests,
    log_lines,
    overrides,
    run_config,
    saved_arrays,
    settings,
    shared_programs,
    write_model,
    write_texts,
)

from llamapro_jax import checkpoint, cli
from llamapro_jax.checkpoint_files import committed_steps
from llamapro_jax.config import save_config
from llamapro_jax.errors import UserError
from llamapro_jax.expand import expand
from llamapro_jax.hf.tokenizer import train_tokenizer
from llamapro_jax.manifest import read_manifest
from llamapro_jax.metrics import MetricsWriter, read_metrics
from llamapro_jax.model.weights import tensors
from llamapro_jax.sources import base_is_original, open_source
from llamapro_jax.training import beginning, loop
from llamapro_jax.training.events import METRICS_LOST, read_events
from llamapro_jax.training.loop import train
from llamapro_jax.training.run_directory import RunRecord, open_run
from llamapro_jax.training.stopping import Stopped
from llamapro_jax.verify import verify

disk = full_disk.fixture()

# A run that compiles a step and no more.
SHORT = {"training__steps": 2, "training__eval_every": None, "data__eval": []}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An expanded model, texts, and a compilation cache that all runs share."""
    directory = tmp_path_factory.mktemp("train")
    with shared_programs():
        write_model(directory)
        write_texts(directory / "texts")
        yield directory


def config_of(work: Path, output: Path, **changes: Any) -> Any:
    return run_config(work / "model", work / "texts", output, **changes)


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    return train(config_of(work, work / "undisturbed"))


def signal_at(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: str, step: int, name: str | None = None
) -> None:
    """Sends a signal to this process when a record is written, once."""
    write, sent = MetricsWriter.write, []

    def patched(self: Any, *key: Any, **values: Any) -> Any:
        record = write(self, *key, **values)
        if key == (kind, step) and values.get("name") == name and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return record

    monkeypatch.setattr(MetricsWriter, "write", patched)


# ------------------------------------------------------------------- a run


def test_a_run_trains_the_new_blocks_and_nothing_else(work: Path, undisturbed: Path) -> None:
    before = open_source(str(work / "model"))
    after = open_run(undisturbed, masters=True)
    new = set(before.plan.new_depths)
    for tensor in tensors(before.config):
        same = before.read(tensor).tobytes() == after.read(tensor).tobytes()
        assert same == (tensor.block not in new), tensor.name


def test_a_run_leaves_its_model_as_it_was(work: Path, tmp_path: Path) -> None:
    before = digests(work / "model")
    train(config_of(work, tmp_path / "run"))
    assert digests(work / "model") == before


def test_a_run_is_what_was_written(undisturbed: Path) -> None:
    findings = verify(str(undisturbed))
    assert findings.good, findings.as_text()
    fixed = {"config.json", "fingerprint.json", "tokenizer.json", "tokenizer_config.json"}
    listed = set(read_manifest(undisturbed))
    assert fixed <= listed and not listed & {"config.yaml", "run.json", "metrics.jsonl", ".lock"}
    # Of the texts that it prepared, too.
    assert findings.checked["rows"] > 0 and findings.checked["lines of the log"] == 10


def test_the_log_has_every_line_in_order(undisturbed: Path) -> None:
    found = [(r["kind"], r["step"], r.get("name")) for r in log_lines(undisturbed)]
    evals = [[("eval", step, "old"), ("eval", step, "held")] for step in (0, 4, 8)]
    trains = [("train", step, None) for step in (2, 4, 6, 8)]
    assert found == [*evals[0], *trains[:2], *evals[1], *trains[2:], *evals[2]]
    records = read_metrics(undisturbed)
    first, last = (
        next(r for r in records if r["step"] == step and r.get("name") == "held") for step in (0, 8)
    )
    assert last["loss"] < first["loss"] - 0.1
    assert first["perplexity"] == pytest.approx(np.exp(first["loss"]))
    rows = json.loads(next((undisturbed / "data").glob("held-*/fingerprint.json")).read_text())
    # Every token but the first of a document is one to predict, cut between rows or not.
    nats = first["loss"] * (rows["tokens"] - rows["documents"])
    assert first["bits_per_byte"] == pytest.approx(nats / np.log(2) / rows["bytes"])
    assert first["tokens"] == rows["targets"]


def test_the_summary_counts_what_was_done(work: Path, undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    records = read_metrics(undisturbed)
    model = open_source(str(work / "model"))
    total = sum(model.read(t).size for t in tensors(model.config))
    assert summary["steps"] == 8 and summary["tokens"] == 8 * 4 * 32
    assert summary["frozen_bits_changed"] == 0
    assert summary["frozen_bits"] == 32 * summary["parameters"]["frozen"] > 0
    assert summary["parameters"]["total"] == total
    assert summary["final_losses"]["train"] == records[-3]["loss"]
    assert summary["final_losses"]["eval"] == {r["name"]: r["loss"] for r in records[-2:]}


def test_a_frozen_weight_that_moved_is_an_error(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = loop.build_train_step

    class Moving:
        """A step that changes a frozen weight in place, as a donated buffer would."""

        def __init__(self, *arguments: Any) -> None:
            self.step = build(*arguments)

        def lower(self, *arguments: Any) -> Any:
            compiled = self.step.lower(*arguments).compile()

            class Lowered:
                def compile(self) -> Any:
                    def step(state: Any, frozen: Any, batch: Any) -> Any:
                        frozen["final_norm"] = frozen["final_norm"].at[0].add(1e-6)
                        return compiled(state, frozen, batch)

                    return step

            return Lowered()

    monkeypatch.setattr(loop, "build_train_step", Moving)
    with pytest.raises(RuntimeError, match="frozen weights changed.*final_norm"):
        train(config_of(work, tmp_path / "run"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_finished_run_says_so(
    work: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(undisturbed)
    train(config_of(work, undisturbed))
    out = capsys.readouterr().out
    assert "is finished (8 steps). 0 of" in out and "frozen bits changed" in out
    assert digests(undisturbed) == before


def test_the_table_of_what_trains_is_printed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"trainable": ["new", "norms"], "compute_dtype": "bfloat16", **SHORT}
    train(config_of(work, tmp_path / "run", **changes))
    out = capsys.readouterr().out
    assert "new blocks" in out and "norms of base blocks" in out and "bfloat16  no" in out
    assert "0 of" in out
    # Said once, when it is so: what starts a run again reads it.
    assert out.count(": saved\n") == 1
    assert out.index("step 2: saving, 0 frozen") < out.index("\nstep 2: saved\n")
    leaves = {d.parent.name for d in (tmp_path / "run/checkpoints/2/trainable").glob("*/.zarray")}
    assert "base.0.mlp_norm" in leaves and "final_norm" in leaves and "base.0.q" not in leaves


def test_all_trains_everything(work: Path, tmp_path: Path) -> None:
    run = train(config_of(work, tmp_path / "run", trainable="all", **SHORT))
    before, after = open_source(str(work / "model")), open_run(run)
    for tensor in tensors(before.config):
        assert before.read(tensor).tobytes() != after.read(tensor).tobytes(), tensor.name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"]["frozen"] == summary["frozen_bits"] == 0
    assert not base_is_original(after)


@pytest.mark.slow
def test_all_trains_a_model_that_was_never_expanded(work: Path, tmp_path: Path) -> None:
    run = train(
        run_config(work / "base", work / "texts", tmp_path / "run", trainable="all", **SHORT)
    )
    assert open_run(run).plan.generation == 0


def test_a_run_is_the_model_of_a_second_one(work: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = run_config(undisturbed, work / "texts", tmp_path / "run", training__steps=4)
    second = train(config)
    # It begins exactly where the first one ended: its float32 masters, not a cast of them.
    first = read_metrics(undisturbed)
    ends = {r["name"]: r["loss"] for r in first if (r["kind"], r["step"]) == ("eval", 8)}
    begins = {r["name"]: r["loss"] for r in read_metrics(second) if r["step"] == 0}
    assert begins == ends and len(ends) == 2
    lineage = open_run(second).lineage
    assert [entry["verb"] for entry in lineage] == ["expand", "train", "train"]
    assert [entry.get("steps") for entry in lineage] == [None, 8, 4]


def test_a_tracker_that_fails_does_not_stop_training(
    work: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("llamapro_jax.metrics._TensorBoard", broken)
    run = train(config_of(work, tmp_path / "run", tracking__tensorboard=True))
    assert_same_run(run, undisturbed, 8)


def test_what_auto_stands_for_is_found_before_a_weight_is_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a device with a memory of its own the step is compiled first, and then takes the steps."""
    load, read = beginning.load_params, []
    monkeypatch.setattr(beginning, "load_params", lambda *a: read.append(a) or load(*a))
    monkeypatch.setattr(loop, "device_memory", lambda devices: 1000)
    with pytest.raises(UserError, match="the training step does not fit: it needs"):
        train(config_of(work, tmp_path / "run", **SHORT))
    assert not read
    monkeypatch.setattr(loop, "device_memory", lambda devices: 2**30)
    run = train(config_of(work, tmp_path / "run", **SHORT))
    assert committed_steps(run / "checkpoints") == [2]
    out = capsys.readouterr().out
    assert "fits: " in out and "compiled the step" not in out
    # The same command takes `auto` again, perhaps on another machine.
    assert "remat: auto" in (run / "config.yaml").read_text()


# ------------------------------------------------------------------- resume


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    work: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_of(work, run)
    save_config(config, tmp_path / "config.yaml")
    script = f"""
import os, pathlib, signal, time
from llamapro_jax.config import load_config
from llamapro_jax.metrics import MetricsWriter
from llamapro_jax.training.events import read_events
from llamapro_jax.training.loop import train
write = MetricsWriter.write
def patched(self, kind, step, **values):
    record = write(self, kind, step, **values)
    if (kind, step) == ("train", 6):
        while not pathlib.Path({str(run / "checkpoints/4/commit_success.txt")!r}).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return record
MetricsWriter.write = patched
train(load_config({str(tmp_path / "config.yaml")!r}))
"""
    root = Path(loop.__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert committed_steps(run / "checkpoints") == [4]
    # The log is ahead of the checkpoint, and has to go back.
    assert log_lines(run)[-1]["step"] == 6
    train(config)
    assert_same_run(run, undisturbed, 8)


@pytest.mark.parametrize(
    ("number", "status", "at"),
    [
        (signal.SIGTERM, 42, ("train", 2)),
        (signal.SIGINT, 130, ("train", 4)),
        (signal.SIGTERM, 42, ("eval", 0, "old")),
        (signal.SIGTERM, 42, ("eval", 4, "old")),
        (signal.SIGTERM, 42, ("eval", 8, "old")),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(
    work: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
    at: tuple[Any, ...],
) -> None:
    config = config_of(work, tmp_path / "run")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal_at(monkeypatch, number, *at)
    with pytest.raises(Stopped, match="Run the same command again to go on") as stopped:
        train(config)
    assert stopped.value.status == status
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    step = at[1]
    assert committed_steps(tmp_path / "run/checkpoints")[-1:] == ([step] if step else [])
    assert f"step {step}" in str(stopped.value) or "before the first step" in str(stopped.value)
    assert not (tmp_path / "run/summary.json").exists()
    train(config)
    assert_same_run(tmp_path / "run", undisturbed, 8)
    assert (tmp_path / "run/summary.json").exists()


def test_what_alters_no_weight_may_change_on_resume(
    work: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, "train", 2)
    with pytest.raises(Stopped):
        train(config_of(work, tmp_path / "run"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").symlink_to(work / "model")
    config = run_config(
        tmp_path / "elsewhere", work / "texts", moved, training__keep=1, training__log_every=8
    )
    train(config)
    assert saved_arrays(moved, 8) == saved_arrays(undisturbed, 8)
    assert committed_steps(moved / "checkpoints") == [8]
    assert RunRecord.read(moved).model == str(tmp_path / "elsewhere")
    assert "log_every: 8" in (moved / "config.yaml").read_text()


@pytest.fixture(scope="module")
def begun(work: Path) -> Path:
    """A run that stopped after 2 of 8 steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        signal_at(monkeypatch, signal.SIGTERM, "train", 2)
        with pytest.raises(Stopped):
            train(config_of(work, work / "begun"))
    return work / "begun"


def refused(run: Path, config: Any, message: str) -> None:
    before = digests(run)
    with pytest.raises(UserError, match=message):
        train(config)
    assert digests(run) == before


def test_other_settings_are_refused_with_the_difference(work: Path, begun: Path) -> None:
    config = config_of(work, begun, optimizer__learning_rate=0.02, training__steps=7, seed=3)
    refused(begun, config, r"(?s)optimizer.learning_rate: 0.01 -> 0.02.*name another output")
    refused(begun, config, "seed: 0 -> 3")
    refused(begun, config, "training.steps: 8 -> 7")


def test_another_base_is_refused(work: Path, begun: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path, seed=5)
    config = run_config(other, work / "texts", begun)
    refused(begun, config, "on another base: .*has digest [0-9a-f]{12}, the run began from")


def test_another_plan_is_refused(work: Path, begun: Path, tmp_path: Path) -> None:
    expand(str(work / "base"), tmp_path / "plan", positions=[0, 1], to="flax", prove=False)
    config = run_config(tmp_path / "plan", work / "texts", begun)
    refused(begun, config, r"another plan.*new ones at \[2, 5\].*new ones at \[1, 3\]")


def test_another_tokenizer_is_refused(work: Path, begun: Path, tmp_path: Path) -> None:
    """Of rows that were prepared before, nothing else says which tokenizer they are for."""
    shutil.copytree(work / "model", tmp_path / "model")
    train_tokenizer(["other words altogether"], VOCABULARY, tmp_path / "model")
    config = run_config(tmp_path / "model", work / "texts", begun)
    refused(begun, config, "another tokenizer: .*has fingerprint [0-9a-f]{12}, the run began with")


def test_a_run_may_become_longer(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With learning rates that do not depend on its length it is then as if it always was."""
    constant = {
        "optimizer__schedule": "constant",
        "optimizer__warmup_steps": 1,
        "training__eval_every": None,
        "data__eval": [],
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config_of(work, run, training__steps=3, **constant))
    train(config_of(work, run, training__steps=5, **constant))
    assert f"{run}: goes on to step 5 instead of 3; from step 3 on the" in capsys.readouterr().out
    train(config_of(work, whole, training__steps=5, **constant))
    assert saved_arrays(run, 5) == saved_arrays(whole, 5)
    assert json.loads((run / "summary.json").read_text())["steps"] == 5
    [event] = read_events(run)
    assert [event[key] for key in ("event", "step", "before", "now")] == ["made longer", 3, 3, 5]
    refused(run, config_of(work, run, training__steps=4, **constant), "training.steps: 5 -> 4")


def test_other_texts_are_refused(work: Path, begun: Path) -> None:
    file = work / "texts" / "train.txt"
    before = file.read_text()
    file.write_text(before + "one more line\n")
    try:
        refused(begun, config_of(work, begun), "data.sources.words: its text .* changed since")
    finally:
        file.write_text(before)


def test_a_finished_run_is_not_one_of_another_base_plan_or_text(
    work: Path, undisturbed: Path, tmp_path: Path
) -> None:
    def config(model: Path) -> Any:
        return run_config(model, work / "texts", undisturbed)

    refused(undisturbed, config(write_model(tmp_path, seed=5)), "on another base: ")
    refused(undisturbed, config(work / "base"), "another plan")
    refused(undisturbed, config(tmp_path / "none"), "none: no such directory")
    refused(undisturbed, config_of(work, undisturbed, seed=3), "seed: 0 -> 3")
    file = work / "texts" / "held.txt"
    before = file.read_text()
    file.write_text(before + "one more line\n")
    try:
        refused(undisturbed, config(work / "model"), "data.eval.held: its text .* changed since")
    finally:
        file.write_text(before)


def test_a_finished_run_remembers_where_its_model_went(
    work: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (tmp_path / "elsewhere").symlink_to(work / "model")
    train(run_config(tmp_path / "elsewhere", work / "texts", run))
    assert "is finished" in capsys.readouterr().out
    assert RunRecord.read(run).model == str(tmp_path / "elsewhere")


def test_two_processes_do_not_train_in_one_directory(
    work: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_of(work, run)
    save_config(config, tmp_path / "config.yaml")
    script = f"""
import signal
from llamapro_jax.config import load_config
from llamapro_jax.metrics import MetricsWriter
from llamapro_jax.training.events import read_events
from llamapro_jax.training.loop import train
def write(self, *_, **__):
    print("training", flush=True)
    signal.pause()
MetricsWriter.write = write
train(load_config({str(tmp_path / "config.yaml")!r}))
"""
    root = Path(loop.__file__).parents[2]
    first = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert any(line == "training\n" for line in first.stdout)
        message = rf"run: another process trains here \(process {first.pid} on .*, lease renewed"
        refused(run, config, message)
    finally:
        first.kill()
        first.communicate()
    train(config)
    assert_same_run(run, undisturbed, 8)


def test_eval_batches_limits_an_evaluation(work: Path, tmp_path: Path) -> None:
    changes = {**SHORT, "data__eval": [{"name": "held", "path": str(work / "texts/held.txt")}]}
    run = train(config_of(work, tmp_path / "run", training__eval_batches=1, **changes))
    rows = json.loads(next((run / "data").glob("held-*/fingerprint.json")).read_text())
    assert rows["rows"] > 4
    found = [record["tokens"] for record in read_metrics(run) if record["kind"] == "eval"]
    assert len(found) == 2 and all(0 < tokens <= 4 * 31 for tokens in found)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_with_the_same_bits(
    work: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "summary.json").unlink()
    for file in (run / "checkpoints/8/trainable/new.1.q").glob("0*"):
        file.write_bytes(file.read_bytes()[:20])
    train(config_of(work, run))
    assert_same_run(run, undisturbed, 8)
    said = capsys.readouterr().out
    warning = r"WARNING: .*checkpoints: step 8 is damaged and was set aside \(trainable new\.1\.q"
    assert re.search(warning, said) and "going on from step 4" in said
    assert "steps set aside: [8], see events.jsonl" in said
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["4", "8", "8.damaged"]
    assert json.loads((run / "summary.json").read_text())["steps_set_aside"] == [8]
    [event] = read_events(run)
    assert event["event"] == "step set aside" and "new.1.q" in event["reason"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_checkpoints_are_all_damaged_ends_with_44(
    work: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "summary.json").unlink()
    for step in (4, 8):
        (run / f"checkpoints/{step}/meta/metadata").unlink()
    log = (run / "metrics.jsonl").read_bytes()
    save_config(config_of(work, run), tmp_path / "config.yaml")
    for _ in range(2):
        assert cli.main(["train", str(tmp_path / "config.yaml")]) == 44
        assert "no checkpoint is left that can be trusted" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == log


def test_frozen_weights_that_change_are_found_before_they_are_saved(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(run: Any) -> None:
        if run.step == 4:
            norm = run.frozen["final_norm"]
            run.frozen = {**run.frozen, "final_norm": norm.at[0].set(norm[0] * 1.0000002)}
        save(run)

    save = loop._save
    monkeypatch.setattr(loop, "_save", flipped)
    with pytest.raises(RuntimeError, match="frozen weights changed while training: final_norm"):
        train(config_of(work, tmp_path / "run", training__save_every=2))
    assert committed_steps(tmp_path / "run/checkpoints") == [2]


def test_a_failed_save_does_not_end_a_run(
    work: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def room(path: Path) -> Any:
        usage = disk_usage(path)
        return usage if (path / "4").exists() or next(asked) else usage._replace(free=0)

    asked, disk_usage = iter((False, True)), shutil.disk_usage
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", room)
    train(config_of(work, tmp_path / "run"))
    said = capsys.readouterr().out
    assert re.search("WARNING: .*step 4 could not be saved .*0 GB are free", said)
    assert committed_steps(tmp_path / "run/checkpoints") == [8]
    assert_same_run(tmp_path / "run", undisturbed, 8)
    assert json.loads((tmp_path / "run/summary.json").read_text())["saves_failed"] == [4]


def test_a_log_that_cannot_be_written_does_not_end_a_run(
    work: Path,
    undisturbed: Path,
    tmp_path: Path,
    disk: full_disk.Disk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def log_on_a_full_disk(run: Any, *arguments: Any) -> None:
        if run.step < 6:
            disk.limit((tmp_path / "run/metrics.jsonl").stat().st_size + 20)
        log(run, *arguments)
        disk.mend()

    log = loop._log
    monkeypatch.setattr(loop, "_log", log_on_a_full_disk)
    # Of an earlier go: one line that this one writes, and one that is gone.
    lines = [["train", 2, None], ["train", 1, None]]
    monkeypatch.setattr(
        loop, "read_events", lambda _, name: [{"lines": lines}] * (name == METRICS_LOST)
    )
    train(config_of(work, tmp_path / "run", training__eval_every=None))
    assert "metrics.jsonl: cannot be written (File too large)" in capsys.readouterr().err
    found = log_lines(tmp_path / "run")
    assert [record["step"] for record in found if record["kind"] == "train"] == [2, 4, 6, 8]
    assert found == [r for r in log_lines(undisturbed) if r["kind"] == "train" or r["step"] != 4]
    assert json.loads((tmp_path / "run/summary.json").read_text())["metrics_lost"] == 1


def test_the_last_save_is_tried_once_more_and_then_ends_the_run(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="checkpoints of steps 2 and 2 could not be written"):
        train(config_of(work, tmp_path / "run", **SHORT))
    assert [event["step"] for event in read_events(tmp_path / "run")] == [2, 2]


# ------------------------------------------------------------------- the command


def test_the_command_trains(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_config(config_of(work, tmp_path / "unused"), tmp_path / "config.yaml")
    values = {"output": str(tmp_path / "run"), "training.steps": 2}
    assert cli.main(["train", str(tmp_path / "config.yaml"), *overrides(values)]) == 0
    assert committed_steps(tmp_path / "run/checkpoints") == [2]
    signal_at(monkeypatch, signal.SIGTERM, "train", 2)
    values = {"output": str(tmp_path / "second")}
    assert cli.main(["train", str(tmp_path / "config.yaml"), *overrides(values)]) == 42


def test_the_command_names_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = settings(tmp_path / "model", tmp_path / "texts", tmp_path / "run")
    (tmp_path / "config.yaml").write_text("modle: x\n")
    assert cli.main(["train", str(tmp_path / "config.yaml"), *overrides(values)]) == 2
    assert "config.yaml:1" in capsys.readouterr().err
