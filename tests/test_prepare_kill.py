"""`prepare` with several processes, killed at any time, and two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from data_sources import BOS, EOS, ByteTokenizer
from prepared import TEXTS, fixtures, tree, write_lines

from llamapro_jax.data.preparation import prepare as engine
from llamapro_jax.data.preparation.prepare import Preparation, prepare
from llamapro_jax.data.preparation.work import working
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import Tokenizer, load_tokenizer

lines, small_pieces, tokenizer = fixtures()


def test_processes_change_no_byte(
    lines: Path, tmp_path: Path, small_pieces: None, tokenizer: Tokenizer
) -> None:
    tokenizer.encode("used")  # before it goes to the processes
    sets = [
        prepare(
            Content(str(lines)),
            tokenizer,
            16,
            target=tmp_path / str(workers),
            held_out=0.2,
            workers=workers,
        )
        for workers in (1, 2)
    ]
    assert tree(sets[0]) == tree(sets[1])
    assert load_tokenizer(sets[1] / "tokenizer").fingerprint == tokenizer.fingerprint


def test_a_bad_record_in_a_process_is_named(
    lines: Path, tmp_path: Path, small_pieces: None, tokenizer: Tokenizer
) -> None:
    write_lines(lines, [*TEXTS[:50], b"{", *TEXTS[50:]])
    with pytest.raises(UserError, match=r"lines\.jsonl:51: is not JSON"):
        prepare(Content(str(lines)), tokenizer, 16, target=tmp_path / "set", workers=2)


# Prepares argv[1] into argv[2] in pieces of argv[3] bytes with two processes.
SCRIPT = """
import sys
from pathlib import Path
from llamapro_jax.data.preparation import prepare as engine
from llamapro_jax.data.readers.documents import Content, pieces
from llamapro_jax.hf.tokenizer import load_tokenizer

if __name__ == "__main__":
    path, target, size, tokenizer = sys.argv[1:]
    engine.pieces = lambda content: pieces(content, int(size))
    engine.prepare(
        Content(path), load_tokenizer(tokenizer), 64, target=target, held_out=0.1, workers=2
    )
"""


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def start(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Callable[..., subprocess.Popen]]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started = []

    def begin(path: Path, target: Path, size: int) -> subprocess.Popen:
        root = str(Path(__file__).parent.parent)
        command = [sys.executable, script, path, target, str(size), tokenizer.source]
        environment = os.environ | {"PYTHONPATH": root}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_after_kill_9_the_same_bytes(
    tmp_path: Path, start: Callable[..., subprocess.Popen]
) -> None:
    file = write_lines(tmp_path / "texts" / "lines.jsonl", [t * 20 for t in TEXTS] * 4)
    size = file.stat().st_size // 20
    killed = start(file, tmp_path / "out" / "killed", size)
    wait_for(lambda: len(list(tmp_path.glob("out/.killed-*/pieces/*.json"))) >= 3)
    processes = children(killed.pid)
    assert len(processes) >= 2
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_for(lambda: not any(map(alive, processes)), 10)
    work = next((tmp_path / "out").glob(".killed-*"))
    done = {path.stem for path in work.glob("pieces/*.json")}
    assert 3 <= len(done) < 20
    shards_made = {path for i in done for path in work.glob(f"data/piece-{i}.*")}
    made = {path.stat().st_ino for path in shards_made}
    assert not (tmp_path / "out" / "killed").exists()
    assert start(file, tmp_path / "out" / "killed", size).wait() == 0
    assert start(file, tmp_path / "other" / "whole", size).wait() == 0
    assert tree(tmp_path / "out" / "killed") == tree(tmp_path / "other" / "whole")
    # What was finished was taken, not made again.
    assert made <= {path.stat().st_ino for path in (tmp_path / "out" / "killed").glob("rows-*")}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["killed"]


@pytest.mark.parametrize("failing", ["name_shards", "write_metadata", "publish"])
def test_a_kill_at_the_end_loses_nothing(
    lines: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Half of the shards have their names, or the metadata is there, when it ends."""
    from llamapro_jax.data.preparation.work import Work

    whole = prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "whole")
    place = engine if failing == "write_metadata" else Work
    name_shards = Work.name_shards

    def fail(self: Any, *arguments: Any) -> None:
        if failing == "name_shards":
            name_shards(self, arguments[0], arguments[1][:3])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, failing, fail)
        prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "set")
    assert not (tmp_path / "set").exists()
    tokenizer = ByteTokenizer()
    assert tree(prepare(Content(str(lines)), tokenizer, 16, target=tmp_path / "set")) == tree(whole)
    assert tokenizer.calls == 0


def test_two_at_once(lines: Path, tmp_path: Path) -> None:
    one = Preparation(Content(str(lines)), ByteTokenizer(), 16, tmp_path / "out" / "set")
    other = Preparation(Content(str(lines)), ByteTokenizer(), 32, tmp_path / "out" / "set")
    with working(one.directory, one.identity.digest, wait=False):
        for second in (one, other):
            with pytest.raises(UserError, match="set: another process prepares it; wait until"):
                second.run()
    assert one.run().is_dir()


def test_two_runs_with_one_cache_wait_for_each_other(
    lines: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer, cache = ByteTokenizer(), tmp_path / "cache"
    one = Preparation(Content(str(lines)), ByteTokenizer(), 16, cache=cache)
    with ThreadPoolExecutor(1) as threads:
        with working(one.directory, one.identity.digest, wait=True) as work:
            second = threads.submit(prepare, one.content, tokenizer, 16, cache=cache)
            told = ""
            while "another process prepares it; waiting" not in told:
                told += capfd.readouterr().err
            one._finish(work, one._make(work))
        assert second.result(timeout=60) == one.directory
    assert tokenizer.calls == 0
    assert [path.name for path in cache.iterdir()] == [one.directory.name]


def test_unfinished_shards_of_other_options_are_reported(
    lines: Path, tmp_path: Path, small_pieces: None, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "bad.jsonl", [*TEXTS, b"{"])
    with pytest.raises(UserError, match=r"bad\.jsonl:61: is not JSON"):
        prepare(Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "set")
    (kept,) = tmp_path.glob(".set-*")
    prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "set")
    assert (
        f"set: unfinished shards of other files or options lie in {kept};" in capfd.readouterr().err
    )
    # Given again with more patience, they are taken.
    tokenizer = ByteTokenizer()
    os.rename(tmp_path / "set", tmp_path / "first")
    prepare(Content(str(file)), tokenizer, 16, target=tmp_path / "set", max_bad=0.1)
    assert tokenizer.calls == 1 and not kept.exists()


def test_a_file_that_changes_meanwhile_is_found(lines: Path, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()

    def encode_batch(texts: list[str], bos: bool = True, eos: bool = True) -> list[list[int]]:
        write_lines(lines, TEXTS[::-1])
        return [[BOS, EOS] for _ in texts]

    tokenizer.encode_batch = encode_batch  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"lines\.jsonl: was changed or removed while"):
        prepare(Content(str(lines)), tokenizer, 16, target=tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_it_ends_cleanly_when_a_process_is_killed(
    lines: Path, tmp_path: Path, start: Callable[..., subprocess.Popen]
) -> None:
    file = write_lines(tmp_path / "texts" / "lines.jsonl", [t * 20 for t in TEXTS] * 4)
    parent = start(file, tmp_path / "set", file.stat().st_size // 20)
    wait_for(lambda: any(tmp_path.glob(".set-*/pieces/*.json")))
    spawned = [
        child
        for child in children(parent.pid)
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    assert len(spawned) == 2
    os.kill(spawned[0], signal.SIGKILL)
    assert parent.wait(timeout=30) == 1
    wait_for(lambda: not any(map(alive, spawned)), 10)
