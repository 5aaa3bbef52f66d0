"""Whatever bytes a file has, reading it gives a value or a UserError, in bounded memory.

A few hundred examples of each here; `make fuzz` takes as many as LLAMAPRO_FUZZ says.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, write_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamapro_jax.convert import convert
from llamapro_jax.data.readers.documents import Bad, Content, pieces, read
from llamapro_jax.delta import DESCRIPTION, FORMAT
from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan, Insertion
from llamapro_jax.fingerprint import Fingerprint, TensorPrint
from llamapro_jax.hf.config import read_config
from llamapro_jax.hf.safetensors import SafetensorsReader
from llamapro_jax.hf.tokenizer import load_tokenizer
from llamapro_jax.manifest import read_manifest
from llamapro_jax.sources import altered_by, open_source
from llamapro_jax.training.run_directory import RunRecord
from llamapro_jax.verification.delta import verify_delta
from llamapro_jax.verification.findings import Findings

EXAMPLES = int(os.environ.get("LLAMAPRO_FUZZ", "300"))
# Beyond what hypothesis itself takes while one example is read.
MOST_MEMORY = 32 * 2**20

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def refused_or_read(act: Callable[[], Any]) -> Any:
    """What `act` gives; None when it raises UserError. No other exception, and no more memory."""
    tracemalloc.start()
    try:
        result = act()
    except UserError as error:
        assert str(error)
        result = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_MEMORY, f"{peak:,} bytes"
    return result


# ------------------------------------------------------------------- values and bytes

NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**18, 10**400]),
    st.integers(),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=8),
    st.sampled_from(["F32", "llama3", "\ud800"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def _paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value within `value`."""
    found = [above]
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += _paths(inner, (*above, key))
    return found


@st.composite
def altered(draw: st.DrawFn, valid: Any) -> Any:
    """A valid JSON value with some of its parts replaced, removed or added."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        places = _paths(value)[1:]
        if not places:
            return draw(VALUES)
        *above, last = draw(st.sampled_from(places))
        parent = value
        for key in above:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "replace":
                parent[last] = draw(VALUES)
            case "remove":
                del parent[last]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=12))] = parent.pop(last)
    return value


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes with some cut out, put in or overwritten."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data))))
        match draw(st.sampled_from(["cut", "insert", "overwrite", "truncate"])):
            case "cut":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "overwrite":
                new = draw(st.binary(max_size=8))
                data[at : at + len(new)] = new
            case "truncate":
                del data[at:]
    return bytes(data)


def contents(valid: Any) -> st.SearchStrategy[bytes]:
    """Of a JSON file: nearly valid values, nearly valid bytes, any value, any bytes."""
    raw = json.dumps(valid).encode()
    dumped = st.one_of(altered(valid), VALUES).map(lambda value: json.dumps(value).encode())
    return st.one_of(dumped, damaged(raw), st.binary(max_size=64))


# ------------------------------------------------------------------- safetensors

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@fuzz
@given(header=contents(HEADER), data=st.binary(max_size=40), pad=st.integers(-2, 2))
def test_safetensors_headers(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes, pad: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "headers"
    directory.mkdir(exist_ok=True)
    length = max(0, len(header) + pad).to_bytes(8, "little")
    data = data if pad else bytes(32)
    (directory / "model.safetensors").write_bytes(length + header + data)

    def act() -> None:
        reader = SafetensorsReader(directory)
        for name, stored in reader.tensors.items():
            array = reader.read(name)
            assert (array.shape, array.dtype) == (stored.shape, stored.dtype)
            assert array.tobytes() in header + data or not array.size

    refused_or_read(act)


@fuzz
@given(
    content=st.one_of(
        damaged(
            len(json.dumps(HEADER)).to_bytes(8, "little") + json.dumps(HEADER).encode() + bytes(32)
        ),
        st.binary(max_size=80),
    )
)
def test_safetensors_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "safetensors"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(content)
    refused_or_read(lambda: SafetensorsReader(directory))


# ------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("model"), shard_bytes=500, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, vocab_size=11,
    )  # fmt: skip


INDEX = "model.safetensors.index.json"


@fuzz
@given(data=st.data())
def test_index_files(model: Path, data: st.DataObject) -> None:
    original = (model / INDEX).read_bytes()
    (model / INDEX).write_bytes(data.draw(contents(json.loads(original))))
    try:
        refused_or_read(lambda: open_source(str(model)))
    finally:
        (model / INDEX).write_bytes(original)


PLAN = {
    "base_blocks": 4,
    "generations": [[{"after": 1, "copied_from": 1}], [{"after": 4, "copied_from": 2}]],
    "lineage": [
        {"verb": "expand", "source": "a", "generation": 1, "base_digest": "0"},
        {"verb": "train", "source": "b", "trainable": ["new"], "steps": 3},
        {"verb": "expand", "source": "c", "generation": 2, "base_digest": "0"},
    ],
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 10000.0,
}
CONFIG = {**TINY, "num_hidden_layers": 6, "llamapro": PLAN, "rope_parameters": ROPE}


@fuzz
@given(content=contents(CONFIG))
def test_config_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "config"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(content)

    def act() -> None:
        _, config, plan = read_config(directory)
        assert len(plan.blocks) == config.num_blocks
        assert 0 < config.rms_norm_eps < np.inf and 0 < config.rope_theta < np.inf

    refused_or_read(act)


@pytest.fixture(scope="module")
def flax(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("flax") / "model"
    convert(str(model), directory)
    return directory


@fuzz
@given(content=contents({"format": "llamapro_jax model", "version": 1, "lineage": PLAN["lineage"]}))
def test_descriptions_of_checkpoints(flax: Path, content: bytes) -> None:
    (flax / "llamapro.json").write_bytes(content)

    def act() -> None:
        altered_by(open_source(str(flax)), -9)

    refused_or_read(act)


ARRAY = {
    "chunks": [8],
    "compressor": None,
    "dimension_separator": ".",
    "dtype": "<f4",
    "fill_value": None,
    "filters": None,
    "order": "C",
    "shape": [8],
    "zarr_format": 2,
}


@fuzz
@given(content=contents(ARRAY))
def test_descriptions_of_arrays(flax: Path, content: bytes) -> None:
    (flax / "llamapro.json").write_text('{"format": "llamapro_jax model", "version": 1}')
    array = flax / "params" / "final_norm" / ".zarray"
    original = array.read_bytes()
    array.write_bytes(content)
    try:
        refused_or_read(lambda: open_source(str(flax)))
    finally:
        array.write_bytes(original)


# ------------------------------------------------------------------- records

PRINT = {"shape": [2, 3], "dtype": "float32", "sha256": "0" * 64}
NAMES = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.x", "model.layers")


@fuzz
@given(content=contents({"digest": "0" * 64, "tensors": dict.fromkeys(NAMES, PRINT)}))
def test_fingerprints(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "fingerprint"
    directory.mkdir(exist_ok=True)
    (directory / "fingerprint.json").write_bytes(content)
    refused_or_read(lambda: Fingerprint.read(directory))


PIECES = st.sampled_from(["model", "layers", "0", "1", "-1", "٣", "9" * 5000, "", "norm", "\n"])


@fuzz
@given(names=st.lists(st.lists(PIECES, max_size=5).map(".".join), unique=True))
def test_names_of_tensors_that_are_none(names: list[str]) -> None:
    known = Fingerprint({name: TensorPrint((2,), "float32", "0" * 64) for name in names})
    plan = ExpansionPlan(2, ((Insertion(0, 0),),))
    assert set(refused_or_read(lambda: known.until(plan, 0)).tensors) <= {
        *names,
        *(name.replace(".1.", ".0.", 1) for name in names),
        *(name.replace(".2.", ".1.", 1) for name in names),
    }


RUN = {
    "format": "llamapro_jax run",
    "version": 1,
    "model": "/nowhere",
    "model_digest": "0",
    "trainable": ["new"],
    "lineage": PLAN["lineage"][:2],
    "data": {"a": "0"},
    "frozen": {"q": 1},
}


@fuzz
@given(content=contents(RUN))
def test_records_of_runs(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "run"
    directory.mkdir(exist_ok=True)
    (directory / "run.json").write_bytes(content)

    def act() -> None:
        record = RunRecord.read(directory)
        assert all(isinstance(part, str) for part in record.trainable)
        assert isinstance(record.lineage[-1]["steps"], int)

    refused_or_read(act)


@fuzz
@given(content=contents({**FORMAT, "plan": PLAN, "base_digest": "0", "digest": "0", "lineage": []}))
def test_descriptions_of_deltas(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "delta"
    directory.mkdir(exist_ok=True)
    (directory / DESCRIPTION).write_bytes(content)

    def act() -> None:
        findings = Findings(str(directory), "delta")
        verify_delta(findings, directory, None)
        assert not findings.good and findings.as_text() and json.dumps(findings.as_json())

    refused_or_read(act)


@fuzz
@given(content=st.one_of(damaged(b"0" * 64 + b"  model.safetensors\n"), st.binary(max_size=99)))
def test_lists_of_hashes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "sums"
    directory.mkdir(exist_ok=True)
    (directory / "SHA256SUMS").write_bytes(content)
    sums = refused_or_read(lambda: read_manifest(directory)) or {}
    for name in sums:
        assert (directory / name).absolute().is_relative_to(directory)


# ------------------------------------------------------------------- tokenizers


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 0, "content": "<s>", "special": True, **ADDED},
        {"id": 1, "content": "</s>", "special": True, **ADDED},
    ],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {"type": "Fuse"},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<s>",
        "fuse_unk": True,
        "byte_fallback": False,
        "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "_": 5},
        "merges": ["a b"],
    },
}
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "pad_token": None,
    "chat_template": [{"name": "default", "template": "x"}],
    "added_tokens_decoder": {"0": {"content": "<s>"}},
}


@fuzz
@given(tokenizer=contents(TOKENIZER))
def test_tokenizers(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "tokenizer"
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    refused_or_read(lambda: _use_tokenizer(directory))


@fuzz
@given(
    content=contents(TOKENIZER_CONFIG),
    name=st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "config.json"]),
)
def test_configurations_of_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / name).write_bytes(content)
    refused_or_read(lambda: _use_tokenizer(directory))


def _use_tokenizer(directory: Path) -> None:
    found = load_tokenizer(directory)
    assert all(isinstance(i, int) for i in found.encode("ab a </s>"))
    assert len(found.fingerprint) == 64


# ------------------------------------------------------------------- texts

MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@fuzz
@given(
    data=st.data(),
    kind=st.sampled_from(["text", "chat"]),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz"]),
    piece=st.integers(1, 200),
)
def test_lines_of_json(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    kind: str,
    suffix: str,
    piece: int,
) -> None:
    import gzip

    file = tmp_path_factory.getbasetemp() / f"lines{suffix}"
    line = contents({"text": "some words"} if kind == "text" else MESSAGES)
    content = b"\n".join(data.draw(st.lists(line, max_size=4)))
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
        content = data.draw(st.one_of(st.just(content), damaged(content)))
    file.write_bytes(content)

    def act() -> None:
        for one in pieces(Content(str(file), kind), piece):
            for record in read(one):
                if isinstance(record, Bad):
                    assert record.where and record.why
                elif kind == "text":
                    record.value.encode()

    refused_or_read(act)
