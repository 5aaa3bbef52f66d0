"""Steps in stores that Orbax does not write to, and runs in S3, through a server that speaks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_gcs import Request
from fake_s3 import FakeS3, shared
from fsspec.implementations.memory import MemoryFileSystem
from runs import assert_same_run, run_config, write_model, write_texts

from llamapro_jax import cli, remote
from llamapro_jax.checkpoint import Checkpoints, Report
from llamapro_jax.checkpoint_files import (
    COMMIT_FILE,
    committed_steps,
    missing_file,
    steps_set_aside,
)
from llamapro_jax.checkpoint_restore import abstract, restore_newest
from llamapro_jax.config import save_config
from llamapro_jax.errors import UserError
from llamapro_jax.local_copies import root, scratch
from llamapro_jax.remote import RemotePath, Unreachable, as_path, check_writable
from llamapro_jax.training.lease import LEASE_FILE

STEPS = "elsewhere://bucket/runs/a/checkpoints"
RUN = "s3://bucket/runs/a"


class Elsewhere(MemoryFileSystem):
    """An object store of which fsspec alone knows anything."""

    protocol = "elsewhere"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refused = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("elsewhere://", "memory://"))

    def put_file(self, lpath: str, rpath: str, **settings: Any) -> None:
        if self.refused and self.refused in rpath:
            raise PermissionError(rpath)
        super().put_file(lpath, rpath, **settings)


fsspec.register_implementation("elsewhere", Elsewhere)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this host keeps what goes to a store."""
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root()


@pytest.fixture
def steps(here: Path) -> Iterator[RemotePath]:
    """The empty directory of the steps of a run."""
    yield as_path(STEPS)
    Elsewhere.store.clear()


@pytest.fixture
def bucket(here: Path) -> Iterator[FakeS3]:
    pytest.importorskip("s3fs")
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


def assert_newest(steps: RemotePath, step: int, aside: Report = lambda step, reason: None) -> None:
    found = restore_newest(steps, *abstract(arrays(0)), aside)
    assert found is not None and found.step == step
    both = jax.tree.map(np.array_equal, (found.trainable, found.optimizer), arrays(step))
    assert all(jax.tree.leaves(both))


def keeps_what_it_should(steps: RemotePath, here: Path) -> None:
    with Checkpoints(steps, 2) as checkpoints:
        assert [save(checkpoints, step) for step in (2, 4, 6)] == [True] * 3
        assert not list(here.glob(".scratch-*/files/*"))
    assert sorted(path.name for path in steps.iterdir()) == ["4", "6"]
    assert committed_steps(steps) == [4, 6]
    assert missing_file(steps / "6") is None
    assert_newest(steps, 6)
    assert not list(here.glob(".scratch-*"))


def test_steps_are_kept_and_come_back_and_nothing_stays_on_the_host(
    steps: RemotePath, here: Path
) -> None:
    keeps_what_it_should(steps, here)


def test_the_commit_file_is_written_last_and_asked_for(
    steps: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    pipe, asked = Elsewhere.pipe_file, []
    monkeypatch.setattr(
        Elsewhere,
        "pipe_file",
        lambda *given, **named: put.append(given[1]) or pipe(*given, **named),
    )
    with Checkpoints(steps, 2, permitted=lambda: asked.append(len(steps.files()))) as checkpoints:
        assert save(checkpoints, 2)
    assert put == [f"{steps}/2/{COMMIT_FILE}"]
    assert len(steps.files()) - 1 in asked


def test_of_a_step_only_what_is_read_comes_here(
    steps: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(steps, 2) as checkpoints:
        save(checkpoints, 4)
    get, got = RemotePath.get, []
    monkeypatch.setattr(RemotePath, "get", lambda *both: got.append(str(both[0])) or get(*both))
    assert_newest(steps, 4)
    stacks = [f"{steps}/4/{leaf}" for leaf in ("trainable/new.0.q", "optimizer/mu.new.0.q")]
    wanted = [f"{leaf}/{name}" for leaf in stacks for name in (".zarray", "0.0.0.0", "1.0.0.0")]
    count = f"{steps}/4/optimizer/count"
    assert sorted(got) == sorted([*wanted, f"{count}/.zarray", f"{count}/0"])


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
def test_a_damaged_step_is_refused(steps: RemotePath, damaged: str, reason: str, how: str) -> None:
    with Checkpoints(steps, 2) as checkpoints:
        for step in (2, 4):
            save(checkpoints, step)
    file = steps / "4" / damaged
    data = bytearray(file.read_bytes())
    file.unlink()
    if how == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    told: list[tuple[int, str]] = []
    assert_newest(steps, 2, lambda *what: told.append(what))
    assert [step for step, _ in told] == [4] and told[0][1].startswith(reason)
    assert steps_set_aside(steps) == ["4.damaged"]


def test_an_upload_that_fails_is_a_failed_save(
    steps: RemotePath, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, str]] = []
    with Checkpoints(steps, 2, lambda *what: told.append(what)) as checkpoints:
        assert save(checkpoints, 2)
        monkeypatch.setattr(Elsewhere, "refused", "/4/optimizer/mu")
        assert not save(checkpoints, 4)
        assert told[0][0] == 4 and "the store refuses this" in told[0][1]
        monkeypatch.setattr(Elsewhere, "refused", "")
        assert not list(here.glob(".scratch-*/files/*"))
        assert save(checkpoints, 6)
    assert_newest(steps, 6)
    assert sorted(path.name for path in steps.iterdir()) == ["2", "6"]


def test_what_a_killed_upload_left_is_removed(steps: RemotePath, here: Path) -> None:
    (steps / "4/trainable/new.0.q/0.0.0.0").write_text("half")
    left = here / ".scratch-left" / "files" / "4"
    left.mkdir(parents=True)
    with scratch() as living, Checkpoints(steps, 2) as checkpoints:
        assert not left.exists() and living.exists()
        assert not steps.files()
        assert save(checkpoints, 4)
    assert_newest(steps, 4)


def test_another_run_takes_over_while_it_uploads(steps: RemotePath) -> None:
    def permitted() -> None:
        if (steps / "2").files():
            raise UserError("it is another's by now")

    with (
        pytest.raises(UserError, match="another's"),
        Checkpoints(steps, 2, permitted=permitted) as checkpoints,
    ):
        save(checkpoints, 2)
    assert committed_steps(steps) == []


# ------------------------------------------------------------------- S3


def test_steps_are_kept_in_s3(bucket: FakeS3, here: Path) -> None:
    keeps_what_it_should(as_path(f"{RUN}/checkpoints"), here)


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
    assert committed_steps(f"{RUN}/checkpoints") == [4] and not bucket.names("runs/a/summary.json")
    del bucket.objects[f"runs/a/{LEASE_FILE}"]  # or its end would be waited for
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other host"))
    assert started(tmp_path, RUN, 1).wait(300) == 0
    for name in bucket.names("runs/a/"):
        file = tmp_path / "brought" / name.removeprefix("runs/a/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bucket.objects[name])
    assert_same_run(tmp_path / "brought", tmp_path / "local", 8)
    assert committed_steps(f"{RUN}/checkpoints") == [4, 8]
    assert cli.main(["verify", RUN]) == 0


def started(work: Path, output: Any, number: int) -> subprocess.Popen[bytes]:
    """`llamapro train` on two devices in so many processes."""
    config = run_config(work / "model", work / "texts", output, mesh__fsdp=2)
    file = work / f"{number}-{Path(str(output)).name}.yaml"
    save_config(config, file)
    sizes = ["--processes", str(number), "--devices", str(2 // number)]
    command = [sys.executable, "-m", "llamapro_jax.launch.local", *sizes, "--", "train", str(file)]
    return subprocess.Popen(command, cwd=Path(cli.__file__).parents[1])
