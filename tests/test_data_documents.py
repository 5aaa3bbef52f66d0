from __future__ import annotations

import gzip
import json
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamapro_jax.data.readers import documents, lines
from llamapro_jax.data.readers.documents import (
    Bad,
    Content,
    Record,
    input_files,
    pieces,
    read,
    texts,
)
from llamapro_jax.errors import UserError

TEXTS = ["one\ntwo", "line separator \u2028 inside", " é😀 ", "x" * 300]


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(values: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: value}).encode() + b"\n" for value in values)


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def records(content: Content, piece_bytes: int = 2**26) -> list[Record | Bad]:
    return [record for piece in pieces(content, piece_bytes) for record in read(piece)]


def values(content: Content, piece_bytes: int = 2**26) -> list[str | dict]:
    found = records(content, piece_bytes)
    assert all(isinstance(record, Record) for record in found), found
    return [record.value for record in found]


def bad(content: Content) -> list[str]:
    return [f"{one.where}: {one.why}" for one in records(content) if isinstance(one, Bad)]


def write_parquet(path: Path, columns: dict[str, object], rows_per_group: int = 2) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def write_tfds(path: Path, examples: dict[str, list[str]], shard: int = 3) -> Path:
    path.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int64})
    identity = tfds.core.DatasetIdentity(
        name="my_text", version="1.0.0", data_dir=str(path), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=shard, file_format="array_record"
    )
    writer.initialize_splits(list(examples))
    writer.add_examples(
        {name: [{"text": text, "id": 0} for text in some] for name, some in examples.items()}
    )
    writer.close_all()
    return path


# ------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_files_and_lines_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    write(tmp_path / f"a.txt{suffix}", compress(b" whole\n\n"))
    write(tmp_path / f"b/c.jsonl{suffix}", compress(b"\n" + jsonl([*TEXTS, ""])))
    assert values(Content(str(tmp_path))) == [" whole\n\n", *TEXTS]
    found = records(Content(str(tmp_path)))
    assert [Path(one.where).name for one in found[:3]] == [
        f"a.txt{suffix}",
        f"c.jsonl{suffix}:2",
        f"c.jsonl{suffix}:3",
    ]
    # Progress is measured in what lies on disk.
    size = sum(file.stat().st_size for file in input_files(Content(str(tmp_path))))
    assert size - 30 < sum(one.bytes for one in found) <= size
    assert sum(piece.bytes for piece in pieces(Content(str(tmp_path)))) == size


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_streams_one_after_the_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    data = jsonl(TEXTS)
    file = write(tmp_path / f"a.jsonl{suffix}", compress(data[:70]) + compress(data[70:]))
    assert values(Content(str(file))) == TEXTS


def test_the_field_of_lines_is_chosen(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl(TEXTS, "content"))
    assert values(Content(str(file), field="content")) == TEXTS
    assert len(bad(Content(str(file)))) == len(TEXTS)


def test_parquet_reads_one_column_by_row_groups(tmp_path: Path) -> None:
    texts_ = [f"é {i}" for i in range(7)]
    file = write_parquet(tmp_path / "a.parquet", {"text": texts_, "other": [b"\xff"] * 7})
    assert values(Content(str(file))) == texts_
    assert records(Content(str(file)))[5].where == f"{file}: row 5"
    cut = pieces(Content(str(file)), piece_bytes=1)
    assert [[part.start for part in piece.parts] for piece in cut] == [[0], [1], [2], [3]]
    assert values(Content(str(file)), piece_bytes=1) == texts_
    later = [record.where for record in read(cut[2])]
    assert later == [f"{file}: row 4", f"{file}: row 5"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_with_any_type_of_string(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    if kind == "dictionary":
        array = pa.array(TEXTS).dictionary_encode()
    else:
        array = pa.array(TEXTS, getattr(pa, kind)())
    try:
        file = write_parquet(tmp_path / "a.parquet", {"text": array})
    except pa.ArrowNotImplementedError:
        pytest.skip(f"this pyarrow writes no {kind}")
    assert values(Content(str(file))) == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\ufefffirst")
    write(tmp_path / "b.jsonl", '\ufeff{"text": "second"}\n')
    assert values(Content(str(tmp_path))) == ["first", "second"]


def test_what_cannot_be_looked_into_is_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inside = tmp_path / "texts"
    write(inside / "a.txt", "a")
    write(tmp_path / "outside" / "b.txt", "b")
    (inside / "link").symlink_to(tmp_path / "outside")
    assert values(Content(str(inside))) == ["a"]
    assert f"{inside / 'link'} is a link to a directory" in caplog.text
    (inside / "c.txt").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="c.txt: is a link to a file that does not exist"):
        values(Content(str(inside)))
    (inside / "c.txt").unlink()

    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refused)  # whoever runs the tests may read everything
    with pytest.raises(UserError, match="texts: cannot be read .Permission denied"):
        values(Content(str(inside)))


def test_code_is_one_document_a_file(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.RS", "Makefile", "CMakeLists.txt"):
        write(tmp_path / name, name)
    for name in (".git/x.py", ".hidden.py", "data.json", "notes.txt", "picture.png", "a.py.gz"):
        write(tmp_path / name, name)
    write(tmp_path / "binary.py", b"\x7fELF\0\xff")
    write(tmp_path / "latin.py", b"# \xe9\n")
    content = Content(str(tmp_path), kind="code")
    found = [one.value for one in records(content) if isinstance(one, Record)]
    assert found == ["CMakeLists.txt", "Makefile", "a/z.RS", "b.py"]
    (message,) = bad(content)
    assert message.startswith(f"{tmp_path}/latin.py: is not UTF-8 (") and "byte 2 of it" in message


def test_tfds_by_directory_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_tfds(
        tmp_path / "my_text/1.0.0", {"train": [*TEXTS, "", "é"], "test": ["held out"]}
    )
    content = Content(str(directory), "tfds")
    assert values(content) == [*TEXTS, "é"]
    assert values(content, piece_bytes=500) == [*TEXTS, "é"]
    assert len(pieces(content, piece_bytes=500)) > 1
    assert len(pieces(content, piece_bytes=1)) == 6
    assert records(content)[4].where == f"{directory}: row 5"
    assert values(Content(str(directory), "tfds", split="test")) == ["held out"]
    assert values(Content(str(directory), "tfds", split="train[4:]")) == ["é"]
    names = [file.name for file in input_files(content)]
    assert names == [
        "dataset_info.json",
        "features.json",
        "my_text-train.array_record-00000",
        "my_text-train.array_record-00001",
    ]
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert values(Content("my_text", "tfds")) == [*TEXTS, "é"]


def test_datasets_directory(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    some = datasets.Dataset.from_dict({"text": [*TEXTS, None, ""], "n": list(range(6))})
    splits = datasets.DatasetDict({"train": some, "test": some.select([1])})
    some.with_format("numpy").save_to_disk(tmp_path / "one", num_shards=2)
    splits.save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        content = Content(str(tmp_path / name), "datasets")
        for piece_bytes in (2**26, 1000):
            found = records(content, piece_bytes)
            assert [one.value for one in found[:4]] == TEXTS
            assert found[4].where == f"{tmp_path / name}: row 4"
            assert found[4].why.startswith("'text' is null, not a string")
            assert len(found) == 5
        assert len(pieces(content, 1000)) > 1
    assert values(Content(str(tmp_path / "several"), "datasets", split="test")) == TEXTS[1:2]
    names = [file.name for file in input_files(Content(str(tmp_path / "one"), "datasets"))]
    assert names == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
        "dataset_info.json",
        "state.json",
    ]


def test_conversations_are_whole_objects(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chats = [
        {"messages": [{"role": "user", "content": f"é😀 {i}"}], "source": "a"} for i in range(3)
    ]
    data = b"".join(json.dumps(chat).encode() + b"\n" for chat in chats)
    for suffix, compress in COMPRESS.items():
        write(tmp_path / f"chat{suffix[1:]}/a.jsonl{suffix}", compress(data))
        write(tmp_path / f"chat{suffix[1:]}/readme.txt", b"no chat")
    columns = {name: [chat[name] for chat in chats] for name in chats[0]}
    (tmp_path / "table").mkdir()
    write_parquet(tmp_path / "table/a.parquet", columns)
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    for name in ("chat", "chatgz", "chatzst", "table", "saved"):
        assert values(Content(str(tmp_path / name), "chat")) == chats, name


# ------------------------------------------------------------------- pieces


LINES = st.lists(st.binary(max_size=8).map(lambda line: line.replace(b"\n", b"")), max_size=12)


@given(LINES, st.booleans(), st.integers(1, 40))
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_ranges_of_any_size_give_every_line_once(
    tmp_path: Path, some: list[bytes], end: bool, piece_bytes: int
) -> None:
    data = b"\n".join(some) + (b"\n" if end else b"")
    file = write(tmp_path / "a.jsonl", data)
    found = [
        line
        for piece in pieces(Content(str(file)), piece_bytes)
        for part in piece.parts
        for line in lines.read_lines(file, part.start, part.stop)
    ]
    assert all(line.index(b"\n") == len(line) - 1 for _, line, _ in found[:-1])
    assert b"".join(line for _, line, _ in found) == data
    assert sum(size for _, _, size in found) == len(data)
    for where, line, _ in found:
        place, _, number = where.rpartition("byte ")
        if place:
            assert data[int(number) :].startswith(line)
            assert number == "0" or data[int(number) - 1 : int(number)] == b"\n"
        else:
            assert data.split(b"\n")[int(where.rpartition(":")[2]) - 1] == line.rstrip(b"\n")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 100))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pieces_of_several_files_are_in_order_and_no_larger_than_asked(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], piece_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("files")
    expected = []
    for i, count in enumerate(counts):
        some = [f"{i} {j}" for j in range(count)]
        expected += some
        write(directory / f"{i}.jsonl", jsonl(some))
    content = Content(str(directory))
    cut = pieces(content, piece_bytes)
    assert [one.value for piece in cut for one in read(piece)] == expected
    assert all(piece.bytes <= piece_bytes for piece in cut)
    assert pickle.loads(pickle.dumps(cut)) == cut
    # Neighbours would not have fitted together, so that there are no more than needed.
    assert all(a.bytes + b.bytes > piece_bytes for a, b in zip(cut, cut[1:], strict=False))
    assert len(pieces(content)) == 1


def test_compressed_files_and_documents_are_not_cut(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.txt"):
        write(tmp_path / name, gzip.compress(jsonl(TEXTS)) if name.endswith("gz") else "x" * 99)
    assert [len(piece.parts) for piece in pieces(Content(str(tmp_path)), 10)] == [1, 1]
    assert values(Content(str(tmp_path)), 10) == [*TEXTS, "x" * 99]


def test_memory_is_bounded_by_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as out:
        for _ in range(64):
            out.write(jsonl(["x" * 2**20]))
    tracemalloc.start()
    assert sum(1 for _ in read(pieces(Content(str(file)))[0])) == 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


# ------------------------------------------------------------------- what is wrong


def test_bad_lines_are_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        jsonl(["a"])
        + b'{"text": "\xe9"}\n{"text": \n["a"]\n{}\n{"text": 3}\n{"text": null}\n'
        + rb'{"text": "\udc00"}'
        + b"\n"
        + b"[" * 100_000
        + b'\n{"text": '
        + b"1" * 5000
        + b"}\n"
        + jsonl(["b"]),
    )
    found = records(Content(str(file)))
    assert [one.value for one in found if isinstance(one, Record)] == ["a", "b"]
    expected = [
        "a.jsonl:2: is not UTF-8 (invalid continuation byte at byte 10 of it); convert it",
        "a.jsonl:3: is not JSON (",
        'a.jsonl:4: is a JSON list, not an object; each line must be one object such as {"text"',
        "a.jsonl:5: has no field 'text'; it has none; set `field` to",
        "a.jsonl:6: 'text' is a int, not a string; write the document as one string.",
        "a.jsonl:7: 'text' is null, not a string",
        "a.jsonl:8: 'text' holds half of a surrogate pair",
        "a.jsonl:9: is JSON that cannot be read (maximum recursion depth",
        "a.jsonl:10: is JSON that cannot be read (Exceeds the limit",
    ]
    for message, start in zip(bad(Content(str(file))), expected, strict=True):
        assert message.removeprefix(f"{tmp_path}/").startswith(start)
    assert sum(one.bytes for one in found) == file.stat().st_size
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not UTF-8"):
        list(texts(Content(str(file))))


def test_bad_lines_of_later_ranges_have_their_byte(tmp_path: Path) -> None:
    good = jsonl(["a" * 50])
    file = write(tmp_path / "a.jsonl", good * 3 + b"[]\n")
    found = [one for one in records(Content(str(file)), len(good) + 1) if isinstance(one, Bad)]
    assert [one.where for one in found] == [f"{file}: byte {3 * len(good)}"]


def test_bad_conversations(tmp_path: Path) -> None:
    pair, half = rb'{"messages": "\ud83d\ude00"}', rb'{"messages": [{"content": "\uD83d"}]}'
    file = write(tmp_path / "a.jsonl", b"\n".join([pair, half, b"\n[1]", b"{}"]))
    found = records(Content(str(file), "chat"))
    assert [one.value for one in found if isinstance(one, Record)] == [{"messages": "😀"}, {}]
    messages = bad(Content(str(file), "chat"))
    assert "a.jsonl:2: it holds half of a surrogate pair" in messages[0]
    assert (
        'a.jsonl:4: is a JSON list, not an object; each line must be one object such as {"me'
        in (messages[1])
    )


def test_a_string_of_parquet_that_is_not_utf8_is_bad(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32))
    array = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xe9b")])
    file = write_parquet(tmp_path / "a.parquet", {"text": array})
    for kind in ("text", "chat"):
        found = records(Content(str(file), kind))
        assert [type(one) for one in found] == [Record, Bad, Record]
        assert found[1].where == f"{file}: row 1" and "not UTF-8" in found[1].why


def test_nulls_and_empty_rows_of_parquet(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": ["a", None, "", "b"]})
    found = records(Content(str(file)))
    assert [one.where[-1] for one in found] == ["0", "1", "3"]
    assert found[1].why.startswith("'text' is null")
    empty = write_parquet(tmp_path / "empty.parquet", {"text": np.array([], str)})
    assert values(Content(str(empty))) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "flip", "end", "other"])
def test_damaged_compression_is_an_error(tmp_path: Path, suffix: str, harm: str) -> None:
    data = COMPRESS[suffix](jsonl([str(i * 7919) for i in range(500)]))
    middle = len(data) // 2
    harmed = {
        "cut": data[:middle],
        "flip": data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :],
        "end": data[:-1],
        "other": b"not compressed at all",
    }[harm]
    file = write(tmp_path / f"a.jsonl{suffix}", harmed)
    with pytest.raises(UserError, match=rf"\{suffix}: cannot be decompressed to its end \(.*again"):
        records(Content(str(file)))


def test_a_line_that_does_not_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LARGEST", 1000)
    exact = write(tmp_path / "exact.jsonl", b" " * 999 + b"\n")
    assert records(Content(str(exact))) == []
    for name in ("a.jsonl", "a.jsonl.gz"):
        data = jsonl(["a"]) + b" " * 1001
        file = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
        with pytest.raises(UserError, match=r":2: is a line of more than 1,000 bytes.*as JSONL"):
            records(Content(str(file)))
    with pytest.raises(UserError, match=r"a\.txt: is one document of more than 1,000 bytes"):
        records(Content(str(write(tmp_path / "a.txt", "x" * 1001))))


@pytest.mark.parametrize("harm", ["cut", "flip", "other", "empty"])
def test_damaged_parquet_is_an_error(tmp_path: Path, harm: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": [str(i * 7919) for i in range(500)]}, 500)
    data = file.read_bytes()
    harmed = {
        "cut": data[:-100],
        "flip": data[:100] + b"\xff" * 900 + data[1000:],
        "other": b"no Parquet",
        "empty": b"",
    }[harm]
    write(file, harmed)
    with pytest.raises(UserError, match=r"a\.parquet: is damaged or no Parquet file \(.*again"):
        records(Content(str(file)))


def test_columns_that_cannot_be_read_are_refused_early(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"content": ["a"], "n": [1]})
    with pytest.raises(UserError, match=r"no column 'contents', only 'content', 'n'; set `field`"):
        pieces(Content(str(file), field="contents"))
    with pytest.raises(UserError, match=r"the column 'n' is int64, not a string"):
        pieces(Content(str(file), field="n"))
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"content": ["a"], "n": [1]}).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    with pytest.raises(UserError, match=r"no column 'text', only 'content', 'n'; set `field`"):
        pieces(Content(saved, "datasets"))
    with pytest.raises(UserError, match=r"the column 'n' is int64, not a string"):
        pieces(Content(saved, "datasets", field="n"))
    directory = str(write_tfds(tmp_path / "t/1.0.0", {"train": ["a"]}))
    with pytest.raises(UserError, match=r"no feature 'txt', only 'id', 'text'.*mean 'text'"):
        pieces(Content(directory, "tfds", field="txt"))
    with pytest.raises(UserError, match=r"the feature 'id' is .*int64.*, not text"):
        pieces(Content(directory, "tfds", field="id"))


def test_splits_that_are_not_there_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "several")
    with pytest.raises(UserError, match=r"no split 'tests', only train, test\. Did you mean 'test"):
        input_files(Content(str(tmp_path / "several"), "datasets", split="tests"))
    with pytest.raises(UserError, match=r"a single data set, not several splits.*'test'; remove"):
        input_files(Content(str(tmp_path / "one"), "datasets", split="test"))
    with pytest.raises(UserError, match=r"is not a directory that `save_to_disk`"):
        input_files(Content(str(tmp_path), "datasets"))
    directory = write_tfds(tmp_path / "t/1.0.0", {"train": ["a"]})
    with pytest.raises(UserError, match=r"has no split 'trian', only train.*mean 'train'"):
        input_files(Content(str(directory), "tfds", split="trian"))


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_damaged_data_sets_are_an_error(tmp_path: Path, harm: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a" * 1000] * 50}).save_to_disk(tmp_path / "one")
    content = Content(str(tmp_path / "one"), "datasets")
    file = next((tmp_path / "one").glob("*.arrow"))
    data = file.read_bytes()
    file.write_bytes(data[:20_000] if harm == "cut" else data.replace(b"a" * 999, b"\xff" * 999))
    with pytest.raises(UserError, match=r"one: is damaged or incomplete \(.*save the data set"):
        records(content)
    file.unlink()
    with pytest.raises(UserError, match=r"\.arrow: cannot be read \(No such file"):
        pieces(content)
    write(tmp_path / "one/state.json", "{}")
    with pytest.raises(UserError, match=r"is damaged or incomplete \('_data_files'\); save"):
        pieces(content)


def test_a_truncated_shard_of_tfds_is_an_error(tmp_path: Path) -> None:
    directory = write_tfds(tmp_path / "t/1.0.0", {"train": ["a" * 1000] * 9})
    content = Content(str(directory), "tfds")
    cut = pieces(content)
    shard = input_files(content)[-2]
    shard.write_bytes(shard.read_bytes()[:-100])
    for attempt in (lambda: pieces(content), lambda: list(read(cut[0]))):
        with pytest.raises(UserError, match=r"row \d+ cannot be read, the file is damaged"):
            attempt()


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kind is 'txt'; it must be one of text, .*mean 'text'"):
        input_files(Content(str(tmp_path), "txt"))
    for kind in ("text", "code", "chat"):
        with pytest.raises(UserError, match=r"absent: no such file or directory"):
            input_files(Content(str(tmp_path / "absent"), kind))
        with pytest.raises(UserError, match="no file below it ends in"):
            input_files(Content(str(tmp_path), kind))
    file = write(tmp_path / "a.txt", "x")
    with pytest.raises(UserError, match=r"a\.txt: a source of kind 'chat' is .*\.jsonl, \.parq"):
        input_files(Content(str(file), "chat"))
    with pytest.raises(UserError, match=r"a\.txt: a source of kind 'code' is .*suffixes of source"):
        input_files(Content(str(file), "code"))
    pytest.importorskip("datasets").Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"set kind to 'datasets'"):
        input_files(Content(str(tmp_path / "d")))
    write_tfds(tmp_path / "t/1.0.0", {"train": ["a"]})
    with pytest.raises(UserError, match=r"set kind to 'tfds'"):
        input_files(Content(str(tmp_path / "t")))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    (piece,) = pieces(Content(str(file)))
    file.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(No such file or directory"):
        list(read(piece))


def test_an_absent_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl.zst", "b.parquet"):
        content = Content(str(write(tmp_path / name, b"never read")))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pyarrow", None)
            with pytest.raises(UserError, match=r"needs the package pyarrow; .*llamapro_jax\[data"):
                input_files(content)
    write(tmp_path / "saved/state.json", '{"_data_files": []}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets; .*llamapro_jax\[data"):
        input_files(Content(str(tmp_path / "saved"), "datasets"))


def test_lines_need_no_optional_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "datasets", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    assert list(documents.texts(Content(str(file)))) == TEXTS
