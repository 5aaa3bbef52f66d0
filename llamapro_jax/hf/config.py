"""`config.json` both ways: the keys of transformers 4 and 5, read alike and written alike.

A key that is absent takes the default that transformers documents for the `model_type`, and one
log line says so. A value that is present but unknown is an error.
Source: transformers, `configuration_llama.py` and `configuration_mistral.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.files import read_json
from llamapro_jax.hf.hub import check_links
from llamapro_jax.model.config import ARCHITECTURES, ModelConfig, RopeScaling

log = logging.getLogger(__name__)

PLAN_KEY = "llamapro"

# Beyond any model that there is. What is larger would only be noticed when memory runs out.
LARGEST = {
    "num_hidden_layers": 2**12,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}

# What transformers documents for a key that config.json leaves out. None: from other keys.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "MistralForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
}


class _Reader:
    """Keys of one config.json, with the file's name for errors and a note of absent keys."""

    def __init__(self, values: Mapping[str, Any], where: str, architecture: str) -> None:
        self.values, self.where = values, where
        self.defaults = DEFAULTS[architecture]
        self.absent: list[str] = []

    def get(self, key: str, kind: type) -> Any:
        value = self.values.get(key)
        if value is None and key == "sliding_window" and key in self.values:
            return None  # null is a value here: no window
        if value is None:
            if key not in self.defaults:
                raise UserError(f"{self.where}: has no {key!r}; it is needed.")
            self.absent.append(key)
            return self.defaults[key]
        return checked(value, kind, key, self.where)


def checked(value: Any, kind: type, key: str, where: str) -> Any:
    """`value` as `kind`. Raises UserError that names the file, the key and the value."""
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{where}: {key} is {_short(value)}; it must be {kind.__name__}.")
    if kind in (int, float) and not 0 < value < math.inf:
        raise UserError(f"{where}: {key} is {_short(value)}; it must be positive.")
    largest = LARGEST.get(key, 2**63)
    if kind is int and value > largest:
        raise UserError(f"{where}: {key} is {_short(value)}; the largest supported is {largest}.")
    return value


def _short(value: Any) -> str:
    """A value for a message, however long its author made it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def parse(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in the keys of a config.json. Raises UserError on what is not supported."""
    architecture = _architecture(values, where)
    reader = _Reader(values, where, architecture)
    activation = reader.get("hidden_act", str)
    if activation not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act is {_short(activation)}; supported: 'silu'.")
    hidden_size = reader.get("hidden_size", int)
    num_heads = reader.get("num_attention_heads", int)
    num_kv_heads = reader.get("num_key_value_heads", int) or num_heads
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {num_heads} is no multiple of "
            f"num_key_value_heads {num_kv_heads}."
        )
    head_dim = reader.get("head_dim", int)
    if head_dim is None:
        if hidden_size % num_heads:
            raise UserError(
                f"{where}: hidden_size {hidden_size} is no multiple of num_attention_heads "
                f"{num_heads}, and there is no head_dim."
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise UserError(f"{where}: head_dim is {head_dim}; rotary embeddings need an even one.")
    max_positions = reader.get("max_position_embeddings", int)
    theta, scaling = _rope(values, reader, max_positions)
    mistral = architecture == "MistralForCausalLM"
    config = ModelConfig(
        architecture=architecture,
        vocab_size=reader.get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=reader.get("intermediate_size", int),
        num_blocks=reader.get("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.get("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        tie_embeddings=reader.get("tie_word_embeddings", bool),
        attention_bias=False if mistral else reader.get("attention_bias", bool),
        mlp_bias=False if mistral else reader.get("mlp_bias", bool),
        sliding_window=reader.get("sliding_window", int) if mistral else None,
    )
    if reader.absent:
        log.info(
            "%s: transformers' defaults for %s", where, ", ".join(sorted(set(reader.absent)))
        )
    return config


def _architecture(values: Mapping[str, Any], where: str) -> Any:
    supported = ", ".join(ARCHITECTURES)
    named = values.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        raise UserError(
            f"{where}: architectures is {_short(named)}; it must name one of: {supported}."
        )
    if named[0] not in ARCHITECTURES:
        raise UserError(
            f"{where}: architecture {_short(named[0])} is not supported; supported: {supported}."
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: the checkpoint is quantized (quantization_config); take the original."
        )
    return named[0]


def _rope(
    values: Mapping[str, Any], reader: _Reader, max_positions: int
) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`."""
    where = reader.where
    both = values.get("rope_parameters") or {}
    scaling = both or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(
            f"{where}: the rope parameters are {_short(scaling)}; they must be a mapping."
        )
    if "rope_theta" in both:
        theta = checked(both["rope_theta"], float, "rope_parameters.rope_theta", where)
    else:
        theta = reader.get("rope_theta", float)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None

    def number(key: str, type_: type = float) -> Any:
        if key not in scaling:
            raise UserError(f"{where}: rope type {_short(kind)} needs {key!r}.")
        return checked(scaling[key], type_, f"rope {key}", where)

    if kind == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            number("factor"),
            number("low_freq_factor"),
            number("high_freq_factor"),
            number("original_max_position_embeddings", int),
        )
    raise UserError(
        f"{where}: rope type {_short(kind)} is not supported; supported: default, linear, llama3."
    )


def parse_plan(values: Mapping[str, Any], config: ModelConfig, where: str) -> ExpansionPlan:
    """The plan in an exported config.json; a model without one is a base."""
    if PLAN_KEY not in values:
        return ExpansionPlan(config.num_blocks)
    plan = ExpansionPlan.from_json(values[PLAN_KEY], f"{where}: {PLAN_KEY}")
    if plan.num_blocks != config.num_blocks:
        raise UserError(
            f"{where}: num_hidden_layers is {config.num_blocks}, but the expansion plan has "
            f"{plan.num_blocks} blocks."
        )
    return plan


def read_config(directory: Path) -> tuple[dict[str, Any], ModelConfig, ExpansionPlan]:
    """config.json of a directory: its raw keys, the architecture, the plan."""
    check_links(directory)
    path = directory / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object.")
    config = parse(values, str(path))
    return values, config, parse_plan(values, config, str(path))


def render(
    source: Mapping[str, Any],
    config: ModelConfig,
    plan: ExpansionPlan,
    dtype: str,
    lineage: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """config.json for this model, which transformers 4.57, 5 and llama.cpp read alike.

    `source` is the config.json that the weights came from: keys that are not ours to say
    (token ids, initializer_range, ...) are kept. Both families of rope and dtype keys are written.
    """
    values = dict(source)
    for key in ("auto_map", "layer_types", "_name_or_path", PLAN_KEY):
        values.pop(key, None)
    scaling = _render_scaling(config.rope_scaling)
    values |= {
        "architectures": [config.architecture],
        "model_type": "mistral" if config.architecture == "MistralForCausalLM" else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if config.architecture == "MistralForCausalLM":
        values["sliding_window"] = config.sliding_window
    else:
        values |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if plan.generation or lineage:
        values[PLAN_KEY] = {**plan.to_json(), "lineage": list(lineage)}
    return values


def _render_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return values
