"""Files that somebody made to do harm: refused, before memory is taken and without running them."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, write_tiny
from models import write_with_tokenizer

from llamapro_jax import cli
from llamapro_jax.convert import convert
from llamapro_jax.data.readers import lines
from llamapro_jax.data.readers.documents import Content, texts
from llamapro_jax.delta import DESCRIPTION, FORMAT, apply_delta
from llamapro_jax.errors import UserError
from llamapro_jax.export import export
from llamapro_jax.files import LARGEST_JSON, read_json, write_json
from llamapro_jax.flax_checkpoint import StackedArrays
from llamapro_jax.hf.config import LARGEST, parse, read_config
from llamapro_jax.hf.hub import check_link
from llamapro_jax.hf.safetensors import LARGEST_HEADER, SafetensorsReader, read_header
from llamapro_jax.hf.sentencepiece_model import read_sentencepiece
from llamapro_jax.hf.tokenizer import load_tokenizer
from llamapro_jax.manifest import read_manifest
from llamapro_jax.model.api import OpenedModel
from llamapro_jax.sources import open_hf, open_source
from llamapro_jax.verify import verify

INDEX = "model.safetensors.index.json"
MIB = 2**20


@contextmanager
def memory_below(most: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak:,} bytes"


def header_file(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with whatever header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + raw + data)
    return file


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------- safetensors headers


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, LARGEST_HEADER + 1, 1000])
def test_a_header_longer_than_its_file_takes_no_memory(tmp_path: Path, length: int) -> None:
    file = header_file(tmp_path / "model.safetensors", {}, b"\0" * 100, length)
    with memory_below(MIB), pytest.raises(UserError, match="header would be"):
        read_header(file)


def test_a_header_that_is_itself_too_long_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((2**30).to_bytes(8, "little"))
    os.truncate(file, 2**31)
    with memory_below(MIB), pytest.raises(UserError, match="header would be 1,073,741,824 bytes"):
        read_header(file)


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "absurd shape": ({"a": entry([2**62, 2**62], 0, 8)}, bytes(8), "its data_offsets 8"),
    "shape of no number": ({"a": entry([2**63], 0, 8)}, bytes(8), "has no shape"),
    "negative size": ({"a": entry([-2], 0, 8)}, bytes(8), "has no shape"),
    "true as a size": ({"a": entry([True, 2], 0, 8)}, bytes(8), "has no shape"),
    "a fraction": ({"a": entry([2.0], 0, 8)}, bytes(8), "has no shape"),
    "many dimensions": ({"a": entry([1] * 10**5, 0, 4)}, bytes(4), "has no shape"),
    "absurd offsets": ({"a": entry([2], 2**62, 2**62 + 8)}, bytes(8), "begins at byte"),
    "negative offsets": ({"a": entry([2], -8, 0)}, bytes(8), "has no data_offsets"),
    "offsets backwards": ({"a": entry([2], 8, 0)}, bytes(8), "its data_offsets -8"),
    "beyond the file": ({"a": entry([4], 0, 16)}, bytes(8), "its tensors end at"),
    "bytes that are no tensor's": ({"a": entry([1], 0, 4)}, bytes(8), "its tensors end at"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "begins at byte"),
    "a hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), "begins at byte"),
    "unknown dtype": ({"a": entry([8], 0, 8, "U8")}, bytes(8), "has dtype U8"),
    "dtype of no string": ({"a": entry([2], 0, 8, ["F32"])}, bytes(8), "has dtype none"),
    "no entry": ({"a": None}, b"", "has dtype none"),
    "no object": ([], b"", "no object"),
    "nested": (b"[" * 10**6, b"", "recursion"),
    "thousands of digits": (b'{"a": ' + b"9" * 10**5 + b"}", b"", "digits"),
    "not UTF-8": (b'{"\xff": 1}', b"", "utf-8"),
    "two of a name": (
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        bytes(8),
        "the key 'a' is there twice",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused_before_a_tensor_is_mapped(tmp_path: Path, case: str) -> None:
    header, data, message = HEADERS[case]
    header_file(tmp_path / "model.safetensors", header, data)
    with memory_below(8 * MIB), pytest.raises(UserError, match=message):
        SafetensorsReader(tmp_path)


def test_an_honest_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float16)}
    save_file(arrays, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    for name, array in arrays.items():
        assert np.array_equal(reader.read(name), array) and reader.read(name).shape == array.shape


# ------------------------------------------------------------------- names and links


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret", "a/b", "..\\secret", "C:\\x", "", ".", "..", "a\0b", 7, None],
)
def test_a_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: Any) -> None:
    model = write_tiny(tmp_path / "model")
    write_json(model / INDEX, {"weight_map": {"model.norm.weight": name}})
    with pytest.raises(UserError, match="must be a plain file name"):
        open_hf(str(model))
    assert not verify(str(model)).good


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.model", "model.safetensors", INDEX],
)
def test_a_link_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    model = write_with_tokenizer(tmp_path / "model")
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("{}")
    (model / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name}: is a link to {secret}"):
        convert(str(model), tmp_path / "out")
    assert "is a link to" in verify(str(model)).as_text()


def test_a_link_out_of_a_flax_checkpoint_or_to_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = write_with_tokenizer(tmp_path / "model")
    convert(str(model), tmp_path / "flax")
    (tmp_path / "flax" / "tokenizer.model").unlink(missing_ok=True)
    (tmp_path / "flax" / "tokenizer.model").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="tokenizer.model: is a link to /etc/passwd"):
        open_source(str(tmp_path / "flax"))


def test_links_within_the_directory_and_to_blobs_of_a_hub_cache_are_followed(
    tmp_path: Path,
) -> None:
    snapshot = write_tiny(tmp_path / "models--org--name" / "snapshots" / "abc")
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / ("0a" * 32))
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "0a" * 32)
    (snapshot / "config.json").rename(snapshot / "real.json")
    (snapshot / "config.json").symlink_to("real.json")
    assert open_hf(str(snapshot)).config.num_blocks == 4
    # A directory may itself be a link, as people keep models on another disk.
    (tmp_path / "short").symlink_to(snapshot)
    assert open_hf(str(tmp_path / "short")).config.num_blocks == 4


@pytest.mark.parametrize(
    "target", ["blobs/" + "0a" * 32, "models--x/blobs/name", "models--x/" + "0a" * 32]
)
def test_what_only_looks_like_a_blob_is_none(tmp_path: Path, target: str) -> None:
    (tmp_path / target).parent.mkdir(parents=True)
    (tmp_path / target).write_text("x")
    (tmp_path / "model").mkdir()
    link = tmp_path / "model" / "config.json"
    link.symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="is a link to"):
        check_link(tmp_path / "model", link)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_hashes_of_files_elsewhere_are_not_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match="is not in this directory"):
        read_manifest(tmp_path)


# ------------------------------------------------------------------- code


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.model"])
def test_a_pickle_is_never_unpickled(tmp_path: Path, name: str) -> None:
    model, mark = write_with_tokenizer(tmp_path / "model"), tmp_path / "ran"
    (model / "tokenizer.json").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(mark)))
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    with pytest.raises(UserError):
        convert(str(model), tmp_path / "out")
    assert not verify(str(model)).good
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_code_that_a_model_names_is_neither_run_nor_handed_on(tmp_path: Path) -> None:
    model, mark = write_with_tokenizer(tmp_path / "model"), tmp_path / "ran"
    for module in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / module).write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    auto_map = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    for file in ("config.json", "tokenizer_config.json"):
        write_json(model / file, {**read_json(model / file), "auto_map": auto_map})
    findings = verify(str(model))
    assert findings.good and any("auto_map" in note for note in findings.notes)
    convert(str(model), tmp_path / "flax")
    export(str(tmp_path / "flax"), tmp_path / "export")
    assert not mark.exists()
    for directory in (tmp_path / "flax", tmp_path / "export"):
        assert not list(directory.rglob("*.py"))
        for file in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in read_json(directory / file)


# ------------------------------------------------------------------- sizes


@pytest.mark.parametrize("key", LARGEST)
@pytest.mark.parametrize("value", [10**12, 2**64, 10**4000])
def test_absurd_sizes_are_refused_before_anything_is_made(key: str, value: int) -> None:
    values = {**TINY, "architectures": ["MistralForCausalLM"], key: value}
    with memory_below(MIB), pytest.raises(UserError, match=f"{key} is 1.*largest supported"):
        parse(values)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none_are_refused(tmp_path: Path, key: str, text: str) -> None:
    values = json.dumps({**TINY, key: "HERE"}).replace('"HERE"', text)
    (tmp_path / "config.json").write_text(values)
    with pytest.raises(UserError, match=f"{key} is "):
        read_config(tmp_path)


@pytest.mark.parametrize("blocks", [10**12, 1e999, "x", None])
def test_an_absurd_plan_is_refused(tmp_path: Path, blocks: Any) -> None:
    model = write_tiny(tmp_path / "model")
    plan = {"base_blocks": blocks, "generations": [[{"after": 0, "copied_from": 0}]]}
    values = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps({**values, "llamapro": plan}))
    with memory_below(MIB), pytest.raises(UserError, match="expansion plan is malformed"):
        read_config(model)
    delta = tmp_path / "delta"
    delta.mkdir()
    (delta / DESCRIPTION).write_text(json.dumps({**FORMAT, "plan": plan}))
    with memory_below(MIB), pytest.raises(UserError, match="expansion plan is malformed"):
        apply_delta(str(model), delta, tmp_path / "out")
    assert "expansion plan is malformed" in verify(str(delta)).as_text()


def test_an_array_with_absurd_chunks_is_refused(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    convert(str(model), tmp_path / "flax")
    array = tmp_path / "flax" / "params" / "final_norm" / ".zarray"
    write_json(array, {**read_json(array), "chunks": [2**40], "compressor": {"id": "zlib"}})
    with pytest.raises(UserError, match="has chunks of"):
        StackedArrays(tmp_path / "flax" / "params").read("final_norm")
    assert "has chunks of" in verify(str(tmp_path / "flax")).as_text()


def test_an_array_with_an_absurd_shape_is_refused_unread(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    convert(str(model), tmp_path / "flax")
    array = tmp_path / "flax" / "params" / "final_norm" / ".zarray"
    write_json(array, {**read_json(array), "shape": [2**50]})
    with pytest.raises(UserError, match="config.json says"):
        open_source(str(tmp_path / "flax"))


# ------------------------------------------------------------------- JSON


JSON_FILES = ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":' * 10**5, "recursion|is not JSON"),
        ("[" * 10**6, "recursion"),
        ('{"a": ' + "9" * 10**5 + "}", "digits"),
        ('{"a": 1, "a": 2}', "is there twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("\0", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_no_reader_follows_is_refused(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    model = write_with_tokenizer(tmp_path / "model")
    (model / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_hf(str(model))
        load_tokenizer(model)
    assert file in str(caught.value) and len(str(caught.value)) < 1000
    assert not verify(str(model)).good


def test_a_huge_json_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    os.truncate(file, LARGEST_JSON + 1)
    with memory_below(MIB), pytest.raises(UserError, match="is larger than"):
        read_config(tmp_path)


def test_the_same_key_with_the_same_value_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, {"b": 2}], "a": [1, {"b": 2}]}')
    assert read_json(file) == {"a": [1, {"b": 2}]}


# ------------------------------------------------------------------- what expands without end


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(("kind", "what"), [(".jsonl", "line"), (".txt", "document")])
def test_a_text_that_expands_without_end_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, what: str, suffix: str
) -> None:
    content = bytes(64 * MIB)
    if suffix == ".gz":
        packed = gzip.compress(content, 1)
    else:
        packed = pytest.importorskip("zstandard").compress(content)
    assert len(packed) < MIB
    file = tmp_path / f"bomb{kind}{suffix}"
    file.write_bytes(packed)
    del content
    monkeypatch.setattr(lines, "LARGEST", MIB)
    with memory_below(16 * MIB), pytest.raises(UserError, match=f"{what} of more than"):
        list(texts(Content(str(file))))


def test_a_prompt_beyond_the_context_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_with_tokenizer(tmp_path / "model")
    monkeypatch.setattr(OpenedModel, "load", lambda _: pytest.fail("the weights were read"))
    assert cli.main(["generate", str(model), "the cat " * 10**5]) == 2
    message = capsys.readouterr().err
    assert "64 positions" in message and len(message) < 1000


def test_a_number_without_end_in_a_sentencepiece_model_ends(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\xff" * (4 * MIB))
    with memory_below(32 * MIB), pytest.raises(UserError, match="is not a SentencePiece model"):
        read_sentencepiece(file)
