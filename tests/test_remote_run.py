"""Runs whose directory is in a bucket, through a server that speaks Google Cloud Storage's API."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from fake_gcs import FakeGcs, Request
from runs import assert_same_run, run_config, write_model, write_texts

from llamapro_jax.errors import UserError
from llamapro_jax.local_copies import root
from llamapro_jax.metrics import MetricsWriter
from llamapro_jax.remote import Unreachable
from llamapro_jax.training import run_files
from llamapro_jax.training.loop import train
from llamapro_jax.training.stopping import Stopped

pytest.importorskip("gcsfs")
RUN = "gs://bucket/runs/a"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An expanded model, texts, and a compilation cache that the runs of this file share."""
    directory = tmp_path_factory.mktemp("remote")
    cache = {
        "jax_compilation_cache_dir": str(directory / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in cache.items():
        jax.config.update(name, value)
    write_model(directory)
    write_texts(directory / "texts")
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    return train(config_of(work, str(work / "undisturbed")))


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[FakeGcs]:
    """With the model and the texts, found by gcsfs and TensorStore, which look once a process."""
    with FakeGcs("bucket") as fake, pytest.MonkeyPatch.context() as patch:
        for name, value in fake.environment().items():
            patch.setenv(name, value)
        fake.upload(work / "model", "models/pro")
        fake.upload(work / "texts", "texts")
        yield fake


@pytest.fixture
def bucket(server: FakeGcs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGcs:
    """Without runs, on a host that has no copies of anything."""
    server.answer = lambda request: None
    for name in server.names("runs/"):
        del server.buckets["bucket"][name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return server


def config_of(work: Path, output: Any, **changes: Any) -> Any:
    return run_config(work / "model", work / "texts", output, **changes)


def everything_remote(work: Path) -> dict[str, Any]:
    text = {"name": "words", "path": "gs://bucket/texts/train.txt"}
    held_out = [{"name": name, "path": f"gs://bucket/texts/{name}.txt"} for name in ("old", "held")]
    return {"model": "gs://bucket/models/pro", "data__sources": [text], "data__eval": held_out}


def brought(bucket: FakeGcs, tmp_path: Path) -> Path:
    """The run, as it lies in the bucket."""
    shutil.rmtree(tmp_path / "brought", ignore_errors=True)
    bucket.download("runs/a", tmp_path / "brought")
    return tmp_path / "brought"


def fresh_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_a_run_in_a_bucket_goes_on_elsewhere_with_the_same_bits(
    work: Path,
    undisturbed: Path,
    bucket: FakeGcs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = config_of(work, RUN, **everything_remote(work))
    stop_at(monkeypatch, 6)
    with pytest.raises(Stopped, match="gs://bucket/runs/a: stopped, saved at step 6"):
        train(config)
    assert not list(root().glob(".scratch-*"))
    fresh_host(monkeypatch, tmp_path)
    assert str(train(config)) == RUN
    run = brought(bucket, tmp_path)
    assert_same_run(run, undisturbed, 8)
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    # Two are kept, and nothing is left of the others.
    assert {name.split("/")[3] for name in bucket.names("runs/a/checkpoints/")} == {"6", "8"}
