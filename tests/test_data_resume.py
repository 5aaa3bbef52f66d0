"""The same examples on 1, 2 and 4 processes, from any step on: by a hash of each global batch."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_record import global_hashes
from data_sources import ByteTokenizer
from runs import overrides, settings, text, write_model, write_texts

from llamapro_jax.checkpoint import committed_steps
from llamapro_jax.data.preparation.prepare import prepare
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.launch import local
from llamapro_jax.launch.surroundings import free_port

ROOT = Path(local.__file__).parents[2]
BATCH, STEPS = 8, 12

READ = """
import json, sys
from functools import partial
from pathlib import Path
from batch_record import record
from llamapro_jax.config import MeshConfig, load_config
from llamapro_jax.data.dataset import Rows
from llamapro_jax.launch.processes import joined
config, file, start, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
taken, read = [0], Rows.read
def counting(self, indices):
    taken[0] += len(indices)
    return read(self, indices)
with joined():
    from llamapro_jax.sharding import build_mesh
    from llamapro_jax.training.batches import place_batch
    from llamapro_jax.training.texts import open_data
    config, mesh = load_config(config), build_mesh(MeshConfig(data=2, fsdp=2))
    mixture = open_data(config, Path("unused"), 258, None).mixture
    Rows.read = counting
    for step in range(start, stop):
        rows = partial(mixture.rows, step)
        batch = place_batch(rows, mixture.batch_size, mixture.sequence_length, mesh)
        record(step, batch, file)
print(json.dumps(taken[0]))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small data sets, of which some epochs go into the steps, and a configuration."""
    work = tmp_path_factory.mktemp("resume")
    for seed, name in enumerate(("code", "law", "prose")):
        lines = work / f"{name}.jsonl"
        documents = text(seed, 12 + 10 * seed).splitlines()
        lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in documents))
        prepare(Content(str(lines)), ByteTokenizer(), 32, target=work / name)
    (work / "read.py").write_text(READ)
    code, law, prose = (
        {"name": name, "path": str(work / name), "kind": "tfds"}
        for name in ("code", "law", "prose")
    )
    config = {
        "model": "unused",
        "output": "unused",
        "seed": 3,
        "data": {
            "sequence_length": 32,
            "batch_size": BATCH,
            "sources": [{**code, "weight": "rows"}, {**law, "weight": "rows"}],
            "replay": {"share": 0.3, "sources": [prose]},
        },
        "training": {"steps": STEPS},
    }
    (work / "config.yaml").write_text(json.dumps(config))
    return work


def read(work: Path, directory: Path, processes: int, start: int, stop: int) -> dict[int, str]:
    """The hash of each global batch, read by so many processes of four devices in all."""
    directory.mkdir()
    port = free_port()
    running = [
        subprocess.Popen(
            [
                *(sys.executable, str(work / "read.py"), str(work / "config.yaml")),
                *(str(directory / str(index)), str(start), str(stop)),
            ],
            env={
                **local.environment(index, processes, 4 // processes, port),
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    for process in running:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        # Each reads the rows that its devices need, once, and no other.
        assert json.loads(output.splitlines()[-1]) == (stop - start) * BATCH // processes
    return global_hashes(directory.iterdir(), BATCH)


def test_any_number_of_processes_goes_on_with_the_same_examples(work: Path, tmp_path: Path) -> None:
    whole = read(work, tmp_path / "1", 1, 0, STEPS)
    assert list(whole) == list(range(STEPS)) and len(set(whole.values())) == STEPS
    for processes in (2, 4):
        step = random.Random(processes).randrange(1, STEPS - 2)
        resumed = read(work, tmp_path / str(processes), processes, step, STEPS)
        assert resumed == {k: whole[k] for k in range(step, STEPS)}


# ------------------------------------------------------------------- through training

TRAIN = """
import os, sys
from pathlib import Path
from batch_record import record
from llamapro_jax import cli
from llamapro_jax.launch.surroundings import INDEX
from llamapro_jax.training import loop
directory, stop = Path(sys.argv[1]), int(sys.argv[2])
directory.mkdir(exist_ok=True)
place = loop.place_batch
def placing(read, *arguments):
    batch = place(read, *arguments)
    record(read.args[0], batch, directory / os.environ[INDEX])
    return batch
loop.place_batch = placing
if stop:
    log = loop._log
    def stopping(run, *arguments):
        log(run, *arguments)
        if run.step == stop and os.environ[INDEX] == "0":
            os.kill(os.getpid(), 15)
    loop._log = stopping
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_a_run_that_moves_between_processes_trains_on_the_same_examples(tmp_path: Path) -> None:
    """Stopped on two processes, then on four, and finished on one."""
    write_model(tmp_path)
    texts = write_texts(tmp_path / "texts")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "config.yaml").write_text("{}\n")
    replay = {"share": 0.25, "sources": [{"name": "old", "path": str(texts["old"])}]}
    changes: dict[str, Any] = {
        "data.batch_size": BATCH,
        "data.replay": replay,
        "data.eval": [],
        "training.eval_every": None,
        "training.log_every": 1,
        "mesh.data": 2,
        "mesh.fsdp": 2,
    }

    def train(output: str, processes: int, stop: int) -> dict[int, str]:
        values = settings(tmp_path / "model", tmp_path / "texts", tmp_path / output) | changes
        seen, port = tmp_path / f"{output}-{processes}-{stop}", free_port()
        arguments = ["train", str(tmp_path / "config.yaml"), *overrides(values)]
        running = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "train.py"), str(seen), str(stop), *arguments],
                env={
                    **local.environment(index, processes, 4 // processes, port),
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                },
                stdout=subprocess.DEVNULL,
            )
            for index in range(processes)
        ]
        for process in running:
            assert process.wait(timeout=300) == (42 if stop else 0)
        return global_hashes(seen.iterdir(), BATCH)

    whole = train("whole", 1, 0)
    assert list(whole) == list(range(8)) and len(set(whole.values())) == 8
    found: dict[int, str] = {}
    for processes, stop in ((2, 3), (4, 5), (1, 0)):
        first = max(committed_steps(tmp_path / "moved/checkpoints"), default=0)
        seen = train("moved", processes, stop)
        assert min(seen) == first
        assert seen == {step: whole[step] for step in seen}
        found |= seen
    assert found == whole
