"""What a configuration trains, said before the model is on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_tiny
from models import expand_to
from steps import run_config

from llamapro_jax.architecture import described, of_run, published
from llamapro_jax.config import ArchitectureConfig, RunConfig
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import spread
from llamapro_jax.model.weights import total_parameters


@pytest.mark.parametrize(
    ("base", "blocks", "parameters"),
    [
        ("llama2_7b", 0, 6_738_415_616),
        ("llama2_7b", 8, 8_357_482_496),
        ("llama2_13b", 8, 15_553_500_160),
        ("llama2_70b", 8, 75_821_883_392),
        ("mistral_7b", 8, 8_986_628_096),
        ("llama3_8b", 8, 9_775_157_248),
    ],
)
def test_published_models(base: str, blocks: int, parameters: int) -> None:
    assert base in published()
    config, plan = described(ArchitectureConfig(base, blocks))
    assert plan.num_new == blocks
    assert total_parameters(config) == parameters


def test_the_paper_s_plan() -> None:
    _, plan = described(ArchitectureConfig("llama2_7b", 8))
    assert plan.new_depths == (4, 9, 14, 19, 24, 29, 34, 39)


def run_of(model: Path | str, architecture: ArchitectureConfig | None = None) -> RunConfig:
    return replace(run_config(), model=str(model), architecture=architecture)


def test_a_model_on_disk_says_what_it_is(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    grown = expand_to(base, tmp_path / "grown", spread(4, 2))
    config, plan = of_run(run_of(grown))
    assert (config.num_blocks, plan.num_new) == (6, 2)
    # What is described is compared with it.
    for described_as in (ArchitectureConfig(str(base), 2), ArchitectureConfig(str(grown), 0)):
        assert of_run(run_of(grown, described_as)) == (config, plan)


@pytest.mark.parametrize(
    ("blocks", "per_group", "says"),
    [(1, 1, "num_blocks is 6, not 5"), (2, 2, r"stand at \[2, 5\], not at \[4, 5\]")],
)
def test_another_model_than_described(
    tmp_path: Path, blocks: int, per_group: int, says: str
) -> None:
    base = write_tiny(tmp_path / "base")
    grown = expand_to(base, tmp_path / "grown", spread(4, 2))
    with pytest.raises(UserError, match=says):
        of_run(run_of(grown, ArchitectureConfig(str(base / "config.json"), blocks, per_group)))


def test_nothing_is_known_of_the_model() -> None:
    with pytest.raises(UserError, match=r"models/none is not here.*architecture\.base=llama2_13b"):
        of_run(run_of("models/none"))
    with pytest.raises(
        UserError, match=r"architecture\.base: 'llama2-7b' .*Did you mean 'llama2_7"
    ):
        of_run(run_of("models/none", ArchitectureConfig("llama2-7b")))
