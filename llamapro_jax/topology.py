"""The devices of a machine that is not here, as the compiler for it describes them.

TPU: libtpu, from PyPI, compiles on any machine. GPU: jax's CUDA plugin compiles for a card that is
described to it. CPU: the devices that are here, as many as are asked for.

`prepare_environment` must come before jax is imported; so this module imports it late.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.machines import Machine

# Without them libtpu asks the metadata server of a machine that is no TPU's, prints that it does
# not answer, and refuses to be loaded by a second process.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# There is no card to time kernels on.
_GPU_FLAGS = "--xla_gpu_autotune_level=0"
_CPU_FLAG = "--xla_force_host_platform_device_count"

# A GpuTargetConfigProto in text form: what XLA wants to know of a card. The numbers are those that
# the CUDA driver reports for it.
_TARGET = """\
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{description}"
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_memory_per_block}
  shared_memory_per_core: {shared_memory_per_core}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {cores}
  fpus_per_core: {fpus_per_core}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: {clock}
  memory_bandwidth: {memory_bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
}}
"""
_HOPPER = {
    "shared_memory_per_block": 232448,
    "shared_memory_per_core": 233472,
    "cores": 132,
    "fpus_per_core": 128,
    "l2_cache": 52428800,
    "clock": 1.98,
    "capability": "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES",
}
_CARDS: dict[str, dict[str, Any]] = {
    "h100": _HOPPER
    | {
        "description": "NVIDIA H100 80GB HBM3",
        "memory": 84942979072,
        "memory_bandwidth": 3352320000000,
    },
    "h200": _HOPPER
    | {"description": "NVIDIA H200", "memory": 150109880320, "memory_bandwidth": 4814700000000},
    "a100": {
        "description": "NVIDIA A100-SXM4-80GB",
        "shared_memory_per_block": 166912,
        "shared_memory_per_core": 167936,
        "cores": 108,
        "fpus_per_core": 64,
        "l2_cache": 41943040,
        "clock": 1.41,
        "memory": 85094170624,
        "memory_bandwidth": 2039000000000,
        "capability": "major: 8 minor: 0",
    },
}


def prepare_environment(machine: Machine) -> None:
    """Sets what jax and the compilers read when they are loaded. Call it before jax is imported.

    Raises UserError when the compiler for the machine is not installed.
    """
    platform = machine.chip.platform
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology: {machine.name}: needs libtpu, which compiles for TPUs on any machine; "
            "install llamapro_jax[tpu]."
        )
    if platform == "gpu" and not any(map(importlib.util.find_spec, _CUDA_PLUGINS)):
        raise UserError(
            f"topology: {machine.name}: needs jax's CUDA plugin, which compiles for GPUs on any "
            "Linux machine; install llamapro_jax[cuda12] (it may not share an environment with "
            "llamapro_jax[tpu])."
        )
    # What is planned for may be in this machine, and busy: it is not touched.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if platform == "tpu":
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    elif platform == "gpu":
        _add_flag(_GPU_FLAGS)
    elif machine.devices > 1 and "jax" not in sys.modules:
        _add_flag(f"{_CPU_FLAG}={machine.devices}")


def _add_flag(flag: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "").split()
    name = flag.partition("=")[0]
    others = [given for given in flags if given.partition("=")[0] != name]
    os.environ["XLA_FLAGS"] = " ".join([*others, flag])


def devices_of(machine: Machine) -> list[Any]:
    """The devices, for `sharding.build_mesh`. Raises UserError when there are too few CPUs."""
    import jax
    from jax.experimental import topologies

    chip = machine.chip
    if chip.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < machine.devices:
            raise UserError(
                f"topology: {machine.name}: jax runs with {len(found)} CPU devices already; set "
                f"XLA_FLAGS={_CPU_FLAG}={machine.devices} before it starts."
            )
        return found[: machine.devices]
    if chip.platform == "gpu":
        nodes, gpus = machine.shape
        return list(
            topologies.get_topology_desc(
                platform="cuda",
                topology_name=machine.name,
                topology=f"1x{nodes}x{gpus}",
                target_config=_TARGET.format(**_CARDS[chip.name]),
            ).devices
        )
    options: dict[str, Any] = {}
    if chip.name == "v4":
        # The two cores of a chip as one device.
        options["chip_config_name"] = "megacore"
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    if set(machine.shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    shape = "x".join(map(str, machine.shape))
    return list(
        topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{shape}", **options
        ).devices
    )
