"""Runs whose directory is in a bucket, through a server that speaks Google Cloud Storage's API."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # noqa: F401
import jax
import pytest
from fake_gcs import FakeGcs, shared
from runs import assert_same_run, run_config, shared_programs, write_model, write_texts

from llamapro_jax import cli, remote
from llamapro_jax.checkpoint_files import committed_steps, steps_set_aside, verify_step
from llamapro_jax.config import RunConfig, save_config
from llamapro_jax.errors import UserError
from llamapro_jax.local_copies import root
from llamapro_jax.metrics import MetricsWriter
from llamapro_jax.model.weights import tensors
from llamapro_jax.remote import Unreachable
from llamapro_jax.sources import open_source
from llamapro_jax.training import setup
from llamapro_jax.training.events import SET_ASIDE, read_events
from llamapro_jax.training.loop import train
from llamapro_jax.training.run_directory import open_run
from llamapro_jax.training.stopping import Stopped

pytest.importorskip("gcsfs")
RUN = "gs://bucket/runs/a"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An expanded model, texts, and a compilation cache that all runs share."""
    directory = tmp_path_factory.mktemp("remote")
    with shared_programs():
        write_model(directory)
        write_texts(directory / "texts")
        yield directory


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    return train(config_of(work, str(work / "undisturbed")))


@pytest.fixture
def bucket(work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGcs]:
    """With the model and the texts, without runs, on a host that has no copies of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # But of programs, for the processes that a test starts: to compile them is no matter of these.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    server = shared()
    server.clear()
    server.upload(work / "model", "models/pro")
    server.upload(work / "texts", "texts")
    yield server
    server.clear()


def config_of(work: Path, output: Any, **changes: Any) -> Any:
    model = changes.pop("model", work / "model")
    return run_config(model, work / "texts", output, **changes)


def everything_remote(work: Path) -> dict[str, Any]:
    text = {"name": "words", "path": "gs://bucket/texts/train.txt"}
    held_out = [{"name": name, "path": f"gs://bucket/texts/{name}.txt"} for name in ("old", "held")]
    return {"model": "gs://bucket/models/pro", "data__sources": [text], "data__eval": held_out}


def brought(bucket: FakeGcs, tmp_path: Path) -> Path:
    """The run, as it lies in the bucket."""
    shutil.rmtree(tmp_path / "brought", ignore_errors=True)
    bucket.download("runs/a", tmp_path / "brought")
    return tmp_path / "brought"


def new_host(tmp_path: Path) -> None:
    """Nothing of what was done before is on its disks."""
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends SIGTERM when the log gets the line of a step, once."""
    write, sent = MetricsWriter.write, []

    def patched(self: Any, kind: str, at: int, **values: Any) -> Any:
        record = write(self, kind, at, **values)
        if (kind, at) == ("train", step) and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(MetricsWriter, "write", patched)


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_elsewhere_with_the_same_bits(
    work: Path,
    undisturbed: Path,
    bucket: FakeGcs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(work, RUN, **everything_remote(work))
    stop_at(monkeypatch, 6)
    with pytest.raises(Stopped, match="gs://bucket/runs/a: stopped, saved at step 6"):
        train(config)
    assert not list(root().glob(".scratch-*"))
    new_host(tmp_path)
    assert str(train(config)) == RUN
    run = brought(bucket, tmp_path)
    assert_same_run(run, undisturbed, 8)
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    # Two are kept, and nothing is left of the others.
    assert {name.split("/")[3] for name in bucket.names("runs/a/checkpoints/")} == {"6", "8"}
    new_host(tmp_path)
    assert "is finished" in trained_again(config, capsys)
    reads_the_model_of_the_run(undisturbed)
    verifies(bucket, capsys)


def trained_again(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    train(config)
    return capsys.readouterr().out


def reads_the_model_of_the_run(undisturbed: Path) -> None:
    found, expected = open_source(RUN, masters=True), open_run(undisturbed, masters=True)
    for tensor in tensors(expected.config):
        assert found.read(tensor).tobytes() == expected.read(tensor).tobytes()
    assert not list(root().glob("gs/bucket/runs/a/checkpoints"))


def verifies(bucket: FakeGcs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", RUN]) == 0
    name = damage(bucket, "runs/a/checkpoints/8/trainable/")
    assert cli.main(["verify", RUN]) == 1
    assert f"trainable {name.split('/')[5]}" in capsys.readouterr().out


def damage(bucket: FakeGcs, prefix: str) -> str:
    """Flips a bit in the largest chunk of an array."""
    chunks = [name for name in bucket.names(prefix) if re.search(r"/[0-9.]+$", name)]
    name = max(chunks, key=lambda name: len(bucket.read(name)))
    data = bytearray(bucket.read(name))
    data[len(data) // 2] ^= 1
    bucket.write(name, bytes(data))
    return name


@pytest.mark.slow
def test_a_damaged_step_is_set_aside_while_the_store_is_flaky(
    work: Path,
    undisturbed: Path,
    bucket: FakeGcs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = config_of(work, RUN)
    stop_at(monkeypatch, 6)
    with pytest.raises(Stopped):
        train(config)
    damage(bucket, "runs/a/checkpoints/6/optimizer/")
    count = itertools.count(1)
    bucket.answer = lambda request: 503 if next(count) % 97 == 0 else None
    train(config)
    assert next(count) > 300
    bucket.answer = lambda request: None
    run = brought(bucket, tmp_path)
    assert_same_run(run, undisturbed, 8)
    assert steps_set_aside(run / "checkpoints") == ["6.damaged"]
    assert verify_step(run / "checkpoints" / "6.damaged") != []
    assert committed_steps(run / "checkpoints") == [4, 8]
    assert [event["step"] for event in read_events(run, SET_ASIDE)] == [6]


# ------------------------------------------------------------------- before anything expensive


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a model is opened."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(setup, "open_source", opened)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("status", [401, 403])
def test_missing_credentials_are_told_first(work: Path, bucket: FakeGcs, status: int) -> None:
    bucket.answer = lambda request: status
    with pytest.raises(Unreachable, match="gs://bucket/runs/a.*gcloud auth application-default"):
        train(config_of(work, RUN))


@pytest.mark.usefixtures("cheap")
def test_a_missing_bucket_is_told_first(work: Path, bucket: FakeGcs) -> None:
    with pytest.raises(Unreachable, match="there is no bucket nobucket"):
        train(config_of(work, "gs://nobucket/a"))


@pytest.mark.usefixtures("cheap", "bucket")
def test_a_missing_package_is_told_first(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    # Not `fsspec.registry`, which is the dictionary in the module of this name.
    for known in list(sys.modules["fsspec.registry"]._registry):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, known)
    save_config(config_of(work, RUN), tmp_path / "run.yaml")
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert "needs the package gcsfs; `pip install 'llamapro_jax[gcs]'`" in told


@pytest.mark.usefixtures("cheap")
def test_a_place_that_holds_something_else_is_refused(work: Path, bucket: FakeGcs) -> None:
    bucket.write("runs/a/thesis.pdf", b"years of work")
    with pytest.raises(UserError, match=r"gs://bucket/runs/a: is not empty \(thesis.pdf\)"):
        train(config_of(work, RUN))
    assert bucket.names("runs/") == ["runs/a/thesis.pdf"]


@pytest.mark.usefixtures("cheap")
def test_a_scheme_that_no_run_is_written_to_is_refused(work: Path) -> None:
    with pytest.raises(UserError, match="a run is written to .* not to memory://"):
        train(config_of(work, "memory://runs/a"))


# ------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_share_nothing_but_the_bucket(
    work: Path, bucket: FakeGcs, tmp_path: Path
) -> None:
    """Stopped by SIGTERM, and on with the other number of processes."""
    local = processes(work, tmp_path / "local", 2)
    assert local.wait(300) == 0
    first = processes(work, RUN, 2, tmp_path, **everything_remote(work))
    deadline = time.monotonic() + 240
    while "runs/a/checkpoints/4/commit_success.txt" not in bucket.names("runs/"):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) in (0, 42)  # it may just have been done
    new_host(tmp_path)
    assert processes(work, RUN, 1, tmp_path, **everything_remote(work)).wait(300) == 0
    assert_same_run(brought(bucket, tmp_path), tmp_path / "local", 8)


def processes(
    work: Path, output: Any, number: int, home: Path | None = None, **changes: Any
) -> subprocess.Popen[bytes]:
    """`llamapro train` on two devices in so many processes."""
    config = config_of(work, output, mesh__fsdp=2, **changes)
    file = work / f"{number}-{Path(str(output)).name}.yaml"
    save_config(config, file)
    sizes = ["--processes", str(number), "--devices", str(2 // number)]
    command = [sys.executable, "-m", "llamapro_jax.launch.local", *sizes, "--", "train", str(file)]
    return subprocess.Popen(command, cwd=Path(cli.__file__).parents[1])
