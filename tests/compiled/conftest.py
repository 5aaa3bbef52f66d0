"""The environment of the compilers, before anything imports jax: these tests run by themselves."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from llamapro_jax.machines import parse_machine
from llamapro_jax.topology import prepare_environment

HERE = Path(__file__).parent

HAS_TPU = importlib.util.find_spec("libtpu") is not None
HAS_GPU = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
if "jax" not in sys.modules:
    # Of programs for TPUs and GPUs the optimised ones are looked at.
    os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    plain = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(plain, "").strip()
    for installed, machine in ((HAS_TPU, "v5e-4"), (HAS_GPU, "h100-8")):
        if installed:
            prepare_environment(parse_machine(machine))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks these tests `compiled`, and skips those whose compiler is not installed."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.compiled)
        has, extra = (HAS_GPU, "cuda12") if item.path.stem == "test_gpu" else (HAS_TPU, "tpu")
        if not has:
            item.add_marker(pytest.mark.skip(reason=f"needs llamapro_jax[{extra}]"))
