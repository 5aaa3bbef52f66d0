"""`llamapro plan`: what it says of a machine, and what it refuses before it compiles."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamapro_jax import cli
from llamapro_jax.architecture import of_run
from llamapro_jax.capacity import assess
from llamapro_jax.capacity_table import count, sections, size
from llamapro_jax.config import RunConfig, load_config
from llamapro_jax.flops import step_flops
from llamapro_jax.machines import CHIPS, Machine, parse_machine

ROOT = Path(__file__).resolve().parent.parent

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Keys of the one flat object that scripts read.
KEYS = {
    "fits", "peak_bytes_per_device", "hbm_bytes_per_device", "useful_flops_per_token",
    "compiled_matmul_flops_per_token", "collective_bytes_per_step", "step_seconds_roofline",
    "tokens_per_second_per_device",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a small model that is not on disk."""
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    values = {
        "model": "models/small",
        "output": "runs/small",
        "architecture": {"base": str(tmp_path / "base.json"), "blocks": 2},
        "compute_dtype": "float32",
        "data": {
            "sequence_length": 128,
            "batch_size": 8,
            "sources": [{"name": "a", "path": "a.txt"}],
        },
        "training": {"steps": 100, "attention": "reference"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_of(config: Path, *overrides: str) -> RunConfig:
    return load_config(config, list(overrides))


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamapro_jax.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_json_of_four_devices(config: Path) -> None:
    result = plan(str(config), "topology=cpu-4", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found) >= KEYS
    assert not any(isinstance(value, dict | list) for value in found.values())
    assert found["fits"] is True
    assert found["devices"] == found["mesh_fsdp"] == 4
    assert found["peak_bytes_per_device"] <= found["hbm_bytes_per_device"]
    run = run_of(config)
    useful = step_flops(*of_run(run), ("new",), 128)
    assert found["useful_flops_per_token"] == useful.total
    # The reference computes all scores, not only those that a query may see.
    assert found["compiled_matmul_flops_per_token"] == useful.linear + 2 * useful.attention
    # A quarter of the frozen weights, and of what trains with its two moments.
    assert 4 * found["new_bytes_per_device"] >= 4 * found["trainable_parameters"]
    assert found["optimizer_bytes_per_device"] >= 2 * found["new_bytes_per_device"]
    parameters = found["parameters"] - found["trainable_parameters"]
    assert found["base_bytes_per_device"] == pytest.approx(parameters, rel=0.05)
    assert found["activation_bytes_per_device"] > 2**20
    assert found["collective_bytes_per_step"] > parameters * 4
    step = found["step_seconds_roofline"]
    assert step == found["step_seconds_compute"] > 0
    assert found["tokens_per_second_per_device"] == pytest.approx(1024 / step / 4)
    assert found["days_at_50_percent"] == pytest.approx(2 * 100 * step / 86400)


def test_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(config)]) == 0
    text = capsys.readouterr().out
    assert "models/small on cpu (1 devices): fits" in text
    for what in ("1,017,472", "295,424 train (29.0%)", "peak", "useful FLOPs a token", "days"):
        assert what in text


def test_a_cpu_with_too_little_memory(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` keeps everything on a CPU; what would fit is tried all the same."""
    monkeypatch.setattr("llamapro_jax.capacity._host_memory", lambda: 30 * 2**20)
    run = run_of(config)
    found = assess(run, *of_run(run), parse_machine("cpu"))
    assert not found.fits and found.run.training.remat == "none"
    assert found.seconds is not None
    assert "training.remat=full training.microbatch=1" in found.advice[0]


@pytest.mark.slow
def test_what_does_not_fit(config: Path) -> None:
    run = run_of(config, "training.remat=full", "training.microbatch=8")
    machine = Machine("small", replace(CHIPS["cpu"], hbm_bytes=20 * 2**20), (1,))
    lines: list[str] = []
    found = assess(run, *of_run(run), machine, lines.append)
    assert not found.fits and found.peak_bytes > found.hbm_bytes == 20 * 2**20
    values = found.as_json()
    assert values["fits"] is False and set(values) >= KEYS
    assert values["missing_bytes_per_device"] == found.peak_bytes - found.hbm_bytes
    assert values["step_seconds_roofline"] is None
    # Smaller microbatches are tried, and found to fit.
    assert "training.microbatch=1" in found.advice[0]
    text = str(sections(found))
    assert "does not fit" in text and "too much" in text and "training.microbatch=1" in text
    assert any("does not fit" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["topology=v5-4"], r"topology: 'v5-4' is not known\. Did you mean 'v5e-4'"),
        (["topology=cpu", "topology=cpu-8"], "topology: is given twice"),
        (["topology=v5e-16", "mesh.fsdp=3"], "mesh: .* does not fit 16 devices"),
        (["topology=v5e-16", "mesh.tensor=3"], "3 does not divide 16"),
        (["topology=2xv5e-16", "mesh.data=1"], "no multiple of the 2 slices"),
        (["topology=cpu-8", "mesh.tensor=8"], "mesh.tensor: 8 does not divide .*heads, "),
        (["topology=cpu-3", "mesh.context=3"], "128 does not divide into 6 chunks"),
        (["topology=v5e-16"], "data.batch_size: 8 rows do not divide over 16 devices"),
        (["topology=cpu-2", "training.microbatch=8"], "training.microbatch: 8 does not divide"),
        (["data.sequence_length=1024"], "was made for at most 512 positions"),
        (["trainable=[new,head,all]"], "'all' stands alone"),
        (["architecture=null"], "model: models/small is not here"),
        (["architecture.blocks=0"], "trainable: 'new' trains the inserted blocks"),
    ],
)
def test_refused_before_anything_is_compiled(
    config: Path,
    overrides: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compiled(*_: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("llamapro_jax.topology.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("llamapro_jax.capacity.Target.compile", compiled)
    monkeypatch.setattr("llamapro_jax.capacity.devices_of", compiled)
    assert cli.main(["plan", str(config), *overrides]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error), error


def test_units() -> None:
    assert [size(n) for n in (512, 2048, 3 * 2**20, 15.75 * 2**30)] == [
        "512 bytes", "2.00 KiB", "3.00 MiB", "15.75 GiB",
    ]  # fmt: skip
    assert [count(n, "B") for n in (7, 1500, 2.5e6, 38.28e9)] == [
        "7 B", "1.50 kB", "2.50 MB", "38.28 GB",
    ]  # fmt: skip
    assert count(None) == "-"
