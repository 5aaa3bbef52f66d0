from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_tiny

from llamapro_jax import cli
from llamapro_jax.checkpoint import Checkpoints
from llamapro_jax.errors import UserError
from llamapro_jax.expand import expand
from llamapro_jax.export import export
from llamapro_jax.files import write_json
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.hf.config import render
from llamapro_jax.model.params import load_params
from llamapro_jax.model.weights import Tensor, tensors
from llamapro_jax.sinks import copy, lineage_entry
from llamapro_jax.sources import Source, compute_fingerprint, open_source
from llamapro_jax.training.run_directory import RunRecord, RunSource, is_run, open_run
from llamapro_jax.training.state import dtype_of, partition, trains


def write_run(
    directory: Path, model: Path, spec: tuple[str, ...] = ("new",), steps: tuple[int, ...] = (5,)
) -> dict[str, Any]:
    """A run as training leaves it, whose trained weights are `model`'s plus 1/7 of the step."""
    source = open_source(str(model), masters=True)
    directory.mkdir(parents=True)
    lineage = (*source.lineage, lineage_entry("train", source, trainable=list(spec), steps=99))
    digest = source.fingerprint().digest
    config = render(source.hf_config, source.config, source.plan, "bfloat16", lineage)
    write_json(directory / "config.json", config)
    RunRecord(str(model), digest, spec, lineage).write(directory)
    trainable, _ = partition(load_params(source, dtype_of(spec, jnp.float32)), spec)
    with Checkpoints(directory / "checkpoints", keep=9) as checkpoints:
        for step in steps:
            moved = _moved(trainable, step)
            checkpoints.save(step, moved, {"count": jnp.ones(())}, {})
    return moved


def _moved(tree: Any, step: int) -> Any:
    import jax

    return jax.tree.map(lambda leaf: leaf + np.float32(step / 7), tree)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bfloat16 model of unequal groups: its plan has a prefix, runs of groups and a tail."""
    directory = tmp_path_factory.mktemp("model")
    write_tiny(directory / "base", dtype=ml_dtypes.bfloat16, num_hidden_layers=5)
    expand(
        str(directory / "base"), directory / "grown", positions=[1, 3, 4], to="flax", prove=False
    )
    yield directory / "grown"


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    write_run(tmp_path / "run", model)
    return tmp_path / "run"


def trained_names(source: Source, spec: tuple[str, ...]) -> set[str]:
    new = set(source.plan.new_depths)

    def stack(tensor: Tensor) -> str:
        return "outer" if tensor.block is None else "new" if tensor.block in new else "base"

    return {t.name for t in tensors(source.config) if trains(spec, stack(t), t.weight)}


@pytest.mark.parametrize("spec", [("new",), ("new", "embed", "norms"), ("all",)])
def test_trained_tensors_come_from_the_checkpoint_and_the_rest_from_the_model(
    model: Path, tmp_path: Path, spec: tuple[str, ...]
) -> None:
    write_run(tmp_path / "run", model, spec)
    base = open_source(str(model))
    stored, masters = open_run(tmp_path / "run"), open_run(tmp_path / "run", masters=True)
    assert is_run(tmp_path / "run") and not is_run(model)
    assert (stored.config, stored.plan) == (base.config, base.plan)
    trained = trained_names(base, spec)
    assert 0 < len(trained) <= len(list(tensors(base.config)))
    for tensor in tensors(base.config):
        before = base.read(tensor)
        if tensor.name not in trained:
            assert stored.read(tensor).tobytes() == before.tobytes(), tensor.name
            assert masters.read(tensor).tobytes() == before.tobytes()
            continue
        expected = before.astype(np.float32) + np.float32(5 / 7)
        assert masters.dtype(tensor) == masters.read(tensor).dtype == np.float32
        assert np.array_equal(masters.read(tensor), expected), tensor.name
        assert stored.dtype(tensor) == before.dtype
        assert stored.read(tensor).tobytes() == expected.astype(before.dtype).tobytes()


def test_a_run_opens_like_any_model_and_copies(run: Path, tmp_path: Path) -> None:
    source = open_source(str(run))
    copy(source, tmp_path / "flax", "flax", lineage=source.lineage, progress=False)
    again = open_source(str(tmp_path / "flax"))
    assert again.plan == source.plan
    assert again.fingerprint().digest == compute_fingerprint(source).digest


def test_the_fingerprint_is_that_of_the_stored_dtypes(run: Path) -> None:
    expected = compute_fingerprint(open_run(run))
    assert open_run(run).fingerprint() == expected
    assert open_run(run, masters=True).fingerprint() == expected


def test_the_newest_step_unless_another_is_named(model: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", model, steps=(3, 9))
    assert open_run(tmp_path / "run").step == 9
    third = open_run(tmp_path / "run", step=3)
    assert third.lineage[-1]["steps"] == 3 and third.lineage[-1]["trainable"] == ["new"]
    with pytest.raises(UserError, match="no checkpoint of step 4; it has 3, 9"):
        open_run(tmp_path / "run", step=4)


def test_a_run_on_a_run(run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "second", run)
    first, second = open_run(run, masters=True), open_run(tmp_path / "second", masters=True)
    for tensor in tensors(first.config):
        moved = np.float32(5 / 7) if tensor.block in first.plan.new_depths else 0
        assert np.array_equal(second.read(tensor), first.read(tensor) + moved), tensor.name
    assert [entry["verb"] for entry in second.lineage] == ["expand", "train", "train"]
    # The first run trains on: the second one no longer stands on what it began from.
    with Checkpoints(run / "checkpoints", keep=9) as checkpoints:
        source = open_run(run, masters=True)
        trainable, _ = partition(load_params(source, dtype_of(("new",), jnp.float32)), ("new",))
        checkpoints.save(6, _moved(trainable, 1), {"count": jnp.ones(())}, {})
    with pytest.raises(UserError, match="another one than the run began from"):
        open_run(tmp_path / "second")


def test_a_value_too_large_for_the_base_is_an_error(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", dtype=np.float16)
    expand(str(tmp_path / "base"), tmp_path / "model", blocks=1, to="flax", prove=False)
    write_run(tmp_path / "run", tmp_path / "model", steps=(7 * 70_000,))
    tensor = next(t for t in tensors(open_run(tmp_path / "run").config) if t.block == 4)
    with pytest.raises(UserError, match="does not fit into float16"):
        open_run(tmp_path / "run").read(tensor)
    assert open_run(tmp_path / "run", masters=True).read(tensor).max() > 60_000


# ------------------------------------------------------------------- what is missing or wrong


def test_a_missing_model_is_named_with_the_file_that_says_where(run: Path) -> None:
    values = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**values, "model": "/gone/away"})
    with pytest.raises(UserError, match=r"run\.json: model /gone/away is missing"):
        open_run(run)


def test_another_model_in_its_place_is_refused(run: Path, model: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", dtype=ml_dtypes.bfloat16, num_hidden_layers=5, seed=1)
    other = tmp_path / "other"
    expand(str(tmp_path / "base"), other, positions=[1, 3, 4], to="flax", prove=False)
    values = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**values, "model": str(other)})
    with pytest.raises(UserError, match="another one than the run began from: its digest is"):
        open_run(run)


def test_a_run_without_a_checkpoint_says_so(run: Path) -> None:
    (run / "checkpoints/5/commit_success.txt").unlink()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        open_run(run)


def test_a_lost_leaf_never_falls_back_to_the_base(run: Path) -> None:
    leaf = next((run / "checkpoints/5/trainable").glob("new.*.gate"))
    shutil.rmtree(leaf)
    with pytest.raises(UserError, match=rf"damaged \(trainable {leaf.name}: cannot be read"):
        open_run(run)


@pytest.mark.parametrize("masters", [False, True])
def test_a_flipped_bit_is_not_handed_on(run: Path, tmp_path: Path, masters: bool) -> None:
    """Where it decompresses to another value: of an array that is stored as it is."""
    step = run / "checkpoints/5"
    leaf = next((step / "trainable").glob("new.*.gate"))
    layout = json.loads((leaf / ".zarray").read_text())
    arrays = StackedArrays(leaf.parent)
    whole = arrays.read(leaf.name)
    for file in leaf.glob("[0-9]*"):
        file.unlink()
    (leaf / ".zarray").write_text(
        json.dumps({**layout, "chunks": list(whole.shape), "compressor": None})
    )
    data = bytearray(np.ascontiguousarray(whole).tobytes())
    file = leaf / ".".join("0" * whole.ndim)
    file.write_bytes(data)
    copy(open_run(run, masters), tmp_path / "clean", "flax", lineage=(), progress=False)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged \(trainable {leaf.name}: its checksum is not"):
        copy(open_run(run, masters), tmp_path / "copy", "flax", lineage=(), progress=False)
    assert not (tmp_path / "copy").exists()
    [tensor] = [t for t in tensors(open_run(run).config) if t.name == "model.norm.weight"]
    open_run(run).read(tensor)  # what did not train is not the checkpoint's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not the description of a llamapro_jax run"),
        ({"version": 2}, "has version 2; this release reads 1"),
        ({"trainable": None}, "is malformed"),
    ],
)
def test_a_run_file_of_another_kind_is_refused(
    run: Path, change: dict[str, Any], message: str
) -> None:
    values = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**values, **change})
    with pytest.raises(UserError, match=message):
        open_run(run)


# ------------------------------------------------------------------- what an export proves


def test_an_export_says_how_many_frozen_bits_it_has(
    run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    source = open_run(run)
    frozen = [t for t in tensors(source.config) if source.address(t) is None]
    bits = sum(8 * source.read(tensor).nbytes for tensor in frozen)
    assert 0 < len(frozen) < len(list(tensors(source.config)))
    assert f"0 of {bits:,} frozen bits changed" in capsys.readouterr().out
    # Of another dtype, and of what is no run, that cannot be said.
    assert export(str(run), tmp_path / "cast", dtype="float32").frozen_bits is None
    assert export(str(model), tmp_path / "model").frozen_bits is None


def test_an_export_with_a_frozen_bit_changed_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(source: RunSource, tensor: Tensor) -> np.ndarray:
        array = read(source, tensor)
        if tensor.name == "model.embed_tokens.weight":
            array = array.copy()
            array.view(np.uint16)[3, 5] ^= 1
        return array

    read = RunSource.read
    monkeypatch.setattr(RunSource, "read", flipped)
    with pytest.raises(UserError, match="1 of the .* did not train .* model.embed_tokens.weight"):
        export(str(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()
