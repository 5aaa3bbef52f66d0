"""Checkpoints of every number of processes and devices, restored on every other.

Twelve groups of processes are started once each. Each saves, one group after the other; when all
have, each reads what all of them saved. A group that waits costs nothing but its memory.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from steps import PLANS, model_config, run_config

from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.checkpoint_files import ITEMS, committed_steps
from llamapro_jax.checkpoint_restore import abstract, restore_newest
from llamapro_jax.config import MeshConfig
from llamapro_jax.launch import local
from llamapro_jax.launch.processes import joined, settled
from llamapro_jax.launch.surroundings import free_port
from llamapro_jax.model.params import abstract_params
from llamapro_jax.optimizer import build_optimizer
from llamapro_jax.sharding import build_mesh, check_model
from llamapro_jax.training.state import dtype_of, init_state, labels, leaves_by_path, partition

# Processes, and devices of each: with that also 1, 2, 4 and 8 devices in all, and up to 32.
LAYOUTS = [(processes, devices) for processes in (1, 2, 4) for devices in (1, 2, 4, 8)]
STEP = 5
PLAN = PLANS["2 of 4"]
CONFIG = model_config(PLAN, vocab_size=64, hidden_size=32, head_dim=8)
RUN = run_config(("new", "embed"))
# Seconds that a group may take for its part.
PATIENCE = 300


# ------------------------------------------------------------------- in the processes


def member(ours: Connection, environment: dict[str, str], directory: Path, writer: int) -> None:
    """A process of a group: saves when it starts, and reads when it is told to."""
    os.environ.update(environment)
    processes, devices = LAYOUTS[writer]
    tensor = min(2, devices)  # leaves are cut in two directions where there are devices for it
    with joined():
        mesh = build_mesh(MeshConfig(fsdp=processes * devices // tensor, tensor=tensor))
        check_model(CONFIG, mesh.shape)
        with jax.set_mesh(mesh):
            wanted = dict(zip(ITEMS, abstract(begin(mesh)), strict=True))
            with Checkpoints(directory / str(writer), 2) as checkpoints:
                trees = (filled(writer, item, wanted[item]) for item in ITEMS)
                checkpoints.save(STEP, *trees, {"writer": writer})
            ours.send((jax.process_count(), jax.device_count(), cut(wanted)))
            for other in ours.recv():
                ours.send(list(problems(directory / str(other), other, wanted)))
            ours.recv()


def begin(mesh: Mesh) -> tuple[Any, Any]:
    """What a run of this model trains, and its optimizer's state, laid out as a run has them."""
    dtypes = dtype_of(RUN.trainable, RUN.compute_dtype)
    params = filled(0, "params", abstract_params(CONFIG, PLAN, dtypes, mesh))
    optimizer = build_optimizer(RUN.optimizer, RUN.training.steps, labels(params, RUN.trainable))
    state = settled(init_state(*partition(params, RUN.trainable), optimizer))
    return state.trainable, state.opt_state


def bits(writer: int, item: str, path: str, like: Any) -> np.ndarray:
    """What a writer saves in a leaf: any bits at all, NaN and minus zero among them."""
    draw = np.random.default_rng([writer, *f"{item} {path}".encode()])
    raw = draw.bytes(like.size * like.dtype.itemsize)
    return np.frombuffer(raw, like.dtype).reshape(like.shape)


def filled(writer: int, item: str, tree: Any) -> Any:
    """The tree of shapes and shardings as arrays, of which each process makes its parts."""

    def one(path: str, like: Any) -> jax.Array:
        array = bits(writer, item, path, like)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda at: array[at])

    made = [one(path, like) for path, like in leaves_by_path(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), made)


def cut(wanted: Any) -> int:
    """How many leaves no device has the whole of."""
    return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(wanted))


def problems(directory: Path, writer: int, wanted: dict[str, Any]) -> Iterator[str]:
    """What of a writer's step does not come back as it was saved, to this process's devices."""
    aside: list[Any] = []
    found = restore_newest(directory, *wanted.values(), lambda *told: aside.append(told))
    if found is None or (found.step, found.meta["writer"], aside) != (STEP, writer, []):
        yield f"found {found and found.meta}, set aside {aside}"
        return
    for item, want in wanted.items():
        leaves = leaves_by_path(getattr(found, item))
        for path, like in leaves_by_path(want).items():
            yield from differences(
                f"{item} {path}", leaves[path], like, bits(writer, item, path, like)
            )
            if like.size > 1 and not any(
                differences(path, leaves[path], like, bits(writer + 1, item, path, like))
            ):
                yield f"{item} {path}: would pass with another writer's bits"


def differences(name: str, leaf: jax.Array, like: Any, saved: np.ndarray) -> Iterator[str]:
    if (leaf.shape, leaf.dtype, leaf.sharding) != (like.shape, like.dtype, like.sharding):
        yield f"{name}: came back as {leaf.dtype}{leaf.shape}, {leaf.sharding}"
    for part in leaf.addressable_shards:
        if np.asarray(part.data).tobytes() != saved[part.index].tobytes():
            yield f"{name}: other bits at {part.index}"


# ------------------------------------------------------------------- the groups


class Group:
    """The processes of one layout."""

    def __init__(self, context: Any, writer: int, directory: Path) -> None:
        self.members: list[tuple[Connection, BaseProcess]] = []
        processes, devices = LAYOUTS[writer]
        port = free_port()
        for index in range(processes):
            theirs, ours = context.Pipe()
            environment = local.environment(index, processes, devices, port, {})
            arguments = (ours, environment, directory, writer)
            process = context.Process(target=member, args=arguments, daemon=True)
            process.start()
            ours.close()
            self.members.append((theirs, process))

    def tell(self, what: Any) -> None:
        for connection, _ in self.members:
            connection.send(what)

    def hear(self) -> list[Any]:
        """The next word of each process; EOFError when one has died."""
        heard = []
        for connection, _ in self.members:
            assert connection.poll(PATIENCE), "a process of the group is silent"
            heard.append(connection.recv())
        return heard

    def end(self) -> list[int | None]:
        self.tell(None)
        for _, process in self.members:
            process.join(PATIENCE)
        return [process.exitcode for _, process in self.members]


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    made: list[Group] = []
    yield made
    for group in made:
        for _, process in group.members:
            process.kill()


def started(groups: list[Group], directory: Path, layouts: Sequence[int]) -> None:
    # Forked from a process that has imported all, which takes seconds, and started no device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llamapro_jax.training.beginning", "llamapro_jax.checkpoint"])
    for writer in layouts:
        groups.append(Group(context, writer, directory))
        processes, devices = LAYOUTS[writer]
        for heard in groups[-1].hear():
            assert heard[:2] == (processes, processes * devices)
            assert (heard[2] > 20) == (processes * devices > 1)
        assert committed_steps(directory / str(writer)) == [STEP]


@pytest.mark.slow
def test_what_any_layout_saves_every_layout_restores(tmp_path: Path, groups: list[Group]) -> None:
    layouts = range(len(LAYOUTS))
    started(groups, tmp_path, layouts)
    found = {}
    for reader in layouts:
        groups[reader].tell(layouts)
        for writer in layouts:
            for process, problems in enumerate(groups[reader].hear()):
                found[LAYOUTS[writer], LAYOUTS[reader], process] = problems
        assert set(groups[reader].end()) == {0}
    assert len(found) == 12 * 4 * (1 + 2 + 4)
    assert {where: problems for where, problems in found.items() if problems} == {}
