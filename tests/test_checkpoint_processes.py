"""Checkpoints of two processes: they agree on what is damaged and on what failed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llamapro_jax.checkpoint_files import committed_steps, steps_set_aside
from llamapro_jax.launch import local
from llamapro_jax.launch.surroundings import free_port

ROOT = Path(local.__file__).parents[2]

# Each process has rows of `q` that the other one never reads or writes.
BEGINNING = """
import json, resource, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_restore import abstract, restore_newest
from llamapro_jax.checksum import checksums
from llamapro_jax.config import MeshConfig
from llamapro_jax.errors import UserError
from llamapro_jax.launch.processes import from_first, is_first, joined
from llamapro_jax.sharding import build_mesh

directory, told, began = Path(sys.argv[1]), [], time.monotonic()

def placed(array, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

def tree(seed):
    rows = np.random.default_rng(seed).standard_normal((1, 2, 8, 1024), np.float32)
    return {"new": [{"q": placed(rows, None, None, "fsdp")}]}

def optimizer():
    return {"count": placed(np.ones((), np.int32))}

def save(checkpoints, step):
    checkpoints.save(step, tree(step), optimizer(), {})
    return checkpoints.wait()

with joined():
    mesh = build_mesh(MeshConfig(fsdp=4))
    with jax.set_mesh(mesh):
"""
DAMAGE = """
        with Checkpoints(directory, 3) as checkpoints:
            save(checkpoints, 1), save(checkpoints, 2)
        def damage():
            file = directory / "2/trainable/new.0.q/0.0.3.0"
            file.write_bytes(file.read_bytes()[:-9])
        from_first(damage)
        wanted = abstract((tree(0), optimizer()))
        found = restore_newest(directory, *wanted, lambda *aside: told.append(aside))
        same = checksums(found.trainable) == checksums(tree(1))
        print(json.dumps({"step": found.step, "same": same, "told": told}), flush=True)
"""
FAILURE = """
        with Checkpoints(directory, 3, lambda *failed: told.append(failed)) as checkpoints:
            saved = [save(checkpoints, 1)]
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if not is_first():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            since = time.monotonic()
            saved.append(save(checkpoints, 2))
            seconds = time.monotonic() - since
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            saved.append(save(checkpoints, 3))
        print(json.dumps({"saved": saved, "told": told, "seconds": seconds}), flush=True)
"""

# Each process uploads its parts; it is a local directory, but nobody here knows.
STORE = """
        import fsspec
        from fsspec.implementations.local import LocalFileSystem
        from llamapro_jax.remote import as_path

        class Elsewhere(LocalFileSystem):
            protocol, refused = "elsewhere", False
            def __init__(self, **settings):
                super().__init__(**{**settings, "auto_mkdir": True})
            @classmethod
            def _strip_protocol(cls, path):
                return super()._strip_protocol("/" + path.removeprefix("elsewhere://").lstrip("/"))
            def put_file(self, *files, **settings):
                if self.refused:
                    raise PermissionError("this process alone")
                super().put_file(*files, **settings)

        fsspec.register_implementation("elsewhere", Elsewhere)
        store = as_path(f"elsewhere://{directory}")
        with Checkpoints(store, 3, lambda *failed: told.append(failed)) as checkpoints:
            saved = [save(checkpoints, 1)]
            Elsewhere.refused = not is_first()
            saved.append(save(checkpoints, 2))
            Elsewhere.refused = False
            saved.append(save(checkpoints, 3))
        seconds = time.monotonic() - began
        def damage():
            file = store / "3/trainable/new.0.q/0.0.3.0"
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(bytes(data))
        from_first(damage)
        wanted = abstract((tree(0), optimizer()))
        found = restore_newest(store, *wanted, lambda *aside: told.append(aside))
        same = checksums(found.trainable) == checksums(tree(1))
        told = {"saved": saved, "step": found.step, "same": same, "told": told, "seconds": seconds}
        print(json.dumps(told), flush=True)
"""


ERROR = """
        with Checkpoints(directory, 3) as checkpoints:
            save(checkpoints, 1)
            checkpoints.save(2, tree(2), optimizer(), {})
            if not is_first():
                raise UserError("this process alone")
            while True:
                time.sleep(1)
"""


def in_two(tmp_path: Path, script: str, status: int = 0) -> list[list[dict[str, Any]]]:
    """What each of two processes with two devices each printed."""
    (tmp_path / "script.py").write_text(BEGINNING + script)
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "checkpoints")],
            env={**local.environment(index, 2, 2, port), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status, status]
    lines = [[line for line in text.splitlines() if line.startswith("{")] for text in outputs]
    return [[json.loads(line) for line in found] for found in lines]


@pytest.mark.slow
def test_damage_that_one_process_sees_makes_all_take_the_step_before(tmp_path: Path) -> None:
    for [found] in in_two(tmp_path, DAMAGE):
        assert (found["step"], found["same"]) == (1, True)
        [[step, reason]] = found["told"]
        assert step == 2 and "trainable new.0.q" in reason
    assert committed_steps(tmp_path / "checkpoints") == [1]
    assert steps_set_aside(tmp_path / "checkpoints") == ["2.damaged"]


@pytest.mark.slow
def test_a_save_that_fails_on_one_process_fails_on_all_at_once(tmp_path: Path) -> None:
    results = [found for [found] in in_two(tmp_path, FAILURE)]
    for found in results:
        assert found["saved"] == [True, False, True]
        # Orbax's own barriers would wait for twenty minutes.
        assert found["seconds"] < 60
    [[step, reason]] = results[0]["told"]
    assert step == 2 and "File too large" in reason
    assert committed_steps(tmp_path / "checkpoints") == [1, 3]


@pytest.mark.slow
def test_two_processes_share_nothing_but_a_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An upload fails on one, and a bit flips in what the other one wrote."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    results = [found for [found] in in_two(tmp_path, STORE)]
    for found in results:
        assert found["saved"] == [True, False, True]
        assert (found["step"], found["same"]) == (1, True)
        assert found["seconds"] < 100
    # The first process tells of its failed saves, and both of the step that was set aside.
    failed, aside = results[0]["told"]
    assert failed[0] == 2 and "this process alone" in failed[1]
    assert results[1]["told"] == [aside] and aside[0] == 3 and "trainable new.0.q" in aside[1]
    assert committed_steps(tmp_path / "checkpoints") == [1]
    assert steps_set_aside(tmp_path / "checkpoints") == ["3.damaged"]
    assert not list((tmp_path / "cache").rglob(".scratch-*"))


@pytest.mark.slow
def test_an_error_of_one_process_does_not_wait_for_a_word_about_a_save(tmp_path: Path) -> None:
    since = time.monotonic()
    in_two(tmp_path, ERROR, status=2)
    assert time.monotonic() - since < 150
    assert committed_steps(tmp_path / "checkpoints") == [1, 2]
