"""Hub ids, over the layout of huggingface_hub's own cache and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import write_tiny
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from llamapro_jax.convert import convert
from llamapro_jax.errors import UserError
from llamapro_jax.export import export
from llamapro_jax.hf.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def fill(cache: Path, revision: str) -> Path:
    repository = cache / "models--meta-llama--Llama-2-7b-hf"
    snapshot = write_tiny(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(
    ("revision", "hub_id"),
    [("main", "meta-llama/Llama-2-7b-hf"), ("v2", "meta-llama/Llama-2-7b-hf@v2")],
)
def test_a_cached_repository_is_converted(
    cache: Path, tmp_path: Path, revision: str, hub_id: str
) -> None:
    snapshot = fill(cache, revision)
    assert resolve(hub_id) == snapshot
    assert len(convert(hub_id, tmp_path / "flax").tensors) == 39


def test_the_name_on_the_hub_reaches_the_card(cache: Path, tmp_path: Path) -> None:
    fill(cache, "v2")
    convert("meta-llama/Llama-2-7b-hf@v2", tmp_path / "flax")
    export(str(tmp_path / "flax"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: meta-llama/Llama-2-7b-hf\n" in card


def test_another_revision_is_not_taken_for_it(cache: Path) -> None:
    fill(cache, "main")
    with pytest.raises(UserError, match="hub cannot be reached"):
        resolve("meta-llama/Llama-2-7b-hf@v3")


def test_offline_and_not_cached_names_the_commands(cache: Path) -> None:
    with pytest.raises(UserError, match="hf download org/none.*hf auth login"):
        resolve("org/none")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "is gated.*`hf auth login`"),
        (RepositoryNotFoundError, "no such repository.*`hf auth login`"),
        (RevisionNotFoundError, "no revision 'v9'"),
    ],
)
def test_what_the_hub_answers_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Any, message: str
) -> None:
    def answer(*args: Any, **options: Any) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(UserError, match=message):
        resolve("org/name@v9")


@pytest.mark.parametrize("path", ["./missing", "/missing", "missing", "a/b/c"])
def test_a_missing_directory_is_no_hub_id(path: str) -> None:
    with pytest.raises(UserError, match="no such directory"):
        resolve(path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; name the directory"):
        resolve(str(tmp_path / "model.safetensors"))
