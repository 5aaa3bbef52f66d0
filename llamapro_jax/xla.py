"""The flags of the XLA compiler that we set, for each generation of chips, with their reasons.

XLA reads them once, from the environment, so `train` calls `apply` before it imports jax: a module
that must not import it. `llamapro plan` gives `compiler_options` to the compiler instead.

A flag is in the table when the compilers that we test with know it (`tests/test_xla.py`) and when
it changes a program of ours, or is what its vendor publishes for such a program.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamapro_jax.config import XlaConfig
from llamapro_jax.errors import UserError, nearest

Value = bool | int | str
Variable = Literal["XLA_FLAGS", "LIBTPU_INIT_ARGS"]

TPU_GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
GPU_GENERATIONS = ("a100", "h100", "h200", "gpu")
GENERATIONS = (*TPU_GENERATIONS, *GPU_GENERATIONS, "cpu")
"""`gpu`: an NVIDIA GPU of another name."""


@dataclass(frozen=True)
class Flag:
    """A flag of the compiler by its name without `--`.

    planned: whether `plan` sets it too. Not so for what multiplies the time of a compilation and
    changes neither memory nor FLOPs nor collectives.
    """

    name: str
    value: Value
    reason: str
    source: str
    planned: bool = True

    def __str__(self) -> str:
        return f"{self.name} = {_text(self.value)}"


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------- the table

_GUIDE = "openxla.org/xla/flags_guidance"
_MAXTEXT = "MaxText, benchmarks/xla_flags_library.py"
_NVIDIA = "JAX-Toolbox, GPU_performance.md"
_OURS = "seen in compiled programs of such blocks"


def _vmem(kib: int, source: str) -> Flag:
    return Flag(
        "xla_tpu_scoped_vmem_limit_kib",
        kib,
        "larger tiles of a product stay on the chip; the default is 16 MiB of VMEM. It makes "
        "compiling several times longer.",
        source,
        planned=False,
    )


# Only of several slices; on one they change nothing.
_OVER_DCN = (
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        True,
        "reduces gradients over the data-centre network while the backward pass goes on",
        _GUIDE,
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        True,
        "the same where the sizes of the gradients differ, as those of our blocks do",
        _GUIDE,
    ),
)

_FUSED_GATHERS = (
    Flag(
        "xla_enable_async_all_gather",
        True,
        "gathers weights asynchronously; by default every gather stops the chip",
        f"{_MAXTEXT}; {_OURS}",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        True,
        "lets a product run within a collective that is under way",
        _MAXTEXT,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        True,
        "the same for gathers of weights, most of the traffic of frozen blocks",
        f"{_MAXTEXT}; {_OURS}",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        True,
        "one collective may run beside several products",
        _MAXTEXT,
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        True,
        "the core computes and communicates at a time",
        _MAXTEXT,
    ),
)


def _sparse_core(name: str, reason: str, source: str = f"{_MAXTEXT}; {_OURS}") -> Flag:
    return Flag(f"xla_tpu_enable_sparse_core_collective_offload_{name}", True, reason, source)


_SPARSE_CORE = (
    _sparse_core(
        "all_gather",
        "SparseCores gather weights beside the products; by default every gather stops the chip",
    ),
    _sparse_core("reduce_scatter", "the same for the gradients of the new blocks"),
    _sparse_core("all_reduce", "the same for sums over copies of the weights", _MAXTEXT),
    Flag(
        "xla_tpu_use_tc_device_shape_on_sc",
        True,
        "the SparseCores see the devices as the TensorCores do, which the offload needs",
        _MAXTEXT,
    ),
    Flag(
        "xla_sc_disable_megacore_partitioning",
        True,
        "a SparseCore program is not cut in two for the halves of a chip",
        _MAXTEXT,
    ),
)
_SPARSE_CORE_3D = (
    _sparse_core("2d_all_gather", "gathers over two axes of the torus; else they stay blocking",
                 _OURS),
    _sparse_core("3d_all_gather", "gathers over three axes of the torus", _OURS),
)  # fmt: skip

# Bytes. A block of LLaMA2-7B has 405 MB in bfloat16, one of 13B 634 MB.
_GATHERED_AT_ONCE = 2**30
_REDUCED_AT_ONCE = 2**27

_GPU = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        "starts collectives early and awaits them late, so that products run meanwhile",
        _NVIDIA,
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather",
        True,
        "gathers the weights of the next block during this one, for one block's weights of memory",
        f"{_NVIDIA}; {_OURS}",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        True,
        "reduces the gradients of one block during the next",
        f"{_NVIDIA}; {_OURS}",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_reduce",
        True,
        "the same where the weights are copies",
        _NVIDIA,
    ),
    Flag(
        "xla_gpu_all_gather_combine_threshold_bytes",
        _GATHERED_AT_ONCE,
        "one gather for all weights of a block: large messages use the whole link",
        _NVIDIA,
    ),
    Flag(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        _REDUCED_AT_ONCE,
        "messages large enough for the link, and the first starts early",
        "MaxText, its Llama 2 7B on H100",
    ),
    Flag(
        "xla_gpu_all_reduce_combine_threshold_bytes",
        _REDUCED_AT_ONCE,
        "messages large enough for the link, and the first starts early",
        "MaxText, its Llama 2 7B on H100",
    ),
    Flag(
        "xla_disable_hlo_passes",
        "rematerialization",
        "what is computed again is what training.remat says; XLA's own choice adds 10 to 28 % to "
        "the products",
        _OURS,
    ),
)

# What jax takes of a GPU's memory, in an environment variable of its own. By default it is three
# quarters; the rest is for CUDA, NCCL and cuDNN, and `machines.py` counts on as much.
_GPU_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "0.95")
_GPU_MEMORY_NAMES = (_GPU_MEMORY[0], "XLA_PYTHON_CLIENT_MEM_FRACTION")

_TABLE: dict[str, tuple[Flag, ...]] = {
    # It has 16 MiB of VMEM a core: the default is all there is.
    "v4": (*_FUSED_GATHERS, *_OVER_DCN),
    # Its gathers are fused with products by default.
    "v5e": (_vmem(98304, "MaxText, its Llama 3.1 8B on v5e-256"), *_OVER_DCN),
    "v5p": (
        _vmem(50000, "Marin, its defaults for v5p"),
        *_SPARSE_CORE,
        *_SPARSE_CORE_3D,
        *_OVER_DCN,
    ),
    # Not _FUSED_GATHERS: newer libtpu refuses to start with them here.
    "v6e": (_vmem(98304, "MaxText, its Llama 2 7B on v6e-256"), *_SPARSE_CORE, *_OVER_DCN),
    # Its collectives run on the SparseCores by default.
    "tpu7x": (_vmem(61440, "Google, its MaxText recipe of Llama 3.1 70B on TPU7x"), *_OVER_DCN),
    **dict.fromkeys(GPU_GENERATIONS, _GPU),
    "cpu": (),
}


def flags_for(generation: str) -> tuple[Flag, ...]:
    """The flags of a generation of chips. Raises UserError when it is not one of GENERATIONS."""
    if generation not in _TABLE:
        near = nearest(generation, GENERATIONS)
        raise UserError(
            f"{generation!r} is no generation of chips that is known.{near} "
            f"Known: {', '.join(GENERATIONS)}."
        )
    return _TABLE[generation]


def chosen(config: XlaConfig, generation: str) -> tuple[Flag, ...]:
    """The flags of a run on a generation: those of the table, and what the run changes.

    Raises UserError as `flags_for` does.
    """
    flags = {flag.name: flag for flag in (flags_for(generation) if config.defaults else ())}
    for name, value in (config.flags or {}).items():
        if value is None:
            flags.pop(name, None)
        else:
            flags[name] = Flag(name, value, "the configuration sets it", "xla.flags")
    return tuple(flags.values())


def compiler_options(generation: str, config: XlaConfig | None = None) -> dict[str, Value]:
    """The same for `lowered.compile(compiler_options=...)`, without what is not `planned`.

    Raises UserError as `flags_for` does.
    """
    flags = chosen(config or XlaConfig(), generation)
    return {flag.name: _typed(flag.value) for flag in flags if flag.planned}


def _typed(value: Value) -> Value:
    """XLA wants a Python bool or int for such an option; a configuration has texts."""
    if value in ("true", "false"):
        return value == "true"
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    return value


# ------------------------------------------------------------------- the chip that is here

# PCI device of Google's (vendor 0x1ae0) -> generation; as jax's hardware_utils.py has them.
_GOOGLE = "0x1ae0"
_TPU_DEVICES = {
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}
_TPU_NAMES = (
    (re.compile(r"v5litepod|v5e|v5-?lite"), "v5e"),
    (re.compile(r"v6e"), "v6e"),
    (re.compile(r"tpu-?7x|v7x"), "tpu7x"),
    (re.compile(r"v5p"), "v5p"),
    (re.compile(r"v4"), "v4"),
)
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def detect_generation(environ: MutableMapping[str, str] | None = None, root: str = "/") -> str:
    """The generation of the chips that jax is going to take, found without jax.

    environ: the environment; None for that of this process. root: where /sys and /proc are.
    `cpu` also where chips are and jax lacks what it needs for them.
    """
    environ = os.environ if environ is None else environ
    platforms = [p for p in environ.get("JAX_PLATFORMS", "").lower().split(",") if p]

    def may_be(*names: str) -> bool:
        return not platforms or platforms[0] in names

    if may_be("tpu") and _is_installed("libtpu") and (tpu := _tpu(environ, root)):
        return tpu
    if may_be("cuda", "gpu") and any(map(_is_installed, _CUDA_PLUGINS)):
        return _gpu(environ, root)
    return "cpu"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _tpu(environ: MutableMapping[str, str], root: str) -> str | None:
    devices = Path(root, "sys/bus/pci/devices")
    for vendor in sorted(glob.glob(f"{devices}/*/vendor")):
        if Path(vendor).read_text().strip() == _GOOGLE:
            device = Path(vendor).with_name("device").read_text().strip()
            if device in _TPU_DEVICES:
                return _TPU_DEVICES[device]
    if not glob.glob(f"{root}/dev/accel[0-9]*") and not glob.glob(f"{root}/dev/vfio/[0-9]*"):
        return None
    # In a container that does not see the PCI bus.
    named = environ.get("TPU_ACCELERATOR_TYPE", "").lower()
    return next((name for pattern, name in _TPU_NAMES if pattern.search(named)), None)


def _gpu(environ: MutableMapping[str, str], root: str) -> str:
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return "cpu"
    names = [
        match[1]
        for file in sorted(glob.glob(f"{root}/proc/driver/nvidia/gpus/*/information"))
        if (match := re.search(r"Model:\s*(.+)", Path(file).read_text(errors="replace")))
    ]
    found = names or _ask_nvidia_smi()
    if not found:
        return "cpu"
    name = found[0].lower()
    return next((known for known in ("h200", "h100", "a100") if known in name), "gpu")


def _ask_nvidia_smi() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.splitlines()


# ------------------------------------------------------------------- setting them


def _variable(generation: str, name: str) -> Variable:
    """Where the compiler looks for a flag. What it dumps is jaxlib's matter on every chip."""
    if generation in TPU_GENERATIONS and not name.startswith("xla_dump_"):
        return "LIBTPU_INIT_ARGS"
    return "XLA_FLAGS"


def _given(variable: str, text: str) -> dict[str, str]:
    """Flags in an environment variable: name -> value, `true` or `false` where none is given."""
    text = text.strip()
    if text and not text.startswith("-"):
        raise UserError(
            f"xla: {variable}={text} names a file, to whose flags none can be added. Put the flags "
            f"themselves into {variable}, or take `xla.defaults=false` and no xla.flags."
        )
    flags = {}
    for word in text.split():
        name, equals, value = word.lstrip("-").partition("=")
        if name.startswith("noxla_"):
            name, value = name.removeprefix("no"), "false"
        flags[name] = value if equals or value else "true"
    return flags


def apply(
    config: XlaConfig,
    environ: MutableMapping[str, str] | None = None,
    generation: str | None = None,
) -> tuple[str, ...]:
    """Adds the flags of a run to `environ`. Returns lines that say which, for the log.

    What the environment has already stays. Raises UserError when flags are to be added and jax,
    which may have read them, is imported.
    """
    environ = os.environ if environ is None else environ
    generation = detect_generation(environ) if generation is None else generation
    lines, changed = [], {}
    for flag in chosen(config, generation):
        variable = _variable(generation, flag.name)
        text = changed.get(variable, environ.get(variable, ""))
        given = _given(variable, text)
        if flag.name in given:
            lines.append(f"{flag.name} = {given[flag.name]}: {variable} has it")
        else:
            changed[variable] = f"{text} --{flag.name}={_text(flag.value)}".strip()
            lines.append(f"{flag}: {flag.reason}")
    if config.defaults and generation in GPU_GENERATIONS:
        name, share = _GPU_MEMORY
        if not any(environ.get(known) for known in _GPU_MEMORY_NAMES):
            changed[name] = share
            lines.append(f"{name} = {share}: the share of the memory that jax takes; else 0.75")
    if changed and "jax" in sys.modules:
        raise UserError(
            f"xla: the flags for {generation} must be set before jax is imported, and it is. Run "
            "`llamapro train` as a command of its own, or take `xla.defaults=false` and no "
            "xla.flags."
        )
    environ.update(changed)
    return tuple(f"xla ({generation}): {line}" for line in lines)


def table() -> str:
    """The table in Markdown, as docs/performance.md has it."""
    rows: dict[Flag, list[str]] = {}
    for generation in GENERATIONS:
        for flag in flags_for(generation):
            rows.setdefault(flag, []).append(generation)
    groups = {TPU_GENERATIONS: "every TPU", GPU_GENERATIONS: "every GPU"}
    lines = ["| flag | value | on | why | source |", "|---|---|---|---|---|"]
    for flag, generations in rows.items():
        on = groups.get(tuple(generations), ", ".join(generations))
        cells = (f"`{flag.name}`", f"`{_text(flag.value)}`", on, flag.reason, flag.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
