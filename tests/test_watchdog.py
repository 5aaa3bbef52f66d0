"""The watchdog, in processes that hang, and signals where Python alone would not hear them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_run, run_config, write_model, write_texts

from llamapro_jax import exit_codes
from llamapro_jax.checkpoint import Checkpoints, committed_steps
from llamapro_jax.config import save_config
from llamapro_jax.launch import local
from llamapro_jax.launch.surroundings import free_port
from llamapro_jax.training import beginning
from llamapro_jax.training.loop import train
from llamapro_jax.training.stopping import Stopped
from llamapro_jax.training.watchdog import SLOW, Watchdog

ROOT = Path(local.__file__).parents[2]


def start(script: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ------------------------------------------------------------------- on its own

HANGING = """
import signal, sys, threading, time
from llamapro_jax.training.watchdog import Watchdog
from pathlib import Path
with Watchdog(float(sys.argv[2]), Path(sys.argv[1])) as watchdog:
    watchdog.progress("waiting for a disk", slow=sys.argv[3] == "slow")
    print("hangs", flush=True)
    def the_call_that_hangs():
        # As a device call that does not answer: no signal of Python's gets through.
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        threading.Event().wait()
    the_call_that_hangs()
"""


def test_a_process_that_hangs_shows_its_stacks_and_ends(tmp_path: Path) -> None:
    process = start(HANGING, tmp_path, 0.5, "fast")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_codes.STALLED == 43, errors
    assert "while waiting for a disk (training.watchdog: 0.5 s)" in errors
    written = (tmp_path / "watchdog/process-0.txt").read_text()
    for shown in (errors, written):
        assert "the_call_that_hangs" in shown and ": watchdog" in shown


def test_a_process_that_was_suspended_is_not_ended_for_it(tmp_path: Path) -> None:
    process = start(HANGING, tmp_path, 6, "fast")
    assert process.stdout is not None and process.stdout.readline() == "hangs\n"
    began = time.monotonic()
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == exit_codes.STALLED
    # It was given its time once more, but for the naps before and after.
    assert time.monotonic() - began > 8 + 6 - 3


def test_what_may_take_longer_does(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(HANGING, tmp_path, 0.5, "slow")
    process.communicate(timeout=60)
    assert process.returncode == exit_codes.STALLED
    assert time.monotonic() - began > 0.5 * SLOW


def test_progress_keeps_it_quiet_and_none_turns_it_off(tmp_path: Path) -> None:
    with Watchdog(0.4, tmp_path) as watchdog:
        for number in range(10):
            watchdog.progress(f"taking step {number}")
            time.sleep(0.1)
    with Watchdog(None, tmp_path) as watchdog:
        watchdog.progress("nothing")
    # This process would be gone.
    assert not (tmp_path / "watchdog").exists()


def test_a_disk_that_hangs_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog/process-0.txt").symlink_to(tmp_path / "fifo")
    impatient = "from llamapro_jax.training import watchdog as w\nw._GRACE = 3\nwith"
    script = HANGING.replace("with", impatient, 1)
    process = start(script, tmp_path, 0.5, "fast")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_codes.STALLED
    assert "the_call_that_hangs" in errors


# ------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("watchdog")
    write_model(directory)
    write_texts(directory / "texts")
    return directory


def config_of(work: Path, output: Path, **changes: Any) -> Any:
    quick = {"training__eval_every": None, "data__eval": [], "training__log_every": 1}
    return run_config(work / "model", work / "texts", output, **quick, **changes)


RUN = """
import os, sys, threading
from llamapro_jax import cli
from llamapro_jax.data.mixture import Mixture
rows = Mixture.rows
def a_loader_that_stalls(self, step, start, stop):
    if step == 5 and "{process}" in ("all", os.environ.get("JAX_PROCESS_ID")):
        threading.Event().wait()
    return rows(self, step, start, stop)
Mixture.rows = a_loader_that_stalls
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_stalled_loader_ends_the_run_which_goes_on_to_the_same_bits(
    work: Path, tmp_path: Path
) -> None:
    whole = train(config_of(work, tmp_path / "whole"))
    config = config_of(work, tmp_path / "run", training__watchdog=5.0)
    save_config(config, tmp_path / "config.yaml")
    process = start(RUN.format(process="all"), tmp_path / "config.yaml")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == exit_codes.STALLED, errors
    assert "while taking step 6" in errors and "a_loader_that_stalls" in errors
    assert "loop.py" in (tmp_path / "run/watchdog/process-0.txt").read_text()
    assert committed_steps(tmp_path / "run/checkpoints") == [4]
    train(config)
    assert_same_run(tmp_path / "run", whole, 8)


@pytest.mark.slow
def test_one_process_that_stalls_ends_both(work: Path, tmp_path: Path) -> None:
    config = config_of(work, tmp_path / "run", training__watchdog=8.0, data__batch_size=8)
    file, port = tmp_path / "config.yaml", free_port()
    save_config(config, file)
    processes = [
        start(RUN.format(process="1"), file, **local.environment(index, 2, 2, port))
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [43, 43], errors
    assert "a_loader_that_stalls" in errors[1]
    assert "loop.py" in errors[0]


# ------------------------------------------------------------------- signals

COMPILING = """
import sys, time
import jax
from llamapro_jax import cli
def slow(self):
    print("compiles", flush=True)
    time.sleep(120)
jax.stages.Lowered.compile = slow
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_while_it_compiles(
    work: Path, tmp_path: Path, number: int, status: int
) -> None:
    save_config(config_of(work, tmp_path / "run"), tmp_path / "config.yaml")
    process = start(COMPILING, tmp_path / "config.yaml")
    assert process.stdout is not None
    assert any(line == "compiles\n" for line in process.stdout)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == status, errors
    assert "stopped, before the first step of 8. Run the same command again to go on." in errors
    assert time.monotonic() - began < 60


def test_a_signal_while_a_step_is_saved_ends_when_it_is(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def interrupted(self: Any, step: int, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(Stopped, match="saved at step 4 of 8") as stopped:
        train(config_of(work, tmp_path / "run"))
    assert stopped.value.status == 42
    assert committed_steps(tmp_path / "run/checkpoints") == [4]


def test_a_signal_while_the_model_is_loaded_stops_at_once(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = beginning.load_params, []

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(beginning, "load_params", interrupted)
    with pytest.raises(Stopped, match="before the first step"):
        train(config_of(work, tmp_path / "run"))
    assert not loaded
