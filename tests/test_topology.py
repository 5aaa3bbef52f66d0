"""What the compilers need before jax is imported, and what a user hears when one is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llamapro_jax import topology
from llamapro_jax.errors import UserError
from llamapro_jax.machines import CHIPS, parse_machine
from llamapro_jax.topology import devices_of, prepare_environment

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that `prepare_environment` writes to; every compiler is installed."""
    values: dict[str, str] = {"JAX_PLATFORMS": "tpu"}
    monkeypatch.setattr(os, "environ", values)
    monkeypatch.setattr("llamapro_jax.topology.importlib.util.find_spec", lambda name: object())
    return values


def test_of_a_tpu(environment: dict[str, str]) -> None:
    environment["TPU_WORKER_ID"] = "3"
    prepare_environment(parse_machine("v5e-4"))
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["TPU_SKIP_MDS_QUERY"] == environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert environment["TPU_WORKER_ID"] == "3"  # A user's own stays.


def test_of_a_gpu(environment: dict[str, str]) -> None:
    environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=4 --xla_dump_to=here"
    prepare_environment(parse_machine("h100-8"))
    assert environment["XLA_FLAGS"] == "--xla_dump_to=here --xla_gpu_autotune_level=0"
    assert environment["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(("machine", "extra"), [("v5e-4", "tpu"), ("h100-8", "cuda12")])
def test_a_compiler_that_is_not_installed(
    machine: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamapro_jax.topology.importlib.util.find_spec", lambda name: None)
    before = dict(os.environ)
    with pytest.raises(UserError, match=rf"topology: {machine}: needs .*llamapro_jax\[{extra}\]"):
        prepare_environment(parse_machine(machine))
    assert dict(os.environ) == before


def test_more_cpus_than_jax_has() -> None:
    assert devices_of(parse_machine("cpu")) == jax.devices("cpu")[:1]
    more = jax.device_count("cpu") + 1
    with pytest.raises(UserError, match=rf"force_host_platform_device_count={more} before"):
        devices_of(parse_machine(f"cpu-{more}"))


def test_cpus_as_many_as_asked_for() -> None:
    """The modules that are imported before the environment is set must not import jax."""
    code = (
        "import sys; from llamapro_jax.machines import parse_machine; "
        "from llamapro_jax.topology import devices_of, prepare_environment; "
        "import llamapro_jax.verbs.plan, llamapro_jax.config; machine = parse_machine('cpu-3'); "
        "prepare_environment(machine); assert 'jax' not in sys.modules; "
        "print(len(devices_of(machine)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "3", result.stderr


def test_every_gpu_is_described() -> None:
    gpus = [chip for chip in CHIPS.values() if chip.platform == "gpu"]
    assert {chip.name for chip in gpus} == set(topology._CARDS)
    for chip in gpus:
        text = topology._TARGET.format(**topology._CARDS[chip.name])
        assert text.count("{") == text.count("}")
        # What a program gets is less than what the driver reports.
        assert chip.hbm_bytes < topology._CARDS[chip.name]["memory"]
