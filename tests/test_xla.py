from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamapro_jax import machines, xla
from llamapro_jax.config import XlaConfig
from llamapro_jax.errors import UserError
from llamapro_jax.typed_yaml import load, validate

ROOT = Path(__file__).parents[1]
SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


# ------------------------------------------------------------------- the table


def test_every_machine_that_can_be_planned_for_has_flags() -> None:
    assert set(machines.CHIPS) < set(xla.GENERATIONS)
    assert [g for g in xla.GENERATIONS if not xla.flags_for(g)] == ["cpu"]


@pytest.mark.parametrize("generation", xla.GENERATIONS)
def test_every_flag_has_a_name_once_and_a_reason(generation: str) -> None:
    flags = xla.flags_for(generation)
    assert len({flag.name for flag in flags}) == len(flags)
    for flag in flags:
        assert re.fullmatch(r"xla_\w+", flag.name) and flag.reason and flag.source


def test_an_unknown_generation_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"'v5' is no generation .* 'v5p'.*Known: v4, v5e"):
        xla.flags_for("v5")


def test_the_document_shows_the_table() -> None:
    assert xla.table() in (ROOT / "docs" / "performance.md").read_text()


def test_jaxlib_knows_every_gpu_flag_and_refuses_others() -> None:
    """XLA ends the process at an unknown flag, with the CPU compiler too."""
    run = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    flags = [f"--{f.name}={str(f.value).lower()}" for f in xla.flags_for("h100")]
    for given, fine in ((flags, True), ([*flags, "--xla_gpu_no_such_flag=true"], False)):
        environment = {**os.environ, "XLA_FLAGS": " ".join(given)}
        ended = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True)
        assert (ended.returncode == 0) == fine, ended.stderr


COMPILE = """
import json, sys
from llamapro_jax.machines import parse_machine
from llamapro_jax.topology import devices_of, prepare_environment

flags_of = {parse_machine(name): flags for name, flags in json.loads(sys.argv[1]).items()}
for machine in flags_of:
    prepare_environment(machine)

import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

results = {}
for machine, flags in flags_of.items():
    mesh = jax.sharding.Mesh(devices_of(machine), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    argument = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=rows)
    lowered = jax.jit(lambda x: x + 1).lower(argument)
    for flag, value in flags.items():
        try:
            lowered.compile(compiler_options={flag: value})
        except jax.errors.JaxRuntimeError as error:
            results[f"{machine.name} {flag}"] = str(error)
print(json.dumps(results))
"""
NO_SUCH = {"xla_no_such_flag": True}


def refused(machine_of: dict[str, str]) -> dict[str, str]:
    """What compilers say against the flags of generations, and one that does not exist."""
    flags = {
        machine: NO_SUCH | {flag.name: flag.value for flag in xla.flags_for(generation)}
        for generation, machine in machine_of.items()
    }
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(flags)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_tpu_compiler_knows_every_flag_of_every_generation() -> None:
    pytest.importorskip("libtpu")
    machine_of = {"v4": "v4-8", "v5e": "v5e-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}
    assert tuple(machine_of) == xla.TPU_GENERATIONS
    found = refused(machine_of)
    assert set(found) == {f"{machine} xla_no_such_flag" for machine in machine_of.values()}, found


@pytest.mark.slow
def test_the_gpu_compiler_takes_every_flag_as_an_option() -> None:
    pytest.importorskip("jax_cuda12_plugin")
    found = refused({"h100": "h100-8", "a100": "a100-8"})
    assert set(found) == {"h100-8 xla_no_such_flag", "a100-8 xla_no_such_flag"}, found


# ------------------------------------------------------------------- the run's own


def test_a_run_changes_adds_and_removes_flags() -> None:
    flags = {
        SCHEDULER: None,
        "xla_gpu_all_gather_combine_threshold_bytes": "1",
        "xla_gpu_autotune_level": "0",
        "xla_gpu_graph_level": "x",
    }
    config = XlaConfig(flags=flags)
    options = xla.compiler_options("h100", config)
    before = xla.compiler_options("h100")
    assert SCHEDULER in before and SCHEDULER not in options
    # XLA takes such an option as a number or a bool of Python, and no text for it.
    assert options["xla_gpu_all_gather_combine_threshold_bytes"] == 1
    assert options["xla_gpu_autotune_level"] == 0 and options["xla_gpu_graph_level"] == "x"
    assert options["xla_gpu_enable_pipelined_all_gather"] is True
    assert xla.compiler_options("h100", XlaConfig(defaults=False)) == {}


def test_a_plan_leaves_out_what_only_makes_compiling_longer() -> None:
    name = "xla_tpu_scoped_vmem_limit_kib"
    assert name in {flag.name for flag in xla.flags_for("v5e")}
    assert name not in xla.compiler_options("v5e")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("--xla_gpu_graph_level", "0", r"is a name without dashes: 'xla_gpu_graph_level'"),
        ("--xla_a=1", None, r"is a name without dashes: 'xla_a'"),
        ("gpu_graph_level", "0", r"is no flag of XLA: their names begin with `xla_`"),
        ("xla_gpu_graph_level", "0 1", r"'0 1' has a space"),
    ],
)
def test_a_bad_flag_is_refused(name: str, value: str | None, message: str) -> None:
    with pytest.raises(UserError, match=rf"flags\.{re.escape(name)}: {message}"):
        validate(XlaConfig(flags={name: value}))


def test_yaml_gives_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "xla.yaml"
    path.write_text(f"flags: {{xla_a: true, xla_b: 12, {SCHEDULER}: null}}\n")
    config = load(XlaConfig, path, ["flags.xla_c=0.5"])
    assert config.flags == {"xla_a": "true", "xla_b": "12", SCHEDULER: None, "xla_c": "0.5"}


# ------------------------------------------------------------------- setting them


@pytest.fixture
def without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jax", raising=False)


@pytest.mark.usefixtures("without_jax")
def test_flags_are_added_where_the_compiler_of_the_chip_reads_them() -> None:
    gpu, tpu = {"XLA_FLAGS": "--xla_mine=1"}, {}
    lines = xla.apply(XlaConfig(), gpu, "h100")
    assert gpu["XLA_FLAGS"].startswith(f"--xla_mine=1 --{SCHEDULER}=true ")
    assert len(lines) == len(xla.flags_for("h100")) + 1
    assert lines[0].startswith(f"xla (h100): {SCHEDULER} = true: starts collectives early")
    xla.apply(XlaConfig(flags={"xla_dump_to": "/tmp/x"}), tpu, "v6e")
    assert "--xla_tpu_scoped_vmem_limit_kib=98304 " in tpu["LIBTPU_INIT_ARGS"]
    assert tpu["XLA_FLAGS"] == "--xla_dump_to=/tmp/x"


@pytest.mark.usefixtures("without_jax")
def test_what_the_environment_has_stays() -> None:
    environment = {"XLA_FLAGS": f"--{SCHEDULER}=false --xla_disable_hlo_passes"}
    lines = xla.apply(XlaConfig(flags={SCHEDULER: "true"}), environment, "a100")
    assert environment["XLA_FLAGS"].count(SCHEDULER) == 1
    assert environment["XLA_FLAGS"].count("xla_disable_hlo_passes") == 1
    assert f"xla (a100): {SCHEDULER} = false: XLA_FLAGS has it" in lines
    # The second time nothing is left to add.
    before = dict(environment)
    xla.apply(XlaConfig(flags={SCHEDULER: "true"}), environment, "a100")
    assert environment == before


@pytest.mark.usefixtures("without_jax")
@pytest.mark.parametrize(("given", "value"), [("--noxla_a", "false"), ("--xla_a", "true"),
                                              ("-xla_a=2", "2"), ("--xla_a=", "")])  # fmt: skip
def test_all_forms_of_a_given_flag_count(given: str, value: str) -> None:
    environment = {"XLA_FLAGS": given}
    config = XlaConfig(defaults=False, flags={"xla_a": "1"})
    assert xla.apply(config, environment, "cpu") == (
        f"xla (cpu): xla_a = {value}: XLA_FLAGS has it",
    )
    assert environment == {"XLA_FLAGS": given}


@pytest.mark.usefixtures("without_jax")
def test_flags_in_a_file_cannot_be_added_to() -> None:
    environment = {"XLA_FLAGS": "/etc/flags"}
    with pytest.raises(UserError, match="XLA_FLAGS=/etc/flags names a file"):
        xla.apply(XlaConfig(), environment, "h100")
    assert xla.apply(XlaConfig(), environment, "cpu") == ()


@pytest.mark.usefixtures("without_jax")
def test_jax_takes_as_much_of_a_gpu_as_a_plan_counts_on() -> None:
    share = "XLA_CLIENT_MEM_FRACTION"
    environment: dict[str, str] = {}
    assert any(f"{share} = 0.95" in line for line in xla.apply(XlaConfig(), environment, "h100"))
    assert float(environment[share]) == machines._OF_A_GPU
    for name in (share, "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        environment = {name: "0.5"}
        xla.apply(XlaConfig(), environment, "h100")
        assert environment[name] == "0.5" and sum("FRACTION" in key for key in environment) == 1
    for generation, config in (("v6e", XlaConfig()), ("h100", XlaConfig(defaults=False))):
        environment = {}
        xla.apply(config, environment, generation)
        assert share not in environment


def test_it_is_an_error_to_come_after_jax() -> None:
    import jax

    assert sys.modules["jax"] is jax
    environment: dict[str, str] = {}
    with pytest.raises(UserError, match="flags for h200 must be set before jax is imported"):
        xla.apply(XlaConfig(), environment, "h200")
    assert environment == {}
    assert xla.apply(XlaConfig(), environment, "cpu") == ()
    assert xla.apply(XlaConfig(defaults=False), environment, "h200") == ()


def test_train_sets_them_before_it_imports_jax(tmp_path: Path) -> None:
    script = f"""
import sys
from llamapro_jax import cli, xla

def stop(config, environ=None, generation=None):
    print("jax" in sys.modules, dict(config.flags))
    raise SystemExit(7)

xla.apply = stop
cli.main(["train", {str(ROOT / "configs" / "llama2_7b_pro.yaml")!r}, "xla.flags.xla_a=1"])
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout == "False {'xla_a': '1'}\n"


# ------------------------------------------------------------------- the chip that is here


def tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "_is_installed", lambda package: True)


V6E = {"sys/bus/pci/devices/0000:00:04.0/vendor": "0x1ae0\n",
       "sys/bus/pci/devices/0000:00:04.0/device": "0x006f\n"}  # fmt: skip
NETWORK = {"sys/bus/pci/devices/0000:00:03.0/vendor": "0x1ae0\n",
           "sys/bus/pci/devices/0000:00:03.0/device": "0x0042\n"}  # fmt: skip
H100 = {"proc/driver/nvidia/gpus/0000:04:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\n"}
B200 = {"proc/driver/nvidia/gpus/0000:04:00.0/information": "Model: NVIDIA B200\n"}


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("files", "environment", "generation"),
    [
        (V6E | NETWORK, {}, "v6e"),
        (V6E, {"JAX_PLATFORMS": "cpu"}, "cpu"),
        (V6E, {"JAX_PLATFORMS": "tpu,cpu"}, "v6e"),
        (NETWORK, {}, "cpu"),
        ({"dev/accel0": ""}, {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}, "v5e"),
        ({"dev/vfio/0": ""}, {"TPU_ACCELERATOR_TYPE": "v5p-128"}, "v5p"),
        ({"dev/vfio/0": ""}, {"TPU_ACCELERATOR_TYPE": "tpu7x-8"}, "tpu7x"),
        ({}, {"TPU_ACCELERATOR_TYPE": "v4-8"}, "cpu"),
        (H100, {}, "h100"),
        (H100, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (H100, {"JAX_PLATFORMS": "cpu"}, "cpu"),
        (B200, {"CUDA_VISIBLE_DEVICES": "1"}, "gpu"),
        ({}, {}, "cpu"),
    ],
)
def test_the_chip_is_found_without_jax(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    environment: dict[str, str],
    generation: str,
) -> None:
    monkeypatch.setattr(xla, "_ask_nvidia_smi", list)
    assert xla.detect_generation(environment, tree(tmp_path, files)) == generation


def test_a_chip_that_jax_cannot_use_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla, "_is_installed", lambda package: False)
    assert xla.detect_generation({}, tree(tmp_path, V6E | H100)) == "cpu"


@pytest.mark.usefixtures("all_installed")
def test_nvidia_smi_is_asked_where_proc_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA A100-SXM4-80GB\necho NVIDIA A100-SXM4-80GB\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert xla.detect_generation({}, str(tmp_path)) == "a100"
