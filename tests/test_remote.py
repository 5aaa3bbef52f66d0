"""Paths in a store, local copies of them, and what goes wrong with both."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from checkpoints import write_tiny
from data_sources import ByteTokenizer
from fake_gcs import FakeGcs, Request, shared

from llamapro_jax import local_copies, remote
from llamapro_jax.checkpoint_files import COMMIT_FILE, committed_steps, remove_leftovers, set_aside
from llamapro_jax.config import SourceConfig
from llamapro_jax.convert import convert
from llamapro_jax.data.dataset import Rows, open_rows
from llamapro_jax.data.dataset import open_source as open_source_of_rows
from llamapro_jax.data.preparation.prepare import Preparation
from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_write, read_json, require_new_directory, write_json
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.local_copies import fetched
from llamapro_jax.model.weights import tensors
from llamapro_jax.remote import RemotePath, Unreachable, as_path, check_writable
from llamapro_jax.sources import open_source, read_part


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def memory() -> Iterator[RemotePath]:
    """An empty directory of fsspec's own store in memory."""
    files = fsspec.filesystem("memory")
    yield as_path("memory://store/here")
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket() -> Iterator[FakeGcs]:
    pytest.importorskip("gcsfs")
    shared().clear()
    yield shared()
    shared().clear()


def failing(status: int, times: int, method: str = "GET") -> Any:
    left = [times]

    def answer(request: Request) -> int | None:
        if request.method != method or left[0] == 0:
            return None
        left[0] -= 1
        return status

    return answer


# ------------------------------------------------------------------- paths


def test_a_url_is_remote_and_nothing_else_is(tmp_path: Path) -> None:
    assert as_path(str(tmp_path)) == tmp_path
    assert as_path("~/models") == Path.home() / "models"
    assert as_path("org/name@main") == Path("org/name@main")
    assert as_path(f"file://{tmp_path}") == tmp_path
    path = as_path("memory://store//here/")
    assert str(path) == "memory://store/here"
    assert str(path / "a" / "b") == "memory://store/here/a/b"
    assert (path / "a").parent == path and (path / "a").name == "a"
    assert path.bucket == "store" and path.within_bucket == "here"


def test_files_come_back_as_they_were_written(memory: RemotePath) -> None:
    assert not memory.exists() and not memory.is_dir() and list(memory.iterdir()) == []
    write_json(memory / "below" / "one.json", {"a": [1, "ä"]})
    atomic_write(memory / "two", b"\0\1")
    assert read_json(memory / "below" / "one.json") == {"a": [1, "ä"]}
    assert (memory / "two").read_bytes() == b"\0\1" and (memory / "two").stat().st_size == 2
    assert sorted(path.name for path in memory.iterdir()) == ["below", "two"]
    assert [str(path) for path in memory.glob("*/one.json")] == [f"{memory}/below/one.json"]
    assert list(memory.files()) == ["below/one.json", "two"]
    assert list(memory.files(without=("below",))) == ["two"]
    assert memory.is_dir() and (memory / "two").is_file() and not (memory / "two").is_dir()
    (memory / "two").unlink()
    (memory / "two").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (memory / "two").unlink()
    memory.rmtree()
    assert not memory.exists()


def test_a_file_that_is_missing_is_named(memory: RemotePath) -> None:
    with pytest.raises(UserError, match=r"memory://store/here/none.json: no such file"):
        read_json(memory / "none.json")


@pytest.mark.parametrize("place", ["gs://bucket/out", "s3://bucket/out"])
def test_what_only_writes_locally_refuses_a_url(place: str) -> None:
    with pytest.raises(UserError, match="is remote, and only training writes there"):
        require_new_directory(Path(place))


# ------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs"), ("abfs", "adlfs")]
)
def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setitem(sys.modules, package, None)
    # Not `fsspec.registry`, which is the dictionary in the module of this name.
    for known in list(sys.modules["fsspec.registry"]._registry):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, known)
    with pytest.raises(Unreachable, match=f"needs the package {package}; `pip install .*"):
        as_path(f"{scheme}://bucket/here")


def test_a_scheme_that_nobody_knows_is_named() -> None:
    with pytest.raises(Unreachable, match="nosuch://: is no scheme that fsspec knows"):
        as_path("nosuch://bucket/here")


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_store_refuses_is_told_with_the_mend(bucket: FakeGcs, status: int) -> None:
    bucket.answer = lambda request: status
    message = "gs://bucket/here.*the store refuses this.*gcloud auth application-default login"
    with pytest.raises(Unreachable, match=message):
        check_writable(as_path("gs://bucket/here"))
    with pytest.raises(Unreachable, match=message):
        fetched("gs://bucket/here")


def test_a_bucket_that_is_missing_is_named(bucket: FakeGcs) -> None:
    with pytest.raises(Unreachable, match="gs://nobucket/here: there is no bucket nobucket"):
        check_writable(as_path("gs://nobucket/here"))
    with pytest.raises(UserError, match="gs://nobucket/here: no such directory"):
        fetched("gs://nobucket/here")
    assert bucket.names() == []


def test_a_run_is_not_written_to_what_is_no_object_store() -> None:
    with pytest.raises(Unreachable, match="a run is written to .*gs://.*not to memory://"):
        check_writable(as_path("memory://store/here"))


def test_a_request_that_fails_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, memory: RemotePath
) -> None:
    memory.parent.mkdir()
    (memory / "file").write_text("content")
    failures, delays = [ConnectionError("reset"), OSError("503 for now")], []
    cat = memory._files.cat_file

    def flaky(path: str) -> bytes:
        if failures:
            raise failures.pop()
        return cat(path)

    monkeypatch.setattr(memory._files, "cat_file", flaky)
    monkeypatch.setattr(remote.time, "sleep", delays.append)
    assert (memory / "file").read_text() == "content"
    assert delays == [0.01, 0.02]


def test_what_stays_wrong_is_no_missing_file(
    monkeypatch: pytest.MonkeyPatch, memory: RemotePath
) -> None:
    """Or a step would be taken for one that was never committed, and removed."""

    def down(*_: Any) -> None:
        raise TimeoutError("no answer")

    step = memory / "4"
    (step / COMMIT_FILE).write_text("")
    monkeypatch.setattr(memory._files, "info", down)
    for question in (committed_steps, remove_leftovers):
        with pytest.raises(Unreachable, match="does not do this.*asked 5 times"):
            question(memory)
    monkeypatch.undo()
    assert committed_steps(memory) == [4]


@pytest.mark.slow
def test_a_server_that_is_busy_is_asked_again(bucket: FakeGcs) -> None:
    path = as_path("gs://bucket/here/file")
    path.write_text("content")
    bucket.answer = failing(503, 2)
    assert path.read_text() == "content"
    bucket.answer = failing(429, 1, "POST")
    path.write_text("other")
    assert bucket.read("here/file") == b"other"


# ------------------------------------------------------------------- local copies


def test_a_copy_is_made_once_and_follows_the_store(memory: RemotePath) -> None:
    (memory / "a").write_text("one")
    (memory / "below" / "b").write_text("two")
    copy = fetched(str(memory))
    assert {p.name: p.read_text() for p in copy.rglob("*") if p.is_file()} == {
        "a": "one",
        "b": "two",
    }
    before = (copy / "below" / "b").stat()
    (memory / "a").write_text("three!")
    assert fetched(str(memory)) == copy
    assert (copy / "a").read_text() == "three!"
    assert (copy / "below" / "b").stat().st_mtime_ns == before.st_mtime_ns
    (memory / "a").unlink()
    assert [p.name for p in fetched(str(memory)).rglob("*") if p.is_file()] == ["b"]
    (copy / "below" / "b").write_text("TWO")
    assert (fetched(str(memory), fresh=True) / "below" / "b").read_text() == "two"


@pytest.mark.parametrize("record", ["kept", "lost", "of the directory above"])
def test_a_fresh_copy_has_nothing_that_the_store_lost(memory: RemotePath, record: str) -> None:
    """Or `llamapro verify` would read a shard that is no more."""
    for name in ("shard-0", "below/shard-1"):
        (memory / name).write_text(name)
    fetched(str(memory.parent if record == "of the directory above" else memory), fresh=True)
    if record == "lost":
        shutil.rmtree(local_copies.root() / ".records")
    (memory / "below/shard-1").unlink()
    copy = fetched(str(memory), fresh=True)
    assert [p.name for p in copy.rglob("*") if p.is_file()] == ["shard-0"]


def test_parts_of_a_directory_are_copied_beside_each_other(memory: RemotePath) -> None:
    for name in ("config.json", "big/part", "other"):
        (memory / name).write_text(name)
    copy = fetched(str(memory), without=("big",))
    assert sorted(p.name for p in copy.iterdir()) == ["config.json", "other"]
    assert (fetched(str(memory)) / "big" / "part").is_file()
    fetched(str(memory), only=("*.json",))
    assert (fetched(str(memory), without=("big",)) / "big" / "part").is_file()


def test_a_single_file_has_a_copy_too(memory: RemotePath) -> None:
    (memory / "text.jsonl").write_text("{}\n")
    assert fetched(f"{memory}/text.jsonl").read_text() == "{}\n"


def test_what_is_not_there_is_named(memory: RemotePath) -> None:
    with pytest.raises(UserError, match=r"memory://store/here: no such directory"):
        fetched(str(memory))


def test_a_copy_that_has_no_room_is_refused_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, memory: RemotePath
) -> None:
    (memory / "a").write_text("one")
    usage = type("Usage", (), {"free": 2})
    monkeypatch.setattr(local_copies.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="its local copy takes 3e-09 GB.*XDG_CACHE_HOME"):
        fetched(str(memory))
    assert not (local_copies.root() / "memory").exists()


def test_processes_of_a_host_do_not_copy_twice(bucket: FakeGcs) -> None:
    bucket.write("models/a/weights", bytes(1000))
    threads = [threading.Thread(target=fetched, args=("gs://bucket/models/a",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    media = [r for r in bucket.requests if r.parameters.get("alt") == "media"]
    assert [r.path.rpartition("/")[2] for r in media].count("weights") == 1


def test_a_copy_that_differs_from_the_store_is_made_again(
    monkeypatch: pytest.MonkeyPatch, bucket: FakeGcs
) -> None:
    bucket.write("models/a/weights", b"right")
    get, calls = RemotePath.get, []

    def damaging(self: RemotePath, file: Path) -> None:
        get(self, file)
        calls.append(file)
        if len(calls) == 1:
            file.write_bytes(b"wrong")

    monkeypatch.setattr(RemotePath, "get", damaging)
    assert (fetched("gs://bucket/models/a") / "weights").read_bytes() == b"right"
    assert len(calls) == 2


# ------------------------------------------------------------------- texts


def test_a_text_is_prepared_for_a_store_once_and_read_from_it(
    monkeypatch: pytest.MonkeyPatch, memory: RemotePath, tmp_path: Path
) -> None:
    (memory / "lines.txt").write_text("some text\n" * 50)
    settings = {"sequence_length": 16, "vocab_size": 258, "tokenizer": ByteTokenizer()}

    def opened() -> Rows:
        entry = SourceConfig(name="lines", path=f"{memory}/lines.txt")
        return open_source_of_rows(entry, cache_directory=f"{memory}/data", **settings)

    first = opened()
    assert first.path.startswith("memory://store/here/data/lines-")
    (tmp_path / "lines.txt").write_bytes((memory / "lines.txt").read_bytes())
    entry = SourceConfig(name="lines", path=str(tmp_path / "lines.txt"))
    local = open_source_of_rows(entry, cache_directory=tmp_path / "data", **settings)
    assert first.digest == local.digest and Path(local.path).name == as_path(first.path).name
    np.testing.assert_array_equal(
        first.read(range(len(first)))["tokens"], local.read(range(len(local)))["tokens"]
    )
    monkeypatch.setattr(Preparation, "run", None)  # another host takes what is there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other host"))
    assert opened().digest == local.digest
    again = open_rows(first.path, sequence_length=16, vocab_size=258)
    assert again.digest == local.digest and again.path == first.path
    assert not list(local_copies.root().glob(".scratch-*"))


# ------------------------------------------------------------------- steps and models


def test_a_step_is_set_aside_without_a_rename(bucket: FakeGcs) -> None:
    for name in ("trainable/x/0.0", "meta/metadata", COMMIT_FILE):
        bucket.write(f"run/checkpoints/8/{name}", name.encode())
    bucket.write("run/checkpoints/12/trainable/x", b"never committed")
    steps = as_path("gs://bucket/run/checkpoints")
    assert committed_steps(steps) == [8]
    assert remove_leftovers(steps) == ["12"]
    assert set_aside(steps, 8) == "8.damaged"
    assert committed_steps(steps) == []
    assert bucket.names() == [
        f"run/checkpoints/8.damaged/{name}"
        for name in sorted(("trainable/x/0.0", "meta/metadata", COMMIT_FILE))
    ]
    # Killed before the decisive act: the step still is one, and the copy counts for nothing.
    for name in ("trainable/x/0.0", COMMIT_FILE):
        bucket.write(f"run/checkpoints/8/{name}", b"")
    assert committed_steps(steps) == [8] and set_aside(steps, 8) == "8.damaged-2"


@pytest.mark.parametrize("scheme", ["gs", "memory"])
def test_a_model_is_read_from_a_store(
    bucket: FakeGcs, memory: RemotePath, tmp_path: Path, scheme: str
) -> None:
    """Arrays of gs:// where they are, without a copy; of other schemes through one."""
    base = write_tiny(tmp_path / "base")
    convert(str(base), tmp_path / "flax")
    local = {kind: open_source(str(tmp_path / kind)) for kind in ("base", "flax")}
    place = "gs://bucket/models" if scheme == "gs" else str(memory)
    for kind in local:
        for name in remote.sizes(tmp_path / kind):
            (as_path(place) / kind / name).put(tmp_path / kind / name)
    for kind, expected in local.items():
        found = open_source(f"{place}/{kind}")
        assert found.path == f"{place}/{kind}" and found.lineage == expected.lineage
        assert found.fingerprint().digest == expected.fingerprint().digest
        for tensor in tensors(found.config):
            np.testing.assert_array_equal(found.read(tensor), expected.read(tensor))
            bounds = [(0, max(1, size // 2)) for size in tensor.weight.shape(found.config)]
            np.testing.assert_array_equal(
                read_part(found, tensor, bounds), read_part(expected, tensor, bounds)
            )
    copied = list((local_copies.root() / scheme).rglob(".zarray"))
    assert (len(copied) == 0) == (scheme == "gs")


@pytest.mark.parametrize(("status", "name"), [(403, "refuses"), (404, "damaged")])
def test_an_array_that_cannot_be_reached_is_not_damaged(
    bucket: FakeGcs, status: int, name: str
) -> None:
    bucket.answer = lambda request: status
    with pytest.raises(UserError, match=name) as caught:
        StackedArrays(as_path("gs://bucket/run/checkpoints/8/trainable")).shape("x")
    assert isinstance(caught.value, Unreachable) == (status == 403)
