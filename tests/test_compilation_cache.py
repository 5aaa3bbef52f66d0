from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from runs import overrides, run_config, settings, write_model, write_texts

from llamapro_jax import compilation_cache
from llamapro_jax.compilation_cache import AUTO, default_directory, directory, enabled, processor
from llamapro_jax.errors import UserError
from llamapro_jax.launch.local import environment
from llamapro_jax.launch.surroundings import free_port
from llamapro_jax.training import loop

ROOT = Path(__file__).parents[1]

# Stops after a step, and counts the programs that XLA compiled and those that the cache had.
TRAIN = """
import collections, json, os, signal, sys
import jax
from llamapro_jax import cli
from llamapro_jax.metrics import MetricsWriter

write, counts = MetricsWriter.write, collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: counts.update([event]))

def patched(self, kind, step, **values):
    record = write(self, kind, step, **values)
    if (kind, step) == ("train", int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGTERM)
    return record

MetricsWriter.write = patched
status = cli.main(["train", *sys.argv[2:]])
taken = counts["/jax/compilation_cache/cache_hits"]
compiled = counts["/jax/core/compile/backend_compile_duration"] - taken
print(json.dumps({"status": status, "compiled": compiled, "taken": taken}))
"""


def train(cache: Path, stop: int, arguments: list[str]) -> dict[str, int]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN, str(stop), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_resumed_run_compiles_nothing(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_texts(tmp_path / "texts")
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    run = settings(tmp_path / "model", tmp_path / "texts", tmp_path / "run")
    arguments = [str(config), *overrides(run)]
    cache = tmp_path / "cache"

    first = train(cache, 2, arguments)
    # It takes what it compiled itself: checksums are asked for in two precisions of products.
    assert first["status"] == 42 and first["compiled"] > 3 >= first["taken"]
    resumed = train(cache, 0, arguments)
    assert resumed["status"] == 0 and resumed["compiled"] == 0 and resumed["taken"] > 3


@pytest.mark.parametrize("setting", [None, "auto"])
def test_a_run_has_the_cache_of_its_setting(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stop(setting: str | None) -> Any:
        asked.append(setting)
        raise InterruptedError

    monkeypatch.setattr(loop, "compilation_cache", stop)
    run = run_config(tmp_path / "model", tmp_path, tmp_path / "run", compilation_cache=setting)
    with pytest.raises(InterruptedError):
        loop.train(run)
    assert asked == [setting]


# ------------------------------------------------------------------- within a process


def program(number: float) -> Any:
    return jax.jit(lambda x: x * number + 1)(jnp.arange(3.0))


def entries(place: str | Path) -> list[Path]:
    return sorted(Path(place).rglob("*-cache"))


def test_programs_are_kept_while_it_is_entered_and_no_longer(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    with enabled(str(tmp_path / "a")) as place:
        assert place == str(tmp_path / "a" / processor())
        program(1.5)
        kept = len(entries(tmp_path))
        assert kept > 0
    assert jax.config.jax_compilation_cache_dir == before
    program(2.5)
    assert len(entries(tmp_path)) == kept
    with enabled(str(tmp_path / "b")):
        program(3.5)
    assert len(entries(tmp_path / "a")) == kept and entries(tmp_path / "b")
    with enabled(None) as place:
        assert place is None
        program(4.5)
    assert len(entries(tmp_path / "a")) == kept


def test_a_program_that_was_cut_short_is_compiled_anew(tmp_path: Path) -> None:
    with enabled(str(tmp_path)):
        expected = program(5.5)
    for entry in entries(tmp_path):
        entry.write_bytes(entry.read_bytes()[:-7])
    jax.clear_caches()
    with enabled(str(tmp_path)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert jnp.array_equal(program(5.5), expected)
    assert any("Error reading persistent compilation cache" in str(w.message) for w in caught)


def test_what_jax_has_comes_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
        with enabled(AUTO) as place:
            assert place == str(tmp_path / "jax" / processor())
            with enabled(AUTO) as inner:
                assert inner == place
        with enabled(str(tmp_path / "named")) as place:
            assert place == str(tmp_path / "named" / processor())
        jax.config.update("jax_compilation_cache_dir", None)
        with enabled(AUTO) as place:
            assert place == str(tmp_path / "home" / "llamapro_jax" / "xla" / processor())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# ------------------------------------------------------------------- the directory


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_directory({"XDG_CACHE_HOME": "/x"}) == "/x/llamapro_jax/xla"
    monkeypatch.setenv("HOME", "/somewhere")
    assert default_directory({}) == "/somewhere/.cache/llamapro_jax/xla"


def test_the_directory_is_its_owners_alone(tmp_path: Path) -> None:
    place = directory(str(tmp_path / "cache"))
    assert place is not None and Path(place).stat().st_mode & 0o077 == 0


CPUINFO = """\
processor\t: {processor}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
cpu MHz\t\t: {mhz}
flags\t\t: fpu {flags}

processor\t: 1
flags\t\t: nothing
"""


def test_another_processor_has_another_directory(tmp_path: Path) -> None:
    def name(**values: Any) -> str:
        file = tmp_path / "cpuinfo"
        file.write_text(CPUINFO.format(**{"processor": 0, "mhz": 2445, "flags": "avx2"} | values))
        return processor(file)

    assert name() == name(mhz=3000) == name(processor=7)
    assert name(flags="avx2 avx512f") == name(flags="avx512f avx2") != name()
    assert processor(tmp_path / "missing") != name()


def test_a_directory_that_cannot_be_written_is_an_error_when_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"compilation_cache: .*file.*: Not a directory\. Name"):
        directory(str(file))
    assert directory(AUTO, {"XDG_CACHE_HOME": str(file)}) is None
    assert "warning: compilation_cache: " in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written"):
        directory(str(tmp_path / "other"))


def test_a_bucket_needs_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"gcsfs": None}
    monkeypatch.setattr(compilation_cache.importlib.util, "find_spec", found.get)
    with pytest.raises(UserError, match=r"gs://bucket/x: needs the package gcsfs; `pip install"):
        directory("gs://bucket/x")
    found["gcsfs"] = object()
    assert directory("gs://bucket/x/") == f"gs://bucket/x/{processor()}"
    with pytest.raises(UserError, match=r"s3://bucket: must be a directory or begin with gs://"):
        directory("s3://bucket")


def test_small_programs_are_not_fetched_over_the_network() -> None:
    local = compilation_cache._settings("/x")
    remote = compilation_cache._settings("gs://bucket/x")
    assert local["jax_persistent_cache_min_compile_time_secs"] == 0
    assert remote["jax_persistent_cache_min_compile_time_secs"] > 0
    assert remote["jax_persistent_cache_enable_xla_caches"] == ""


# ------------------------------------------------------------------- several processes


JOIN = """
from llamapro_jax.compilation_cache import AUTO, enabled
from llamapro_jax.launch.processes import joined

with joined(), enabled(AUTO) as place:
    print("place", place)
"""


def places(caches: list[Path]) -> tuple[list[str], str]:
    """The directories of processes with these XDG_CACHE_HOMEs, and what the first one warns of."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(i, len(caches), 1, port) | {"XDG_CACHE_HOME": str(cache)},
        )
        for i, cache in enumerate(caches)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(caches), ended
    lines = [re.search(r"^place (.*)$", out, re.MULTILINE) for out, _ in ended]
    return [line[1] for line in lines if line], ended[0][1]


@pytest.mark.slow
def test_processes_use_a_directory_that_all_see_and_no_other(tmp_path: Path) -> None:
    one = tmp_path / "one"
    found, _ = places([one, one])
    assert found == [str(one / "llamapro_jax" / "xla" / processor())] * 2
    assert [file for file in one.rglob("*") if file.is_file()] == []
    found, warned = places([one, tmp_path / "another"])
    assert found == ["None", "None"]
    assert "is not one directory for all processes" in warned
