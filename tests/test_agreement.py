"""What the processes of a run compare: real pairs of them, of which one has something else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import overrides, settings, write_model, write_texts
from test_data_dataset import tokens_feature, write_foreign

from llamapro_jax.checkpoint_files import committed_steps
from llamapro_jax.data.dataset import open_rows
from llamapro_jax.data.mixture import Mixture
from llamapro_jax.launch import local
from llamapro_jax.launch.surroundings import free_port
from llamapro_jax.training.agreement import require_alike

ROOT = Path(local.__file__).parents[2]
LENGTH, BATCH = 32, 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("agreement")
    write_model(directory)
    write_texts(directory / "texts")
    return directory


def arguments(work: Path, output: Path, **changes: Any) -> list[str]:
    quick = {"data.eval": [], "training.eval_every": None, "training.save_every": 1}
    values = settings(work / "model", work / "texts", output) | quick | changes
    (work / "config.yaml").write_text("{}\n")
    return ["-m", "llamapro_jax.cli", "train", str(work / "config.yaml"), *overrides(values)]


def in_two(
    commands: Sequence[Sequence[str]], places: Sequence[Path] = (ROOT, ROOT)
) -> list[tuple[int, str]]:
    """Status and errors of two processes, each with a command and a directory of its own.

    The package is the one in that directory, or else this one.
    """
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=place,
            env=local.environment(
                index, 2, 2, port, {**os.environ, "PYTHONPATH": f"{place}:{ROOT}"}
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, (command, place) in enumerate(zip(commands, places, strict=True))
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def refused(found: list[tuple[int, str]], *messages: str) -> None:
    """Both ended of it, and process 0 said why."""
    assert [status for status, _ in found] == [2, 2], found
    for message in messages:
        assert re.search(message, found[0][1]), found[0][1]
    assert "error:" not in found[1][1]


def test_alone_there_is_nobody_to_differ_from() -> None:
    require_alike("settings", {"a": "1"}, "")


def test_another_setting_on_one_process(work: Path, tmp_path: Path) -> None:
    commands = [
        arguments(work, tmp_path / "run"),
        arguments(work, tmp_path / "run", **{"optimizer.learning_rate": 0.02, "seed": 3}),
    ]
    refused(
        in_two(commands),
        "do not have the same settings",
        r"seed is 3 on process 1 \(.+\), and 0 on process 0 \(.+\)",
        r"optimizer.learning_rate is 0.02 on process 1 \(.+\), and 0.01 on process 0",
    )
    assert not (tmp_path / "run").exists()


def test_other_code_on_one_process(work: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llamapro_jax", tmp_path / "other/llamapro_jax", ignore=ignored)
    with (tmp_path / "other/llamapro_jax/loss.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    command = arguments(work, tmp_path / "run")
    refused(
        in_two([command, command], (ROOT, tmp_path / "other")),
        "do not have the same code",
        r"llamapro_jax/loss.py is [0-9a-f]{12} on process 1",
    )
    assert not (tmp_path / "run").exists()


def test_another_base_on_one_process(work: Path, tmp_path: Path) -> None:
    """Each host reads its own copy, at the same path."""
    for place, seed in (("one", 0), ("two", 5)):
        write_model(tmp_path / place, expanded=False, seed=seed)
        shutil.copytree(work / "texts", tmp_path / place / "texts")
    command = arguments(work, tmp_path / "run", model="base", trainable="all")
    refused(
        in_two([command, command], (tmp_path / "one", tmp_path / "two")),
        "do not have the same base",
        r"model.embed_tokens.weight is float\d+ [0-9a-f]{12} on process 1",
        "Put the same model in base",
    )


def write_copies(directory: Path, step: int) -> int:
    """Two data sets, which differ in a row of the batch that follows `step` steps: its number."""
    examples = [{"tokens": np.full(LENGTH, 5 + i)} for i in range(3 * BATCH)]
    for place in ("one", "two"):
        write_foreign(directory / place / "set", tokens_feature(LENGTH), examples)
    rows = open_rows(directory / "one/set", sequence_length=LENGTH, vocab_size=320)
    row = Mixture([("own", rows, 1.0)], BATCH, 0).places(step)[1][1]
    token = int(rows[row]["tokens"][0])
    # Of as many bytes, so that nothing but the row itself differs.
    examples[token - 5]["tokens"] = np.full(LENGTH, 100)
    shutil.rmtree(directory / "two/set")
    write_foreign(directory / "two/set", tokens_feature(LENGTH), examples)
    return row


@pytest.mark.parametrize("step", [0, 2])
def test_another_copy_of_the_data_on_one_process(work: Path, tmp_path: Path, step: int) -> None:
    """A row of the first batch is found before the start, and one that comes later when it does."""
    row = write_copies(tmp_path, step)
    source = {"name": "own", "path": "set", "kind": "tfds"}
    changes = {"data.sources": [source], "training.compare_every": 1, "training.steps": 3}
    command = arguments(work, tmp_path / "run", **changes)
    refused(
        in_two([command, command], (tmp_path / "one", tmp_path / "two")),
        "do not have the same data",
        rf"row 1 of the batch of step {step + 1} \(own, row {row}\) is [0-9a-f]{{12}} on process 1",
        *([rf"last seen to agree after step {step}; remove later steps"] if step else []),
    )
    # Nothing of the step that differs was saved.
    assert committed_steps(tmp_path / "run/checkpoints")[-1:] == ([step] if step else [])


COPIES = """
import sys
from types import SimpleNamespace
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from llamapro_jax.config import MeshConfig
from llamapro_jax.errors import UserError
from llamapro_jax.launch.processes import index, joined
from llamapro_jax.sharding import build_mesh
from llamapro_jax.training.agreement import Comparison
with joined():
    mesh = build_mesh(MeshConfig(data=2, fsdp=2))
    def placed(array, *axes):
        sharding = NamedSharding(mesh, P(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])
    def of(scalar=3, norm=0.0, matrix=0.0):
        whole = np.arange(8, dtype=np.float32)
        whole[5] += matrix
        return {"count": placed(np.int32(scalar)), "matrix": placed(whole, "fsdp"),
                "norm": placed(np.full(4, norm, "bfloat16")),
                "one": placed(whole, ("data", "fsdp"))}
    with jax.set_mesh(mesh):
        compare = Comparison(SimpleNamespace(mesh=mesh, directory="RUN"), 100)
        assert compare.due(200) and not compare.due(150)
        compare(0, of(), of())
        compare(100, of(), of(norm=1.0))
        for name, value in (("scalar", 4), ("norm", 1.0), ("matrix", 1.0)):
            try:
                compare(200, of(), of(**{name: value} if index() else {}))
                sys.exit(f"{name}: not found")
            except UserError as error:
                print(name, error, file=sys.stderr, flush=True)
        try:
            compare(201 + index(), of(), of())
        except UserError as error:
            print("step", error, file=sys.stderr, flush=True)
"""


def test_copies_of_an_array_that_differ_are_named(tmp_path: Path) -> None:
    found = in_two([["-c", COPIES], ["-c", COPIES]])
    assert [status for status, _ in found] == [0, 0], found
    for _, said in found:
        for line in (
            r"frozen\.count: [0-9a-f]{8} on process 0 \(.+\); [0-9a-f]{8} on process 1",
            r"frozen\.norm: [0-9a-f]{8} on process 0 \(.+\); [0-9a-f]{8} on process 1",
            r"frozen\.matrix\[4:8\]: [0-9a-f]{8} on process 0 \(.+\); [0-9a-f]{8} on process 1",
            r"the number of steps taken is 202 on process 1 \(.+\), and 201 on process 0",
            "last seen to agree after step 100; remove later steps from RUN/checkpoints",
        ):
            assert re.search(line, said), (line, said)
        assert "matrix[0:4]" not in said and "state." not in said and "frozen.one" not in said
