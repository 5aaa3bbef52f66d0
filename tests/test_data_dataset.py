from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_sources import ByteTokenizer

from llamapro_jax.config import SourceConfig
from llamapro_jax.data import dataset
from llamapro_jax.data.dataset import Rows, open_rows, open_source
from llamapro_jax.data.mixture import Mixture
from llamapro_jax.data.prefetch import Prefetcher
from llamapro_jax.data.preparation.prepare import prepare
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.errors import UserError


def write_foreign(
    directory: Path, features: dict, examples: list[dict], splits: tuple[str, ...] = ("train",)
) -> Path:
    """A TFDS data set as somebody else would make it: other features, plain encoding."""
    directory.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name="foreign",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features), description=""
    )
    writer = tfds.core.SequentialWriter(info, 3, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples({split: examples for split in splits})
    writer.close_all()
    return directory


def opened(path: Path, kind: str, cache: Path, tokenizer: Any = None, **changes: Any) -> Rows:
    """As a source `mine` of a run with rows of 16 tokens."""
    options = {name: changes.pop(name) for name in ("split", "field") if name in changes}
    entry = SourceConfig("mine", str(path), kind=kind, **options)
    values = {"sequence_length": 16, "vocab_size": 258, "cache_directory": cache} | changes
    return open_source(entry, tokenizer=tokenizer, **values)


def tokens_feature(length: int | None, dtype: type = np.int64) -> dict:
    return {"tokens": tfds.features.Tensor(shape=(length,), dtype=dtype)}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    examples = [{"tokens": np.arange(i, i + 6)} for i in range(10)]
    return write_foreign(
        tmp_path / "foreign" / "1.0.0", tokens_feature(6), examples, ("train", "valid")
    )


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    text = tmp_path / "a.txt"
    text.write_text("some text to read back " * 40)
    return prepare(Content(str(text)), ByteTokenizer(), 16, cache=tmp_path / "cache")


def test_tokens_alone_are_enough(foreign: Path) -> None:
    rows = open_rows(foreign, sequence_length=6, vocab_size=100)
    assert len(rows) == 10 and rows.fingerprint is None and rows.sequence_length == 6
    assert rows[4]["tokens"].tolist() == [4, 5, 6, 7, 8, 9]
    assert rows[4]["segment_ids"].tolist() == [1] * 6
    assert {name: array.dtype for name, array in rows[9].items()} == {
        "tokens": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "loss_mask": np.bool_,
    }
    with pytest.raises(IndexError):
        rows[10]


def test_a_sequence_feature_and_own_segments_are_read(tmp_path: Path) -> None:
    features = {
        "tokens": tfds.features.Sequence(np.int32),
        "segment_ids": tfds.features.Tensor(shape=(4,), dtype=np.uint8),
        "note": tfds.features.Text(),
    }
    example = {"tokens": [3, 4, 5, 0], "segment_ids": np.array([1, 2, 2, 0], np.uint8), "note": "x"}
    directory = write_foreign(tmp_path / "set", features, [example])
    row = open_rows(directory, sequence_length=4, vocab_size=6)[0]
    assert row["positions"].tolist() == [0, 0, 1, 0]
    assert row["loss_mask"].tolist() == [True, True, True, False]


def test_the_directory_above_the_version_and_a_name_are_found(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(open_rows(foreign.parent, sequence_length=6, vocab_size=100)) == 10
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(foreign.parents[1]))
    for name in ("foreign", "foreign:1.0.0"):
        assert len(open_rows(name, sequence_length=6, vocab_size=100)) == 10
    with pytest.raises(UserError, match="no_such_set: is neither a directory nor the name"):
        open_rows("no_such_set", sequence_length=6, vocab_size=100)


def test_splits_and_slices(foreign: Path) -> None:
    for split, count in (("valid", 10), ("train[:3]", 3), ("train[50%:]", 5)):
        assert len(open_rows(foreign, sequence_length=6, vocab_size=100, split=split)) == count
    rows = open_rows(foreign, sequence_length=6, vocab_size=100, split="train[7:]")
    assert rows[0]["tokens"][0] == 7
    with pytest.raises(UserError, match=r"has no split 'vlid', only train, valid\. Did you mean"):
        open_rows(foreign, sequence_length=6, vocab_size=100, split="vlid")
    with pytest.raises(UserError, match=r"split 'train\[3:3\]' is empty"):
        open_rows(foreign, sequence_length=6, vocab_size=100, split="train[3:3]")
    with pytest.raises(UserError, match=r"split 'train\[oops' cannot be read"):
        open_rows(foreign, sequence_length=6, vocab_size=100, split="train[oops")


def test_the_sequence_length_must_be_the_runs(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'tokens' has shape \(6,\), the run's .* is 8; set"):
        open_rows(foreign, sequence_length=8, vocab_size=100)
    ragged = write_foreign(
        tmp_path / "ragged", tokens_feature(None), [{"tokens": np.arange(n)} for n in (5, 6, 5)]
    )
    with pytest.raises(UserError, match=r"mine \(.*ragged\), row 1: 'tokens' has shape \(6,\)"):
        open_rows(ragged, sequence_length=5, vocab_size=100, name="mine")


@pytest.mark.parametrize("token", [-1, 50, 2**33])
def test_a_token_beyond_the_vocabulary_names_source_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    examples = [{"tokens": np.array([1, 2])}, {"tokens": np.array([49, token])}]
    directory = write_foreign(tmp_path / "set", tokens_feature(2), examples)
    with pytest.raises(UserError, match=f"mine .*row 1: token {token} is not in .* of 50"):
        open_rows(directory, sequence_length=2, vocab_size=50, name="mine")
    # Of a large data set not every row is read when it is opened.
    monkeypatch.setattr(dataset, "ROWS_LOOKED_AT", 1)
    rows = open_rows(directory, sequence_length=2, vocab_size=50, name="mine")
    assert rows[0]["tokens"].tolist() == [1, 2]
    with pytest.raises(UserError, match=f"mine .*row 1: token {token} is not in .* of 50"):
        rows[1]


def test_a_set_without_tokens_is_refused(tmp_path: Path) -> None:
    directory = write_foreign(
        tmp_path / "set", {"text": tfds.features.Text(), "id": np.int64}, [{"text": "a", "id": 1}]
    )
    with pytest.raises(UserError, match="has no feature 'tokens', only id, text"):
        open_rows(directory, sequence_length=2, vocab_size=50)
    floats = write_foreign(
        tmp_path / "floats", tokens_feature(2, np.float32), [{"tokens": np.zeros(2, np.float32)}]
    )
    with pytest.raises(UserError, match="'tokens' is float32; rows need integer"):
        open_rows(floats, sequence_length=2, vocab_size=50)


def test_what_is_no_data_set_is_refused(tmp_path: Path, foreign: Path) -> None:
    with pytest.raises(UserError, match="is not a TFDS data set .* set kind to 'text'"):
        open_rows(tmp_path, sequence_length=2, vocab_size=50)
    (foreign.parent / "2.0.0").mkdir()
    (foreign.parent / "2.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds several data sets \(1\.0\.0, 2\.0\.0\)"):
        open_rows(foreign.parent, sequence_length=2, vocab_size=50)


def test_another_file_format_is_refused(foreign: Path) -> None:
    file = foreign / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="is stored as tfrecord, .* `tfds convert_format"):
        open_rows(foreign, sequence_length=6, vocab_size=100)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.75, 0.999])
def test_a_truncated_shard_is_found_when_opened(foreign: Path, share: float) -> None:
    shard = sorted(foreign.glob("*train*"))[2]
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"row 8 cannot be read, the file is damaged or missing"):
        open_rows(foreign, sequence_length=6, vocab_size=100)


def test_a_missing_shard_is_found_when_opened(foreign: Path) -> None:
    sorted(foreign.glob("*train*"))[2].unlink()
    with pytest.raises(UserError, match=r"row 8 cannot be read, the file is damaged or missing"):
        open_rows(foreign, sequence_length=6, vocab_size=100)


def test_a_flipped_bit_is_never_read_as_data(prepared: Path) -> None:
    shard = next(prepared.glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    rows = open_rows(prepared, sequence_length=16, vocab_size=258)
    right = [rows[i]["tokens"].tolist() for i in range(len(rows))]
    for place in range(200, len(data), len(data) // 60):
        damaged = data.copy()
        damaged[place] ^= 4
        shard.write_bytes(damaged)
        try:
            rows = open_rows(prepared, sequence_length=16, vocab_size=258)
            assert [rows[i]["tokens"].tolist() for i in range(len(rows))] == right
        except UserError as error:
            assert "prepare it again" in str(error)


def test_the_tokenizer_and_vocabulary_of_a_prepared_set_are_checked(
    prepared: Path, tmp_path: Path
) -> None:
    tokenizer = ByteTokenizer()
    assert len(opened(prepared, "tfds", tmp_path, tokenizer)) > 10
    assert len(opened(prepared, "tfds", tmp_path)) > 10
    with pytest.raises(UserError, match="holds token 257, the model's vocabulary is 257"):
        opened(prepared, "tfds", tmp_path, tokenizer, vocab_size=257)
    tokenizer.fingerprint = "0123456789abcdef"
    with pytest.raises(UserError, match="the model's is 0123456789ab; prepare the text again"):
        opened(prepared, "tfds", tmp_path, tokenizer)


@pytest.mark.parametrize("content", ["[]", "{}", '{"tokenizer": "x", "bytes": 1}'])
def test_a_file_of_the_same_name_is_no_fingerprint(foreign: Path, content: str) -> None:
    (foreign / "fingerprint.json").write_text(content)
    rows = open_rows(foreign, sequence_length=6, vocab_size=100, tokenizer_fingerprint="y")
    assert rows.fingerprint is None


def test_what_rows_are_recognised_by(foreign: Path, prepared: Path, tmp_path: Path) -> None:
    def digest(path: Path, length: int) -> str:
        return open_rows(path, sequence_length=length, vocab_size=258).digest

    recorded = json.loads((prepared / "fingerprint.json").read_text())["fingerprint"]
    assert digest(prepared, 16) == recorded
    examples = [{"tokens": np.arange(i, i + 6)} for i in range(11)]
    longer = write_foreign(tmp_path / "longer", tokens_feature(6), examples, ("train", "valid"))
    same = write_foreign(tmp_path / "same", tokens_feature(6), examples[:10], ("train", "valid"))
    assert digest(same, 6) == digest(foreign, 6) != digest(longer, 6)


def test_many_rows_are_those_read_singly(prepared: Path, foreign: Path) -> None:
    for rows in (
        open_rows(prepared, sequence_length=16, vocab_size=258),
        open_rows(foreign, sequence_length=6, vocab_size=100),
    ):
        order = [7, 0, 3, 3, len(rows) - 1]
        many = rows.read(order)
        for place, index in enumerate(order):
            for name, array_T in rows[index].items():
                np.testing.assert_array_equal(many[name][place], array_T)
                assert many[name].dtype == array_T.dtype
        assert {a.shape for a in rows.read([]).values()} == {(0, rows.sequence_length)}
        for index in (-1, len(rows)):
            with pytest.raises(IndexError):
                rows.read([0, index])


def test_a_resumed_run_sees_the_same_rows(prepared: Path, tmp_path: Path) -> None:
    """From disk, through a mixture, in two separate openings, prefetched and not."""
    text = tmp_path / "replay.txt"
    text.write_text("another text, replayed " * 30)

    def mixture() -> Mixture:
        new = opened(prepared, "tfds", tmp_path)
        old = opened(text, "text", tmp_path / "cache", ByteTokenizer())
        return Mixture([("new", new, 0.75), ("old", old, 0.25)], batch_size=4, seed=1)

    whole = mixture()
    with Prefetcher(mixture().batch, start=30, stop=60) as resumed:
        for step, batch in enumerate(resumed, start=30):
            expected = whole.batch(step)
            assert sorted(batch["source"]) == [0, 0, 0, 1]
            assert all((batch[name] == expected[name]).all() for name in expected)
    assert step == 59


def test_a_text_source_is_prepared_and_opened(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello " * 20)
    cache = tmp_path / "cache"
    rows = opened(text, "text", cache, ByteTokenizer())
    assert rows.name == "mine" and len(rows) == 8 and rows.split == "train"
    assert rows.fingerprint is not None and rows.fingerprint["bytes"] == 120
    assert len(opened(text, "text", cache, ByteTokenizer(), split="train[:3]")) == 3
    with pytest.raises(UserError, match="'mine': text needs the model's tokenizer"):
        opened(text, "text", cache)


def test_a_tfds_set_with_text_is_tokenised(tmp_path: Path) -> None:
    """By its field, from the split that is named; rows are the same as those of a file."""
    features = {"body": tfds.features.Text(), "id": np.int64}
    documents = [{"body": f"document {i} " * 5, "id": i} for i in range(4)]
    directory = write_foreign(tmp_path / "set", features, documents, ("train", "valid"))
    cache, tokenizer = tmp_path / "cache", ByteTokenizer()
    rows = opened(directory, "tfds", cache, tokenizer, field="body", split="valid")
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(document) + "\n" for document in documents))
    expected = opened(lines, "text", cache, tokenizer, field="body")
    assert len(rows) == len(expected) > 10
    everything = range(len(rows))
    for name, array_NT in rows.read(everything).items():
        np.testing.assert_array_equal(array_NT, expected.read(everything)[name])
    with pytest.raises(UserError, match=r"no feature 'tokens' and none called 'text', only body"):
        opened(directory, "tfds", cache, tokenizer)


def test_a_field_of_a_set_with_tokens_is_read_by_nothing(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing reads `field`, which is 'body'; remove it"):
        opened(prepared, "tfds", tmp_path, field="body")


def test_grain_takes_the_rows_as_a_source(foreign: Path) -> None:
    grain = pytest.importorskip("grain")
    rows = open_rows(foreign, sequence_length=6, vocab_size=100)
    shuffled = grain.MapDataset.source(rows).shuffle(seed=1)
    assert sorted(row["tokens"][0] for row in shuffled) == list(range(10))


def test_counts_are_those_of_the_split(tmp_path: Path, foreign: Path) -> None:
    """Bits per byte of a held-out split follow from its own documents."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in range(1, 60)))
    prepared = prepare(
        Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "set", held_out=0.3
    )
    splits = ("train", "validation", "validation[:50%]")
    sets = [open_rows(prepared, sequence_length=16, vocab_size=258, split=s) for s in splits]
    train, held_out, part = (rows.counts["documents"] for rows in sets)
    assert train + held_out == 59 and part == held_out < train
    assert open_rows(foreign, sequence_length=6, vocab_size=100).counts is None
