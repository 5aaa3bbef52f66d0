"""One writer: the lease of a run directory, by itself and between real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_run, digests, run_config, write_model, write_texts

from llamapro_jax import exit_codes
from llamapro_jax.checkpoint_files import committed_steps
from llamapro_jax.config import save_config
from llamapro_jax.errors import UserError
from llamapro_jax.training import lease as leases
from llamapro_jax.training.events import read_events
from llamapro_jax.training.lease import LEASE_FILE, REQUEST_FILE, Lease, Owner, TakenOver
from llamapro_jax.training.loop import train

ROOT = Path(leases.__file__).parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds in the place of minutes."""
    for name, value in {"RENEW": 0.2, "EXPIRY": 2.0, "SETTLE": 0.3, "GRACE": 20.0}.items():
        monkeypatch.setattr(leases, name, value)
    monkeypatch.setattr(leases, "_POLL", 0.05)


def elsewhere(age: float, **changes: Any) -> Owner:
    """The lease of a process on another host, renewed so many seconds ago."""
    then = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    return replace(Owner("other", "far-away", 7, 2, then, then), **changes)


def write(directory: Path, owner: Owner, file: str = LEASE_FILE) -> None:
    leases._write(directory / file, owner)


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / LEASE_FILE).read_text())


class Living:
    """While entered, a process on another host renews its lease; it stops when asked to."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.asked = directory, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew)
        write(directory, elsewhere(0))

    def _renew(self) -> None:
        while not self._over.wait(0.2):
            if (self.directory / REQUEST_FILE).exists():
                self.asked = True
                (self.directory / LEASE_FILE).unlink()
                return
            write(self.directory, elsewhere(0))

    def __enter__(self) -> Living:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


# ------------------------------------------------------------------- by itself


def test_a_lease_is_renewed_and_given_back(tmp_path: Path, quick: None) -> None:
    with Lease() as lease:
        assert lease.take(tmp_path) is None
        first = read(tmp_path)
        assert first["pid"] == os.getpid() and first["processes"] == 1
        time.sleep(1)
        second = read(tmp_path)
        assert second["owner"] == first["owner"] and second["started"] == first["started"]
        assert second["renewed"] > first["renewed"]
        lease.confirm()
        lease.check()
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    with Lease() as lease:
        assert lease.take(tmp_path) is None


def test_what_nobody_renews_is_taken_and_what_lives_is_not(tmp_path: Path, quick: None) -> None:
    write(tmp_path, elsewhere(100))
    with Lease() as lease:
        assert lease.take(tmp_path) == "process 7 on far-away, one of 2"
    # One that may still live is watched until it must have been renewed.
    write(tmp_path, elsewhere(0.5))
    began = time.monotonic()
    with Lease() as lease:
        lease.take(tmp_path)
    assert 1.2 < time.monotonic() - began < 10
    with Living(tmp_path), Lease() as lease:
        message = r"trains here \(process 7 on far-away, one of 2, since 20.*renewed 0 s ago\)"
        with pytest.raises(UserError, match=message) as refused:
            lease.take(tmp_path)
    assert refused.value.status == exit_codes.REFUSED and "--takeover" in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"owner": 3}', "null", "\x00" * 9])
def test_a_damaged_lease_is_one_that_nobody_renews(
    tmp_path: Path, quick: None, content: str
) -> None:
    (tmp_path / LEASE_FILE).write_text(content)
    began = time.monotonic()
    with Lease() as lease:
        assert lease.take(tmp_path) == "somebody whose lease is damaged"
    assert time.monotonic() - began > 1.5


def test_a_clock_that_is_ahead_does_not_make_a_lease_everlasting(
    tmp_path: Path, quick: None
) -> None:
    write(tmp_path, elsewhere(-10_000))
    with Lease() as lease:
        lease.take(tmp_path)


def test_who_is_asked_stops_and_who_asked_goes_on(tmp_path: Path, quick: None) -> None:
    with Living(tmp_path) as living, Lease(takeover=True) as lease:
        assert lease.take(tmp_path) == "process 7 on far-away, one of 2"
        assert living.asked
        assert not (tmp_path / REQUEST_FILE).exists()
        lease.confirm()


def test_an_owner_that_does_not_answer_loses_it(tmp_path: Path, quick: None) -> None:
    """It renews, as a thread of a run that hangs might, and never looks at the request."""
    with Lease(takeover=True) as lease:
        over = threading.Event()

        def renew() -> None:
            while not over.wait(0.2):
                write(tmp_path, elsewhere(0))

        write(tmp_path, elsewhere(0))
        thread = threading.Thread(target=renew)
        thread.start()
        began = time.monotonic()
        try:
            found = leases._Waiting(lease, tmp_path).free()
        finally:
            over.set()
            thread.join()
        assert found is not None and time.monotonic() - began > 2


def test_a_start_that_gives_up_asks_no_more(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        assert (tmp_path / REQUEST_FILE).exists()
        raise KeyboardInterrupt

    write(tmp_path, elsewhere(0))
    monkeypatch.setattr(leases.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt), Lease(takeover=True) as lease:
        lease.take(tmp_path)
    assert not (tmp_path / REQUEST_FILE).exists()


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (lambda d: write(d, elsewhere(0)), "process 7 on far-away, one of 2 took the run over"),
        (lambda d: write(d, elsewhere(0), REQUEST_FILE), "one of 2 takes the run over"),
        (lambda d: (d / LEASE_FILE).unlink(), "its lease, lease.json, is gone"),
    ],
    ids=["taken", "asked", "gone"],
)
def test_what_is_lost_is_seen_at_the_next_look(
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    lose: Callable[[Path], None],
    why: str,
) -> None:
    monkeypatch.setattr(leases, "RENEW", 1000.0)
    with Lease() as lease:
        lease.take(tmp_path)
        lose(tmp_path)
        lease.check()  # reads nothing
        before = digests(tmp_path)
        with pytest.raises(TakenOver, match=why) as lost:
            lease.confirm()
        with pytest.raises(TakenOver, match="writes nothing more into it"):
            lease.check()
        assert lost.value.status == exit_codes.TAKEN_OVER == 45
        assert digests(tmp_path) == before
    # The answer to a request is that the lease is gone; another's stays.
    assert (tmp_path / LEASE_FILE).exists() == ("took" in why)


def test_a_damaged_lease_is_written_anew_by_its_owner(tmp_path: Path, quick: None) -> None:
    with Lease() as lease:
        lease.take(tmp_path)
        (tmp_path / LEASE_FILE).write_text("?")
        lease.confirm()
        deadline = time.monotonic() + 10
        while (tmp_path / LEASE_FILE).read_text() == "?" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert read(tmp_path)["pid"] == os.getpid()
        lease.confirm()
        lease.check()


def test_a_damaged_lease_is_lost_when_others_had_the_time_to_take_it(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW", 1000.0)
    with Lease() as lease:
        lease.take(tmp_path)
        (tmp_path / LEASE_FILE).write_text("?")
        lease._sure -= 100
        with pytest.raises(TakenOver, match=r"its lease, lease.json, is damaged"):
            lease.confirm()


def no_locks(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


def test_a_request_that_a_killed_start_left_ends_nobody(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    write(tmp_path, elsewhere(100))
    write(tmp_path, elsewhere(50, owner="killed"), REQUEST_FILE)
    with Lease() as lease:
        lease.take(tmp_path)
        lease.confirm()
        assert not (tmp_path / REQUEST_FILE).exists()


def test_a_renewal_that_hung_ends_its_own_run_and_not_the_successor(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr(Lease, "_end", lambda self, message: None)
    first, second = Lease(), Lease()
    hangs, goes_on, real = threading.Event(), threading.Event(), leases._write

    def write_late(file: Path, owner: Owner) -> None:
        if owner.owner == first._me.owner and first._thread.ident and not goes_on.is_set():
            hangs.set()
            goes_on.wait(60)
        real(file, owner)

    with first, second:
        first.take(tmp_path)
        monkeypatch.setattr(leases, "_write", write_late)
        assert hangs.wait(10)
        assert second.take(tmp_path) is not None
        goes_on.set()
        with pytest.raises(TakenOver, match="took the run over"):
            for _ in range(20):
                first.confirm()
                time.sleep(0.1)
        first.__exit__()
        for _ in range(5):
            second.confirm()
            time.sleep(0.2)
        assert read(tmp_path)["owner"] == second._me.owner


def test_after_a_suspension_nothing_goes_on_unasked(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW", 1000.0)
    with Lease() as lease:
        lease.take(tmp_path)
        write(tmp_path, elsewhere(0))
        lease.check()
        time.sleep(1.2)
        with pytest.raises(TakenOver):
            lease.check()


def test_a_directory_that_cannot_be_read_for_a_moment_is_still_ours(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW", 1000.0)

    def broken(file: Path) -> str:
        raise OSError(5, "Input/output error")

    with Lease() as lease:
        lease.take(tmp_path)
        monkeypatch.setattr(leases, "_text", broken)
        lease.confirm()
        lease._sure -= 100
        # Training goes on; nothing is written.
        lease.check()
        began = time.monotonic()
        lease.check()
        assert time.monotonic() - began < 0.2
        with pytest.raises(OSError, match="Input/output"):
            lease.confirm()
        monkeypatch.undo()
        write(tmp_path, elsewhere(0))
        lease._failed = 0.0
        with pytest.raises(TakenOver):
            lease.check()


def test_without_locks_of_two_starts_one_stands(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr(leases, "EXPIRY", 5.0)
    found: list[str] = []

    def start() -> None:
        with Lease() as lease:
            try:
                lease.take(tmp_path)
                time.sleep(1)
                lease.confirm()
                found.append("stands")
            except UserError as error:
                found.append(type(error).__name__)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.count("stands") == 1 and len(found) == 2


# ------------------------------------------------------------------- between processes


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("lease")
    write_model(directory)
    write_texts(directory / "texts")
    yield directory


def config_of(work: Path, output: Path, **changes: Any) -> Any:
    quick = {"training__eval_every": None, "data__eval": [], "training__log_every": 1}
    return run_config(work / "model", work / "texts", output, **{**quick, **changes})


# A run whose lease is renewed often. After one of its steps it waits until a file is there.
RUN = """
import pathlib, sys, time
from llamapro_jax import cli
from llamapro_jax.metrics import MetricsWriter
from llamapro_jax.training import lease
lease.RENEW, lease.EXPIRY, lease.SETTLE, lease.GRACE = 0.3, {expiry}, 0.5, 20.0
write = MetricsWriter.write
def waiting(self, kind, step, **values):
    record = write(self, kind, step, **values)
    print("step", step, flush=True)
    while step == {at} and not pathlib.Path({file!r}).exists():
        time.sleep(0.1)
    return record
MetricsWriter.write = waiting
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def start(
    config: Path, *more: str, wait: tuple[int, Path] = (0, Path()), expiry: float = 100
) -> Any:
    at, file = wait
    script = RUN.format(at=at, file=str(file), expiry=expiry)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(config), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reach(process: Any, line: str) -> None:
    assert any(found == f"{line}\n" for found in process.stdout), process.stderr.read()


@pytest.mark.slow
def test_a_second_run_takes_over_and_the_first_one_saves_nothing_more(
    work: Path, tmp_path: Path
) -> None:
    whole = train(config_of(work, tmp_path / "whole", training__save_every=3))
    write_model(tmp_path / "second", seed=5).rename(tmp_path / "other")
    run = tmp_path / "run"
    save_config(config_of(work, run, training__save_every=3), tmp_path / "config.yaml")
    first = start(tmp_path / "config.yaml", wait=(4, run / REQUEST_FILE))
    try:
        reach(first, "step 4")
        refused = start(tmp_path / "config.yaml")
        _, errors = refused.communicate(timeout=400)
        assert refused.returncode == exit_codes.REFUSED, errors
        assert f"another process trains here (process {first.pid} on " in errors
        # Another model is refused before anybody is asked to stop.
        other = start(tmp_path / "config.yaml", f"model={tmp_path / 'other'}", "--takeover")
        _, errors = other.communicate(timeout=400)
        assert other.returncode == exit_codes.REFUSED and "on another base" in errors, errors
        assert first.poll() is None and not (run / REQUEST_FILE).exists()
        second = start(tmp_path / "config.yaml", "--takeover")
        _, errors = first.communicate(timeout=400)
        assert first.returncode == exit_codes.TAKEN_OVER, errors
        assert f"process {second.pid} on " in errors and "Do not start it again" in errors
        out, errors = second.communicate(timeout=400)
        assert second.returncode == 0, errors
    finally:
        first.kill()
    assert f"takes over from process {first.pid} on" in out
    assert_same_run(run, whole, 8)
    [event] = read_events(run, "taken over")
    assert str(first.pid) in event["former"]
    assert not {LEASE_FILE, REQUEST_FILE} & {file.name for file in run.iterdir()}


@pytest.mark.slow
def test_a_run_that_was_suspended_and_lost_its_directory_writes_nothing(
    work: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Nothing is being saved when it is suspended: what another process has begun to write to the
    # disk, no lease can stop.
    save_config(config_of(work, run, training__save_every=4), tmp_path / "config.yaml")
    first = start(tmp_path / "config.yaml", wait=(3, tmp_path / "go"), expiry=3)
    try:
        reach(first, "step 3")
        first.send_signal(signal.SIGSTOP)
        second = start(tmp_path / "config.yaml", "--takeover", expiry=3)
        reach(second, "step 8")
        out, errors = second.communicate(timeout=400)
        assert second.returncode == 0, errors
        before = digests(run)
        (tmp_path / "go").touch()
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=400)
    finally:
        first.kill()
    assert first.returncode == exit_codes.TAKEN_OVER, errors
    assert "is gone, so that others may have it" in errors
    assert digests(run) == before
    assert committed_steps(run / "checkpoints") == [4, 8]


def test_a_killed_run_leaves_a_lease_that_holds_nobody_up(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_config(config_of(work, run), tmp_path / "config.yaml")
    first = start(tmp_path / "config.yaml", wait=(2, tmp_path / "never"))
    reach(first, "step 2")
    first.kill()
    first.communicate()
    found = Owner.parse((run / LEASE_FILE).read_text())
    assert found is not None and found.pid == first.pid and asdict(found)["lock"]
    began = time.monotonic()
    with Lease() as lease:
        assert lease.take(run) == str(found)
    assert time.monotonic() - began < 5
