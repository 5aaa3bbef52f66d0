"""Runs and their steps in a store that Orbax does not write to, through a server that speaks S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_gcs import Request
from fake_s3 import FakeS3, shared
from runs import assert_same_run, run_config, write_model, write_texts

from llamapro_jax import cli, remote
from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_files import (
    COMMIT_FILE,
    committed_steps,
    missing_file,
    steps_set_aside,
)
from llamapro_jax.checkpoint_restore import Restored, abstract, restore_newest
from llamapro_jax.config import save_config
from llamapro_jax.errors import UserError
from llamapro_jax.local_copies import root, scratch
from llamapro_jax.remote import Unreachable, as_path, check_writable
from llamapro_jax.training.lease import LEASE_FILE

pytest.importorskip("s3fs")
RUN = "s3://bucket/runs/a"
STEPS = f"{RUN}/checkpoints"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeS3]:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shared().clear()
    yield shared()
    shared().clear()


def arrays(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of more than one chunk, the first of them."""
    rng = np.random.default_rng(step)
    tree = {"new": [{"q": jnp.asarray(rng.standard_normal((2, 1, 512, 768), np.float32))}]}
    return tree, {"count": jnp.int32(step), "mu": jax.tree.map(jnp.cos, tree)}


def save(checkpoints: Checkpoints, step: int) -> bool:
    checkpoints.save(step, *arrays(step), {"note": f"step {step}"})
    return checkpoints.wait()


def restored() -> Restored:
    found = restore_newest(STEPS, *abstract(arrays(0)))
    assert found is not None
    return found


def assert_is(found: Restored, step: int) -> None:
    assert found.step == step
    both = jax.tree.map(np.array_equal, (found.trainable, found.optimizer), arrays(step))
    assert all(jax.tree.leaves(both))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The objects of the steps 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        shared().clear()
        with Checkpoints(STEPS, 2) as checkpoints:
            assert save(checkpoints, 2) and save(checkpoints, 4)
    return dict(shared().objects)


def test_steps_are_kept_and_come_back_and_nothing_stays_on_the_host(bucket: FakeS3) -> None:
    with Checkpoints(STEPS, 2) as checkpoints:
        assert [save(checkpoints, step) for step in (2, 4, 6)] == [True] * 3
        assert not list(root().glob(".scratch-*/files/*"))
        latest = [r.path for r in bucket.requests if r.method == "PUT" and "/6/" in r.path]
        assert latest[-1] == f"runs/a/checkpoints/6/{COMMIT_FILE}"
    assert committed_steps(STEPS) == [4, 6]
    assert missing_file(as_path(STEPS) / "6") is None
    assert_is(restored(), 6)
    assert not list(root().glob(".scratch-*"))


def test_of_a_step_only_what_is_read_comes_here(
    two_steps: dict[str, bytes], bucket: FakeS3
) -> None:
    bucket.objects.update(two_steps)
    restored()
    step = "runs/a/checkpoints/4/"
    got = {r.path.removeprefix(step) for r in bucket.requests if r.method == "GET"}
    chunks = {
        f"{leaf}/{n}.0.0.0"
        for leaf in ("trainable/new.0.q", "optimizer/mu.new.0.q")
        for n in (0, 1)
    }
    wanted = {f"{name.rpartition('/')[0]}/.zarray" for name in chunks} | chunks
    assert {name for name in got if name.count("/") > 1} == wanted | {
        "optimizer/count/.zarray",
        "optimizer/count/0",
    }


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ("trainable/new.0.q/1.0.0.0", "trainable new.0.q: "),
        ("optimizer/count/0", "optimizer count: "),
        ("optimizer/mu.new.0.q/.zarray", "optimizer mu.new.0.q: "),
        ("meta/metadata", "meta/metadata: "),
    ],
)
@pytest.mark.parametrize("how", ["flipped", "lost"])
def test_a_damaged_step_is_refused(
    two_steps: dict[str, bytes], bucket: FakeS3, damaged: str, reason: str, how: str
) -> None:
    bucket.objects.update(two_steps)
    name = f"runs/a/checkpoints/4/{damaged}"
    data = bytearray(bucket.objects.pop(name))
    if how == "flipped":
        data[len(data) // 2] ^= 1
        bucket.objects[name] = bytes(data)
    told: list[tuple[int, str]] = []
    found = restore_newest(STEPS, *abstract(arrays(0)), lambda *what: told.append(what))
    assert found is not None
    assert_is(found, 2)
    assert [step for step, _ in told] == [4] and told[0][1].startswith(reason)
    assert steps_set_aside(as_path(STEPS)) == ["4.damaged"]


def test_an_upload_that_fails_is_a_failed_save(bucket: FakeS3) -> None:
    told: list[tuple[int, str]] = []
    with Checkpoints(STEPS, 2, lambda *what: told.append(what)) as checkpoints:
        assert save(checkpoints, 2)
        bucket.answer = lambda r: 403 if "/4/optimizer/mu" in f"{r.method}{r.path}" else None
        assert not save(checkpoints, 4)
        assert told[0][0] == 4 and "the store refuses this" in told[0][1]
        bucket.answer = lambda request: None
        assert not list(root().glob(".scratch-*/files/*"))
        assert save(checkpoints, 6)
    assert_is(restored(), 6)
    assert {name.split("/")[3] for name in bucket.names("runs/a/checkpoints/")} == {"2", "6"}


def test_what_a_killed_upload_left_is_removed(bucket: FakeS3, tmp_path: Path) -> None:
    bucket.objects["runs/a/checkpoints/4/trainable/new.0.q/0.0.0.0"] = b"half"
    left = root() / ".scratch-left" / "files" / "4"
    left.mkdir(parents=True)
    with scratch() as living, Checkpoints(STEPS, 2) as checkpoints:
        assert not left.exists() and living.exists()
        assert bucket.names("runs/a/checkpoints/") == []
        assert save(checkpoints, 4)
    assert_is(restored(), 4)


def test_another_run_takes_over_while_it_uploads(bucket: FakeS3) -> None:
    def permitted() -> None:
        if bucket.names("runs/a/checkpoints/2/"):
            raise UserError("it is another's by now")

    with (
        pytest.raises(UserError, match="another's"),
        Checkpoints(STEPS, 2, permitted=permitted) as checkpoints,
    ):
        save(checkpoints, 2)
    assert committed_steps(STEPS) == []


def test_who_may_not_write_is_told_how(bucket: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.answer = lambda request: 403
    with pytest.raises(Unreachable, match="s3://bucket/runs/a.*refuses this.*aws configure"):
        check_writable(as_path(RUN))
    bucket.answer = lambda request: None
    with pytest.raises(Unreachable, match="there is no bucket nobucket"):
        check_writable(as_path("s3://nobucket/runs/a"))
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(Unreachable, match="Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
        check_writable(as_path(RUN))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


# ------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    bucket: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While it uploads its second step; with the other number of processes, on another host."""
    write_model(tmp_path)
    write_texts(tmp_path / "texts")
    undisturbed = started(tmp_path, tmp_path / "local", 2)
    assert undisturbed.wait(300) == 0
    killed = []

    def kill(request: Request) -> int | None:
        if request.method != "PUT" or "checkpoints/8/optimizer/" not in request.path:
            return None
        if not killed:
            killed.append(json.loads(bucket.objects[f"runs/a/{LEASE_FILE}"])["pid"])
            os.kill(killed[0], signal.SIGKILL)
        return 403

    bucket.answer = kill
    assert started(tmp_path, RUN, 2).wait(300) != 0 and killed
    bucket.answer = lambda request: None
    assert committed_steps(STEPS) == [4] and not bucket.names("runs/a/summary.json")
    del bucket.objects[f"runs/a/{LEASE_FILE}"]  # or its end would be waited for
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other host"))
    assert started(tmp_path, RUN, 1).wait(300) == 0
    for name in bucket.names("runs/a/"):
        file = tmp_path / "brought" / name.removeprefix("runs/a/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bucket.objects[name])
    assert_same_run(tmp_path / "brought", tmp_path / "local", 8)
    assert committed_steps(STEPS) == [4, 8]
    assert cli.main(["verify", RUN]) == 0


def started(work: Path, output: Any, number: int) -> subprocess.Popen[bytes]:
    """`llamapro train` on two devices in so many processes."""
    config = run_config(work / "model", work / "texts", output, mesh__fsdp=2)
    file = work / f"{number}-{Path(str(output)).name}.yaml"
    save_config(config, file)
    sizes = ["--processes", str(number), "--devices", str(2 // number)]
    command = [sys.executable, "-m", "llamapro_jax.launch.local", *sizes, "--", "train", str(file)]
    return subprocess.Popen(command, cwd=Path(cli.__file__).parents[1])
