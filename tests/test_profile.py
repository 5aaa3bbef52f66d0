from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax
import pytest
from runs import run_config, write_model, write_texts

from llamapro_jax import profiling
from llamapro_jax.config import ProfileConfig, changed
from llamapro_jax.errors import UserError
from llamapro_jax.profiling import STEP_NAME, Profile
from llamapro_jax.training.loop import train
from llamapro_jax.typed_yaml import validate


def traced_steps(run: Path) -> list[int]:
    """The numbers of the steps in the traces of a run."""
    numbers = []
    for file in run.glob("profile/plugins/profile/*/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name == STEP_NAME:
                        numbers.append(dict(event.stats)["step_num"])
    return sorted(numbers)


@pytest.mark.slow
def test_a_run_traces_the_steps_that_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path)
    write_texts(tmp_path / "texts")

    def run(name: str, **changes: object) -> Path:
        shape = {"training__steps": 4, "training__eval_every": None, "data__eval": []}
        return train(
            run_config(tmp_path / "model", tmp_path / "texts", tmp_path / name, **shape, **changes)
        )

    traced = run("with a trace", profile__steps=2, profile__first_step=2)
    assert traced_steps(traced) == [2, 3]
    printed = capsys.readouterr().out
    command = re.search(r"^ +(xprof .*)$", printed, re.MULTILINE)
    assert command is not None, printed
    assert shlex.split(command[1]) == ["xprof", "--port", "8791", str(traced / "profile")]
    assert "traced step 2 to step 3" in printed

    assert not (run("without") / "profile").exists()


# ------------------------------------------------------------------- which steps


class Recorder:
    """What a Profile starts and stops, and the lines that it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda _: self.calls.append("start"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.calls.append("stop"))

    def take(self, config: ProfileConfig, done: int, last: int) -> list[str]:
        self.calls.clear()
        with Profile(config, Path("run"), done, lambda line: None) as profile:
            for step in range(done + 1, last + 1):
                assert profile.take(step, None, lambda x: x + 1, step) == step + 1
                self.calls.append(str(step))
        return self.calls


def test_the_steps_of_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    two = ProfileConfig(steps=2, first_step=3)
    assert recorder.take(two, 0, 5) == ["1", "2", "start", "3", "stop", "4", "5"]
    assert recorder.take(two, 2, 5) == ["start", "3", "stop", "4", "5"]
    # A run that goes on from a later step: not the first one it takes.
    assert recorder.take(two, 7, 10) == ["8", "start", "9", "stop", "10"]
    assert recorder.take(two, 0, 3) == ["1", "2", "start", "3", "stop"]
    assert recorder.take(ProfileConfig(), 0, 20) == [str(step) for step in range(1, 21)]


def test_a_run_that_ends_early_ends_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        with Profile(ProfileConfig(5, 1), Path("my run"), 0, lines.append) as profile:
            profile.take(1, None, int)
            raise KeyboardInterrupt
    assert recorder.calls == ["start", "stop"]
    assert lines[-1].endswith("xprof --port 8791 'my run/profile'")


def test_only_the_first_process_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "is_first", lambda: False)
    assert Recorder(monkeypatch).take(ProfileConfig(2, 1), 0, 3) == ["1", "2", "3"]


# ------------------------------------------------------------------- settings


def test_a_trace_that_would_never_begin_is_refused(tmp_path: Path) -> None:
    bad = run_config(tmp_path, tmp_path, tmp_path / "run", profile__first_step=9)
    assert bad.profile.steps == 0  # and so it is no matter
    with pytest.raises(UserError, match=r"profile\.first_step: 9 is later than training\.steps, 8"):
        run_config(tmp_path, tmp_path, tmp_path / "run", profile__first_step=9, profile__steps=1)
    with pytest.raises(UserError, match=r"steps: must not be negative"):
        validate(ProfileConfig(steps=-1))
    with pytest.raises(UserError, match=r"first_step: must be positive"):
        validate(ProfileConfig(first_step=0))


def test_a_resumed_run_may_trace_and_change_the_compiler(tmp_path: Path) -> None:
    before = run_config(tmp_path, tmp_path, tmp_path / "run")
    after = run_config(
        tmp_path, tmp_path, tmp_path / "run",
        profile__steps=3, profile__first_step=2, compilation_cache=None, xla__defaults=False,
        xla__flags={"xla_a": "1"},
    )  # fmt: skip
    assert changed(before, after) == []
    assert len(changed(before, after, ())) >= 5
