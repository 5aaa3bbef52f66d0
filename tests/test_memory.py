"""The verbs that copy a model do so in memory that does not grow with the number of blocks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benchmark_modules import ROOT, load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc"),
]

FEW, MANY = 2, 26
# Width 512: a block of 6.3 MB.
SHRINK = 8
# The share of what the larger model has more that may show. The noise of the allocators of
# several threads was up to 0.4; a verb that held the model would show more than 0.9.
ALLOWED = 0.6

CLI = [sys.executable, "-m", "llamapro_jax.cli"]
HOLD_ALL = """\
import sys, time
import numpy as np
from llamapro_jax.model.weights import tensors
from llamapro_jax.sources import open_source
source = open_source(sys.argv[1])
held = [np.array(source.read(tensor)) for tensor in tensors(source.config)]
time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    module = load("convert_7b")
    module.SAMPLE_SECONDS = 0.01
    return module


@pytest.fixture(scope="module")
def models(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of blocks -> a directory with that model as `source`."""
    directories = {blocks: tmp_path_factory.mktemp(f"blocks-{blocks}") for blocks in (FEW, MANY)}
    for blocks, directory in directories.items():
        values = benchmark.architecture(blocks, SHRINK)
        benchmark.write_checkpoint(directory / "source", values)
    return directories


def growth(
    benchmark: ModuleType, models: dict[int, Path], command: Callable[[Path], list[str]]
) -> float:
    """How much more memory the command takes for the larger model, as a share of its own size."""
    peaks, sizes = {}, {}
    for blocks, directory in models.items():
        peaks[blocks] = benchmark.run_sampled(command(directory))
        files = (directory / "source").glob("*.safetensors")
        sizes[blocks] = sum(file.stat().st_size for file in files)
    return (peaks[MANY] - peaks[FEW]) / (sizes[MANY] - sizes[FEW])


def test_no_verb_holds_the_model(benchmark: ModuleType, models: dict[int, Path]) -> None:
    # One after the other: each reads what the one before has written.
    for verb, read, options in (
        ("convert", "source", []),
        ("expand", "convert", ["--blocks", "2"]),
        ("export", "expand", []),
    ):

        def command(
            directory: Path, verb: str = verb, read: str = read, options: list[str] = options
        ) -> list[str]:
            return [*CLI, verb, str(directory / read), str(directory / verb), *options]

        assert growth(benchmark, models, command) < ALLOWED, verb


def test_a_model_held_whole_shows(benchmark: ModuleType, models: dict[int, Path]) -> None:
    def command(directory: Path) -> list[str]:
        return [sys.executable, "-c", HOLD_ALL, str(directory / "source")]

    assert growth(benchmark, models, command) > 0.9


def test_mapped_files_are_not_counted_and_children_are(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    size = 64 * 2**20
    (tmp_path / "file").write_bytes(bytes(size))
    mapped = (
        "import sys, numpy as np; m = np.memmap(sys.argv[1], np.uint8, 'r'); m.max(); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    owned = mapped.replace("np.memmap(sys.argv[1], np.uint8, 'r')", f"np.ones({size}, np.uint8)")
    below = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]])"
    )
    sizes = []
    for code, extra in ((mapped, []), (owned, []), (below, [owned])):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "file"), *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            sizes.append(benchmark.anonymous_bytes(process.pid))
            process.communicate()
    few, many, tree = np.asarray(sizes) / size
    assert few < 0.9
    assert 0.95 < many - few < 1.05
    assert tree > many
