"""docs/capacity.md is what its script makes of the results beside it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamapro_jax.machines import parse_machine

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "docs" / "generate_capacity.py"
    spec = importlib.util.spec_from_file_location("generate_capacity", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "devices": 4, "mesh_data": 1, "mesh_fsdp": 4, "mesh_tensor": 1, "mesh_context": 1,
        "parameters": 8_357_482_496, "trainable_parameters": 1_619_066_880,
        "remat": "full", "microbatch": 1, "fits": True,
        "hbm_bytes_per_device": int(15.75 * 2**30), "peak_bytes_per_device": int(15.2 * 2**30),
        "useful_flops_per_token": 38.2814e9, "compiled_matmul_flops_per_token": 45.53e9,
        "collective_bytes_per_step": 6.5e12, "step_seconds_roofline": 283.0,
        "tokens_per_second_per_device_at_50_percent": 1852.0, "days_at_50_percent": 104.2,
        "advice": "",
    }  # fmt: skip
    return values | changes


def test_every_line_is_a_recipe_and_a_machine(script: ModuleType) -> None:
    configs = {path.stem for path in ROOT.glob("configs/*.yaml")}
    others = ("quickstart", "prepare_", "evaluate_")
    assert set(script.LINES) == {name for name in configs if not name.startswith(others)}
    for machines in script.LINES.values():
        assert [parse_machine(name).name for name in machines] == list(machines)


def test_lines(script: ModuleType) -> None:
    results = {
        "llama2_7b_pro v5e-4": result(),
        "llama2_7b_pro v5p-8": result(
            fits=False, peak_bytes_per_device=20 * 2**30, advice="topology=v5p-16"
        ),
        "llama2_7b_pro v6e-8": {"error": "error: data.batch_size: 4 rows do not divide. Take 8."},
    }
    text = script.render(results)
    assert "8.36 B parameters, 1.62 B train; 38.28 GF useful a token." in text
    assert (
        "| v5e-4 | 4 | fsdp 4 | full | 1 | 15.2 of 15.8 | 45.53 | 6,500 | 283.0 | 1,852 | 104.2 |"
    ) in text
    assert "20.0 of 15.8 | does not fit; it does with topology=v5p-16 |" in text
    assert "| v6e-8 | data.batch_size: 4 rows do not divide |" in text
    # Each row of a table has as many cells as its head.
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_the_document_is_up_to_date(script: ModuleType) -> None:
    assert script.TARGET.read_text() == script.render(json.loads(script.RESULTS.read_text()))


def test_time_and_memory_of_the_recipes_are_those_of_the_plans(script: ModuleType) -> None:
    results = json.loads(script.RESULTS.read_text())
    page = (ROOT / "docs" / "recipes.md").read_text()
    table = page.split("| recipe | machine |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 5
    for row in table:
        recipe, machine, peak, seconds, days = (cell.strip(" `") for cell in row.split("|")[1:-1])
        result = results[f"{recipe} {machine}"]
        assert result["fits"]
        gib = (result[f"{name}_bytes_per_device"] / script.GIB for name in ("peak", "hbm"))
        assert peak == "{:.1f} of {:.1f}".format(*gib)
        assert seconds == f"{result['step_seconds_roofline']:.1f}"
        assert days == f"{result['days_at_50_percent']:.1f}"
