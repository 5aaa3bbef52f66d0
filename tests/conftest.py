"""The environment of the tests, set before anything imports jax, torch or transformers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest
from hypothesis import settings

# Subprocesses inherit these. A user's own choice (a GPU, say) stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs are run a few times, on small arrays, and to compile them takes nearly all of the
# time: two thirds of it for code that is fast. XLA's own passes stay.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # A newer one does not know the flag, and ends every process that has it.
    if version("jaxlib").startswith("0.10."):
        flags = os.environ.get("XLA_FLAGS", "").split()
        plain = "--xla_cpu_use_fusion_emitters=false"
        os.environ["XLA_FLAGS"] = " ".join([plain, *(flag for flag in flags if flag != plain)])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread for torch and BLAS: the test processes already fill the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may depend on the network, whatever the user's environment says.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor leave compiled programs in the user's home. A worker of pytest-xdist has it from the main one.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="llamapro-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# The first example of a property compiles, which takes longer than any deadline.
settings.register_profile("llamapro", deadline=None)
settings.load_profile("llamapro")


def pytest_configure(config: pytest.Config) -> None:
    # By itself pytest-xdist begins with the files of the most tests: those of few long ones are
    # last, and one process is left alone with the very last.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, for processes to end together."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
