"""Runs on several devices and in several processes, through the real command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import Devices, fixture
from runs import assert_same_run, log_lines, overrides, settings, write_model, write_texts
from steps import PLANS, begin, expanded_params, model_config, random_batch, run_config

from llamapro_jax.checkpoint_files import committed_steps
from llamapro_jax.config import MeshConfig
from llamapro_jax.launch import local
from llamapro_jax.launch.surroundings import free_port
from llamapro_jax.model.weights import tensors
from llamapro_jax.sources import open_source, read_part

ROOT = Path(local.__file__).parents[2]
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
CHANGES = {
    "data.batch_size": 8,
    "training.steps": 10,
    "training.log_every": 1,
    "training.eval_every": 5,
    "training.save_every": 5,
    "training.keep": 5,
}

devices = fixture(8)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processes")
    write_model(directory)
    write_texts(directory / "texts")
    return directory


# ------------------------------------------------------------------- meshes


def losses(shape: Sequence[int], spec: tuple[str, ...], steps: int = 10) -> list[float]:
    """The losses of a run on the first devices, as many as the mesh needs."""
    import jax

    from llamapro_jax.sharding import build_mesh, weight_sharding
    from llamapro_jax.training.batches import place_batch
    from llamapro_jax.training.state import map_leaves
    from llamapro_jax.training.step import build_train_step

    plan = PLANS["2 of 4"]
    config = model_config(plan, vocab_size=64)
    run = run_config(spec, rows=8, remat="none")
    mesh = build_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    params = expanded_params(config, plan)

    def laid_out(stack: str, weight: Any, leaf: Any) -> Any:
        return jax.device_put(leaf, weight_sharding(mesh, weight, 0 if stack == "outer" else 2))

    found = []
    with jax.set_mesh(mesh):
        state, frozen, optimizer = begin(run, map_leaves(params, laid_out))
        step = build_train_step(config, plan, run, optimizer)
        for seed in range(steps):
            rows = random_batch(seed, rows=8)
            batch = place_batch(
                lambda a, b, rows=rows: {name: array[a:b] for name, array in rows.items()},
                8,
                rows["tokens"].shape[1],
                mesh,
            )
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def on_one_device(devices: Devices) -> list[float]:
    return devices(losses, (1, 1, 1, 1), ("new",))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1)])
def test_a_mesh_gives_the_losses_of_one_device(  # over `context`, too, in test_mesh
    devices: Devices, on_one_device: list[float], shape: tuple[int, ...]
) -> None:
    found = devices(losses, shape, ("new",))
    assert on_one_device[-1] != on_one_device[0]
    np.testing.assert_allclose(found, on_one_device, rtol=1e-5)


# ------------------------------------------------------------------- parts of a model


@pytest.mark.parametrize("kind", ["base", "model"])
def test_a_part_of_a_tensor_is_what_the_whole_has_there(work: Path, kind: str) -> None:
    source = open_source(str(work / kind))
    for tensor in tensors(source.config):
        whole = tensor.weight.from_hf(source.read(tensor), source.config)
        bounds = [(size // 3, max(size // 3 + 1, size - 1)) for size in whole.shape]
        part = read_part(source, tensor, bounds)
        assert part.dtype == whole.dtype
        expected = whole[tuple(slice(*bound) for bound in bounds)]
        np.testing.assert_array_equal(part, expected, err_msg=tensor.name)


def test_of_two_hosts_each_reads_what_its_devices_need(work: Path, tmp_path: Path) -> None:
    """With four devices of eight along `fsdp` a host needs half of each matrix."""
    (tmp_path / "script.py").write_text(
        f"""
import json, sys
import jax
from llamapro_jax import sources
from llamapro_jax.config import MeshConfig
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.launch.processes import joined
from llamapro_jax.model import params
from llamapro_jax.sharding import build_mesh
read, parts = StackedArrays.read, params.read_part
count = {{"from Flax": 0, "asked": 0}}
def reading(self, *arguments):
    array = read(self, *arguments)
    count["from Flax"] += array.nbytes
    return array
def asking(*arguments):
    array = parts(*arguments)
    count["asked"] += array.nbytes
    return array
StackedArrays.read, params.read_part = reading, asking
with joined():
    mesh = build_mesh(MeshConfig(fsdp=8))
    for kind in ("base", "model"):
        count.update({{"from Flax": 0, "asked": 0}})
        source = sources.open_source("{work}/" + kind)
        loaded = params.load_params(source, lambda *_: "float32", mesh)
        print(json.dumps({{
            **count,
            "total": sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)),
            "vectors": sum(leaf.nbytes for leaf in jax.tree.leaves(loaded) if
                leaf.sharding.is_fully_replicated),
        }}))
"""
    )
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env={**local.environment(index, 2, 4, port), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        base, model = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
        for found in (base, model):
            matrices = found["total"] - found["vectors"]
            assert found["vectors"] < matrices / 50
            assert found["asked"] == matrices / 2
        assert base["from Flax"] == 0
        assert model["from Flax"] == model["asked"] + model["vectors"]


# ------------------------------------------------------------------- processes


def arguments(work: Path, output: Path, **changes: Any) -> list[str]:
    """Of `llamapro train`, all settings on the command line."""
    values = settings(work / "model", work / "texts", output) | CHANGES | changes
    config = output.parent / f"{output.name}.yaml"
    config.write_text("{}\n")
    return ["train", str(config), *overrides(values)]


def environment(devices: int, **more: str) -> dict[str, str]:
    given = os.environ.get("XLA_FLAGS", "")  # as the other processes have: bits are compared
    flags = f"{given} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **more}


def command(
    arguments: Sequence[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def in_two(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The command in two processes of four devices."""
    launcher = ["llamapro_jax.launch.local", "--processes", "2", "--devices", "4", "--"]
    return command([*launcher, *arguments], dict(os.environ))


@pytest.fixture(scope="module")
def in_one(work: Path) -> Path:
    """A run in one process of eight devices."""
    done = command(
        ["llamapro_jax.cli", *arguments(work, work / "one", **MESH)], environment(8)
    )
    assert done.returncode == 0, done.stderr
    return work / "one"


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(work: Path, in_one: Path, tmp_path: Path) -> None:
    done = in_two(arguments(work, tmp_path / "two", **MESH))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", in_one, 10)
    # One log, and one process that speaks.
    assert done.stdout.count("compiled the step") == 1
    assert done.stdout.count("of 1,647,616 frozen bits changed") == 1
    assert "[1]" not in done.stderr
    parts = list((tmp_path / "two/checkpoints/10/trainable/new.1.gate").glob("0.*"))
    # D over fsdp, F over tensor, and the copies share the writing: nothing was whole in one place.
    assert len(parts) == 8
    assert json.loads((tmp_path / "two/summary.json").read_text())["frozen_bits_changed"] == 0


def wait_for(condition: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert all(process.poll() is None for process in processes), "ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(
    work: Path, in_one: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "llamapro_jax.cli", *arguments(work, run, **MESH)],
            cwd=ROOT,
            env=local.environment(index, 2, 4, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        metrics = run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"step": 2' in metrics.read_text(), processes)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [42, 42], errors
    assert "stopped, saved at step" in errors[0] and "stopped, saved" not in errors[1]
    [step] = committed_steps(run / "checkpoints")[-1:]
    assert 2 <= step < 10
    assert json.loads((run / f"checkpoints/{step}/meta/metadata").read_text())["step"] == step
    shutil.copytree(run, tmp_path / "elsewhere")
    done = command(["llamapro_jax.cli", *arguments(work, run, **MESH)], environment(8))
    assert done.returncode == 0, done.stderr
    assert f"going on from step {step}" in done.stdout
    assert_same_run(run, in_one, 10)
    # Another mesh, in two processes again: the same losses but for the order of sums.
    done = in_two(arguments(work, tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stderr
    pairs = zip(log_lines(tmp_path / "elsewhere"), log_lines(in_one), strict=True)
    for found, expected in pairs:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": 3}, "mesh: data 3 .* does not fit 8 devices"),
        ({"model": "/nowhere"}, "/nowhere: no such directory"),
    ],
)
def test_bad_input_ends_both_processes_with_one_message(
    work: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    done = in_two(arguments(work, tmp_path / "run", **changes))
    assert done.returncode == 2
    assert len(re.findall(message, done.stderr)) == 1
    assert done.stderr.count("error:") == 1
    assert not (tmp_path / "run").exists()
