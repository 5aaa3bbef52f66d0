from __future__ import annotations

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import full_disk
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from llamapro_jax import metrics
from llamapro_jax.errors import UserError
from llamapro_jax.metrics import MetricsWriter, ProgressDisplay, read_metrics


def write_run(directory, steps, **options):
    """What a run of `steps` steps logs: a train line a step, a held-out line every two."""
    start = options.get("resume_step")
    with MetricsWriter(directory, **options) as writer:
        if start is None:
            writer.write("eval", 0, name="prose", loss=3.0)
        for step in range((start or 0) + 1, steps + 1):
            writer.write("train", step, loss=1 / step, learning_rate=1e-8 * step)
            if step % 2 == 0:
                writer.write("eval", step, name="prose", loss=3.0 - step)
                writer.write("eval", step, name="code", loss=4.0 - step)


def test_records_are_json_lines_flushed_as_they_are_written(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    record = writer.write("train", np.int32(1), loss=np.float32(0.5), tokens=np.int64(7))
    assert record == {"kind": "train", "step": 1, "loss": 0.5, "tokens": 7}
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert line == '{"kind": "train", "step": 1, "loss": 0.5, "tokens": 7}\n'
    assert (
        read_metrics(tmp_path / "run")
        == [record]
        == read_metrics(tmp_path / "run" / "metrics.jsonl")
    )
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_null(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, loss=value)
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"kind": "train", "step": 1, "loss": null}\n'


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "st', '{"kind": "train", "step": 9}'])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, torn):
    write_run(tmp_path / "whole", 8)
    write_run(tmp_path / "run", 5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write_run(tmp_path / "run", 8, resume_step=3)
    whole, run = (tmp_path / name / "metrics.jsonl" for name in ("whole", "run"))
    assert run.read_bytes() == whole.read_bytes()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_record_that_survived_is_not_written_twice(tmp_path):
    write_run(tmp_path, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        assert writer.recorded("eval", 4, "code") and writer.recorded("train", 4)
        assert not writer.recorded("eval", 4, "other") and not writer.recorded("train", 5)
        writer.write("eval", 4, name="code", loss=0.0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_fresh_run_begins_an_empty_file(tmp_path):
    write_run(tmp_path, 4)
    MetricsWriter(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": 3}\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: is not a line of metrics"):
        read_metrics(path)


@pytest.mark.parametrize("junk", [b"\x00" * 40, b'{"kind": 3}', b'{"kind": "train", "step": "x"}'])
def test_a_damaged_line_does_not_hinder_going_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], junk: bytes
) -> None:
    write_run(tmp_path, 5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for name in ("metrics.jsonl.damaged", "metrics.jsonl.damaged1"):
        path.write_bytes(b"".join([*lines[:2], junk + b"\n", *lines[3:]]))
        damaged = path.read_bytes()
        with MetricsWriter(tmp_path, resume_step=4, silent=True):
            assert capsys.readouterr().err == "" and path.read_bytes() == damaged
        write_run(tmp_path, 5, resume_step=4)
        assert path.read_bytes() == b"".join([*lines[:2], *lines[3:]])
        assert (tmp_path / name).read_bytes() == damaged
        said = capsys.readouterr().err
        assert f"1 damaged lines are left out (3); as it was, the file is kept as {name}" in said


# ------------------------------------------------------------------- trackers


def tensorboard_events(directory):
    events = []
    for file in sorted((directory / "tensorboard").glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_tensorboard_gets_the_scalars_and_forgets_what_a_resume_repeats(tmp_path):
    write_run(tmp_path, 2, tensorboard=True)
    write_run(tmp_path, 3, tensorboard=True, resume_step=1)
    events = tensorboard_events(tmp_path)
    found = {(v.tag, e.step) for e in events for v in e.summary.value}
    assert {("train/loss", 1), ("eval/prose/loss", 0), ("eval/code/loss", 2)} <= found
    assert ("train/loss", 3) in found and not any(tag == "train/step" for tag, _ in found)
    restarts = [e.step for e in events if e.HasField("session_log")]
    assert restarts == [0, 2]


def fake_wandb(monkeypatch, failing):
    calls = []

    def act(name):
        def call(*arguments, **named):
            calls.append((name, arguments, named))
            if name == failing:
                raise RuntimeError("the server is gone")
            return run

        return call

    run = types.SimpleNamespace(log=act("log"), finish=act("finish"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=act("init")))
    return calls


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_an_outage_of_wandb_is_one_warning(tmp_path, monkeypatch, capsys, failing):
    calls = fake_wandb(monkeypatch, failing)
    write_run(tmp_path / "plain", 4)
    write_run(tmp_path / "run", 4, wandb_project="p")
    plain, run = (tmp_path / name / "metrics.jsonl" for name in ("plain", "run"))
    assert run.read_bytes() == plain.read_bytes()
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1 and "RuntimeError: the server is gone" in warnings[0]
    assert [name for name, *_ in calls].count(failing) == 1


def test_wandb_gets_the_settings_the_scalars_and_the_same_run_on_resume(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch, None)
    options = {"wandb_project": "p", "wandb_mode": "offline", "config": {"seed": 1}}
    write_run(tmp_path / "one", 2, **options)
    write_run(tmp_path / "one", 3, resume_step=2, **options)
    write_run(tmp_path / "one", 1, **options)
    first, resumed, fresh = (named for name, _, named in calls if name == "init")
    assert first["project"] == "p" and first["mode"] == "offline" and first["config"] == {"seed": 1}
    assert first["id"] == resumed["id"] != fresh["id"]
    logged = [(arguments[0], named["step"]) for name, arguments, named in calls if name == "log"]
    assert ({"eval/prose/loss": 3.0}, 0) in logged
    assert ({"train/loss": 0.5, "train/learning_rate": 2e-8}, 2) in logged
    assert [name for name, *_ in calls].count("finish") == 3


def test_wandb_is_not_imported_unless_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    write_run(tmp_path / "one", 1)
    assert capsys.readouterr().err == ""
    write_run(tmp_path / "two", 1, wandb_project="p")
    assert "Weights & Biases is off" in capsys.readouterr().err


# ------------------------------------------------------------------- the terminal

TRAIN = {"kind": "train", "step": 10, "loss": 2.5, "learning_rate": 2e-4, "grad_norm": 1.5,
         "tokens_per_second": 12345.0, "useful_flops_per_second": 2.5e12}  # fmt: skip
EVAL = {"kind": "eval", "step": 10, "name": "prose", "loss": 2.0, "perplexity": 7.39}


def test_plain_lines_appear_at_once_and_tell_the_time_left(monkeypatch):
    clock = iter([0.0, 30.0, 40.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with ProgressDisplay(100, stream=stream) as display:
        display.log(TRAIN)
        assert stream.getvalue() == (
            "step 10/100  loss 2.5000  lr 2.00e-04  grad norm 1.5  12.3k tokens/s  2.5 TFLOP/s"
            "  0:04:30 left\n"
        )
        display.log(EVAL)
        display.advance(15)
        display.log({"kind": "train", "step": 20, "loss": None})
    _, held_out, last = stream.getvalue().splitlines()
    assert held_out == "step 10/100  held-out prose:  loss 2.0000  perplexity 7.39"
    # 10 seconds for 10 steps: the 30 seconds before the first line held the compilation.
    assert last == "step 20/100  loss nan  0:01:20 left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    stream = Terminal()
    with ProgressDisplay(100, first_step=5, stream=stream) as display:
        display.advance(9)
        display.log(TRAIN)
        display.log(EVAL)
        display.message("[saved]")
    shown = stream.getvalue()
    assert "step 10/100" in shown and "12.3k tokens/s" in shown and "\x1b[" in shown
    assert "held-out prose:" in shown and "[saved]" in shown


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (999, "999"), (1e3, "1k"), (1.5e9, "1.5G"), (3e15, "3P")]
)
def test_human_numbers(value, text):
    assert metrics.human(value) == text
    assert metrics.human(value, "B").replace(" ", "") == text + "B"


def test_durations():
    assert metrics.duration(3725.4) == "1:02:05"
    assert metrics.duration(90000) == "25:00:00"


def test_a_record_is_strict_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("eval", 0, name="Prosa, ü", loss=1e-300)
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["name"] == "Prosa, ü"


def test_a_silent_writer_knows_what_is_recorded_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write("eval", step, name="old", loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        MetricsWriter(tmp_path, resume_step=1, tensorboard=True, silent=True) as writer,
        ProgressDisplay(3, silent=True) as display,
    ):
        assert writer.recorded("eval", 1, "old") and not writer.recorded("eval", 2, "old")
        display.log(writer.write("eval", 2, name="old", loss=2.0))
        display.message("hello")
        assert writer.recorded("eval", 2, "old")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------- a disk that is full


disk = full_disk.fixture()


def write_long(writer: MetricsWriter, *steps: int) -> None:
    """Lines of 10 kB, so that the limit is beyond every other file of a test."""
    for step in steps:
        writer.write("eval", step, name="x" * 10_000, loss=1 / step)


def test_lines_wait_while_a_disk_is_full_and_none_is_lost(
    tmp_path: Path,
    disk: full_disk.Disk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with MetricsWriter(tmp_path / "whole") as writer:
        write_long(writer, *range(1, 9))
    lost: list[Any] = []
    with MetricsWriter(tmp_path / "run", lost=lost.extend) as writer:
        write_long(writer, 1, 2, 3)
        disk.limit(35_000)  # in the middle of a line
        write_long(writer, 4, 5)
        assert [record["step"] for record in writer.waiting()] == [4, 5]
        assert [record["step"] for record in writer.records()] == [1, 2, 3, 4, 5]
        # What is on the disk are whole lines, should the process die now.
        assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3]
        disk.limit(45_000)  # room for one of two
        write_long(writer, 6)
        disk.mend()
        write_long(writer, 7)
        assert writer.waiting() == []
        disk.limit(75_000)
        write_long(writer, 8)
        disk.mend()
    whole, run = (tmp_path / name / "metrics.jsonl" for name in ("whole", "run"))
    assert run.read_bytes() == whole.read_bytes() and not lost
    told = [line.partition("metrics.jsonl: ")[2] for line in capsys.readouterr().err.splitlines()]
    cannot = "cannot be written (File too large); its lines wait in memory, and training goes on"
    assert told == [cannot, "is written again, and has all lines", cannot]


def test_lines_that_are_lost_are_counted(
    tmp_path: Path,
    disk: full_disk.Disk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost: list[Any] = []
    with MetricsWriter(tmp_path, lost=lost.extend) as writer:
        write_long(writer, 1, 2)
        disk.limit(25_000)
        write_long(writer, 3, 4)
    disk.mend()
    assert lost == [("eval", 3, "x" * 10_000), ("eval", 4, "x" * 10_000)]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.endswith(
        ": lacks the last 2 lines, which could not be written\n"
    )
