"""What is checked and prepared before a run begins: `llamapro_jax.training.setup`."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import digests, run_config, write_model, write_texts

from llamapro_jax.errors import UserError
from llamapro_jax.training import setup
from llamapro_jax.training.lease import Lease
from llamapro_jax.training.loop import train
from llamapro_jax.training.run_files import RunFiles
from llamapro_jax.training.stopping import Stopped


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expanded model and texts."""
    directory = tmp_path_factory.mktemp("setup")
    write_model(directory)
    write_texts(directory / "texts")
    return directory


def config_of(work: Path, output: Path, **changes: Any) -> Any:
    return run_config(work / "model", work / "texts", output, **changes)


def prepared(work: Path, output: Path, **changes: Any) -> setup.Data:
    with Lease() as lease:
        return setup.prepare(config_of(work, output, **changes), lease, RunFiles(output)).data


# ------------------------------------------------------------------- bad input


def fails(output: Path, config: Any, message: str) -> None:
    """Refused, and nothing left behind."""
    around = set(output.parent.iterdir())
    with pytest.raises(UserError, match=message):
        train(config)
    assert set(output.parent.iterdir()) == around


def test_bad_input_is_refused_and_leaves_nothing(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model, texts = work / "model", work / "texts"
    missing = run_config(tmp_path / "none", texts, run)
    fails(run, missing, "none: no such directory")
    base = run_config(work / "base", texts, run)
    fails(run, base, "'new' trains the inserted blocks, and this model has none.*llamapro expand")
    long = run_config(model, texts, run, data__sequence_length=65)
    fails(run, long, "data.sequence_length is 65.*at most 64 positions")
    no_text = run_config(model, tmp_path / "texts", run)
    fails(run, no_text, "data.sources.words: .*train.txt: no such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"caf\xe9", "is not UTF-8.*byte 3")],
    ids=["empty", "not UTF-8"],
)
@pytest.mark.parametrize("name", ["train", "held"])
def test_bad_text_is_refused_and_leaves_nothing(
    work: Path, tmp_path: Path, content: bytes, message: str, name: str
) -> None:
    texts = tmp_path / "texts"
    write_texts(texts)[name].write_bytes(content)
    fails(tmp_path / "run", run_config(work / "model", texts, tmp_path / "run"), message)


def test_text_for_a_model_without_a_tokenizer_is_refused(work: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(work / "model", model, ignore=shutil.ignore_patterns("*token*"))
    fails(tmp_path / "run", run_config(model, work / "texts", tmp_path / "run"), "has none")


def test_a_directory_that_is_no_run_is_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    fails(tmp_path / "run", config_of(work, tmp_path / "run"), "run: is not empty")
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


# ------------------------------------------------------------------- another process, and a stop


def test_of_two_new_runs_in_one_directory_the_second_is_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    prepared(work, other)
    before = digests(other)
    open_data = setup.open_data

    def overtaken(*arguments: Any) -> Any:
        other.rename(run)
        return open_data(*arguments)

    monkeypatch.setattr(setup, "open_data", overtaken)
    with pytest.raises(UserError, match="run: another process trains here"):
        train(config_of(work, run))
    assert digests(run) == before
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_signal_ends_the_preparation_at_once(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def slow(*_: Any) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    monkeypatch.setattr(setup, "open_data", slow)
    with pytest.raises(Stopped, match="stopped while it was prepared") as stopped:
        train(config_of(work, tmp_path / "run"))
    assert stopped.value.status == status
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- settings and their effect


def test_the_cache_directory_has_the_texts(work: Path, tmp_path: Path) -> None:
    prepared(work, tmp_path / "run", data__cache_directory=str(tmp_path / "cache"))
    assert not (tmp_path / "run" / "data").exists()
    names = {entry.name.partition("-")[0] for entry in (tmp_path / "cache").iterdir()}
    assert names == {"train", "old", "held"}


def test_the_seed_orders_the_rows(work: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first, again, other = (
        prepared(work, tmp_path / name, seed=seed, data__cache_directory=cache)
        .mixture.batch(0)["tokens"]
        .tobytes()
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other


def test_split_and_weight_choose_the_rows(work: Path, tmp_path: Path) -> None:
    texts = work / "texts"
    sources = [
        {"name": "much", "path": str(texts / "train.txt"), "weight": 3, "split": "train[:10%]"},
        {"name": "little", "path": str(texts / "old.txt")},
    ]
    held = [
        {"name": "rest", "path": str(texts / "train.txt"), "split": "train[10%:]"},
        {"name": "held", "path": str(texts / "held.txt")},
    ]
    data = prepared(work, tmp_path / "run", data__sources=sources, data__eval=held)
    steps = [data.mixture.batch(step) for step in range(100)]
    chosen = np.concatenate([batch["source"] for batch in steps])
    assert np.bincount(chosen).tolist() == [300, 100]
    rows = json.loads(next((tmp_path / "run/data").glob("train-*/fingerprint.json")).read_text())
    trained = np.concatenate([batch["tokens"] for batch in steps])[chosen == 0]
    distinct = {row.tobytes() for row in trained}
    rest = data.held_out["rest"]
    held_out = {rest[i]["tokens"].tobytes() for i in range(len(rest))}
    assert len(distinct) == rows["rows"] - len(rest) < rows["rows"] / 5
    assert not distinct & held_out


def test_an_attention_that_cannot_run_here_stops_before_anything_is_written(
    work: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="attention: 'splash' cannot run here"):
        prepared(work, tmp_path / "run", training__attention="splash")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------- what another process opens


def told_by_first(work: Path, output: Path) -> tuple[Any, dict[str, Any]]:
    """The configuration, and what process 0 tells the others of the run that it prepared."""
    config = config_of(work, output)
    with Lease() as lease:
        first = setup.prepare(config, lease, RunFiles(config.output))
    (output / setup.START_FILE).write_text("this start")
    rows = {where: (rows.path, rows.split) for where, rows in first.data.rows.items()}
    return config, {"token": "this start", "resume_step": None, "rows": rows}


def test_another_process_opens_what_the_first_prepared(work: Path, tmp_path: Path) -> None:
    config, told = told_by_first(work, tmp_path / "run")
    before = digests(tmp_path / "run")
    other = setup._follow(config, RunFiles(config.output), told)
    with Lease() as lease:
        first = setup.prepare(config, lease, RunFiles(config.output))
    assert digests(tmp_path / "run") == before
    assert other.record == first.record and other.data.fingerprints == first.data.fingerprints
    for name, array in first.data.mixture.batch(3).items():
        np.testing.assert_array_equal(other.data.mixture.rows(3, 1, 3)[name], array[1:3])
    assert list(other.data.held_out) == ["old", "held"]


def test_a_process_that_does_not_see_the_run_directory_says_so(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "SEEN_WITHIN", 0.3)
    config, told = told_by_first(work, tmp_path / "run")
    with pytest.raises(UserError, match="process 0 wrote into it, and this process does not see"):
        setup._follow(config, RunFiles(config.output), {**told, "token": "another start"})
    shutil.rmtree(tmp_path / "run/data")
    with pytest.raises(UserError, match="data.sources.words: process 0 prepared its"):
        setup._follow(config, RunFiles(config.output), told)
