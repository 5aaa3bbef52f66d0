"""`prepare`: pieces, processes, kills, bad records, and the verb."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from data_sources import ByteTokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared import TEXTS, documents_of, fixtures, rows_of, tree, write_lines

from llamapro_jax import cli
from llamapro_jax.data import records
from llamapro_jax.data.chat import ChatTemplate, messages_of
from llamapro_jax.data.packing import pack
from llamapro_jax.data.preparation import prepare as engine
from llamapro_jax.data.preparation import shards
from llamapro_jax.data.preparation.config import load_prepare_config
from llamapro_jax.data.preparation.prepare import (
    Preparation,
    fingerprint,
    prepare,
    read_fingerprint,
)
from llamapro_jax.data.readers.documents import Content, pieces
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import Tokenizer, load_tokenizer

lines, small_pieces, tokenizer = fixtures()


# ------------------------------------------------------------------- rows and files


def test_the_rows_of_one_piece_are_those_of_pack(lines: Path, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    directory = prepare(Content(str(lines)), tokenizer, 16, target=tmp_path / "set")
    expected = list(pack(tokenizer.encode_batch(TEXTS), 16))
    found = rows_of(directory)
    assert len(found) == len(expected)
    for index, row in enumerate(expected):
        assert all((found[index][name] == row[name]).all() for name in row)


def test_every_piece_is_a_shard_that_tfds_reads(
    lines: Path, tmp_path: Path, small_pieces: None
) -> None:
    directory = prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "set")
    count = len(pieces(Content(str(lines)), 500))
    shards_found = sorted(directory.glob("rows-train*"))
    assert len(shards_found) == count > 5
    builder = tfds.builder_from_directory(str(directory))
    record = read_fingerprint(directory)
    assert record is not None
    assert builder.info.splits["train"].num_examples == record["rows"] == len(rows_of(directory))
    assert sum(builder.info.splits["train"].shard_lengths) == len(builder.as_data_source("train"))
    assert [d[1:-1] for d in documents_of(rows_of(directory))] == [
        d[1:-1] for d in ByteTokenizer().encode_batch(TEXTS)
    ]
    assert record["tokens"] == sum(len(text.encode()) + 2 for text in TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "texts"]


def test_pieces_without_rows_leave_no_gap(tmp_path: Path, small_pieces: None) -> None:
    """Of a held-out split most pieces have none; of lines of blanks a piece may have none."""
    file = write_lines(tmp_path / "a.jsonl", [*TEXTS[:5], *[b" " * 90] * 20, *TEXTS[5:10]])
    directory = prepare(
        Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "a", held_out=0.2
    )
    for split in ("train", "validation"):
        names = sorted(path.name for path in directory.glob(f"rows-{split}*"))
        assert names == [f"rows-{split}.array_record-{i:05d}" for i in range(len(names))]
        assert 0 < len(names) < len(pieces(Content(str(file)), 500))
        assert len(documents_of(rows_of(directory, split=split))) > 0


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=30
    ),
    st.integers(2, 40),
    st.sampled_from([0.0, 0.3]),
    st.integers(40, 400),
)
def test_every_document_is_there_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    sequence_length: int,
    held_out: float,
    piece_bytes: int,
) -> None:
    directory, tokenizer = tmp_path_factory.mktemp("case"), ByteTokenizer()
    file = write_lines(directory / "lines.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "pieces", lambda content: pieces(content, piece_bytes))
        one = Preparation(
            Content(str(file)), tokenizer, sequence_length, directory / "set", held_out=held_out
        )
        try:
            one.run()
        except UserError as error:
            assert held_out and "to train on" in str(error)
            return
    record = read_fingerprint(directory / "set")
    assert record is not None
    found: list[list[int]] = []
    for split, counts in record["splits"].items():
        if counts["rows"]:
            documents = documents_of(rows_of(directory / "set", sequence_length, split))
            assert len(documents) == counts["documents"]
            found += documents
    assert sorted(found) == sorted(tokenizer.encode_batch(texts))


def test_the_same_document_is_never_on_both_sides(lines: Path, tmp_path: Path) -> None:
    write_lines(lines.with_name("more.jsonl"), TEXTS[::-1])
    directory = prepare(
        Content(str(lines.parent)), ByteTokenizer(), 16, target=tmp_path / "set", held_out=0.25
    )
    train, held_out = (
        [tuple(d) for d in documents_of(rows_of(directory, split=split))]
        for split in ("train", "validation")
    )
    assert len(train) + len(held_out) == 120 and not set(train) & set(held_out)
    assert 10 < len(held_out) < 50
    record = read_fingerprint(directory)
    assert record is not None and record["held_out"] == 0.25
    assert record["documents"] == 120 and record["splits"]["validation"]["documents"] == len(
        held_out
    )


def test_all_held_out_is_an_error(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", ["y"])
    with pytest.raises(
        UserError, match=r"held_out is 0\.99.* leaves none of its 1 documents to train on; lower it"
    ):
        prepare(Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "set", held_out=0.99)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_row_is_stored_as_tfds_stores_it() -> None:
    row = next(pack([[5, 6, 7], [8, 9]], 4))
    features = records._features(4)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    example = serializer.get_tf_example(features.encode_example(row))
    assert records._serialized(row) == example.SerializeToString(deterministic=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_the_systems_word() -> None:
    with pytest.raises(OSError, match="/dev/full: cannot be written .*No space left on device"):
        records.write_shard(pack([range(10000)], 16), Path("/dev/full"))


# ------------------------------------------------------------------- what is there already


def test_another_data_set_is_never_replaced(lines: Path, tmp_path: Path) -> None:
    target = prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "set")
    other = ByteTokenizer()
    other.fingerprint = "another"

    def refused(why: str, length: int = 16, tokenizer: Any = None, **options: Any) -> None:
        before = tree(target)
        with pytest.raises(UserError, match=rf"set: was prepared differently: .*{why}"):
            prepare(
                Content(str(options.pop("path", lines))),
                tokenizer or ByteTokenizer(),
                length,
                target=target,
                **options,
            )
        assert tree(target) == before

    refused(r"sequence_length is 16, not 32", 32)
    refused(r"tokenizer is [0-9a-f]{12}, not another", tokenizer=other)
    refused(r"held_out is 0.0, not 0.5", held_out=0.5)
    write_lines(lines, TEXTS[1:])
    refused(r"lines\.jsonl is changed\. Remove it")
    write_lines(lines.with_name("b.jsonl"), TEXTS)
    refused(r"lines\.jsonl is changed; b\.jsonl is not in it", path=lines.parent)


def test_what_is_no_data_set_is_not_replaced(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="set: is not empty"):
        prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "set")
    (tmp_path / "empty").mkdir()
    assert len(
        rows_of(prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "empty"))
    )


@pytest.mark.parametrize("content", ["[]", "{}", '{"fingerprint": "x", "documents": 3}'])
def test_the_fingerprint_of_another_program_is_not_ours(
    lines: Path, tmp_path: Path, content: str
) -> None:
    target = tmp_path / "set"
    target.mkdir()
    (target / "fingerprint.json").write_text(content)
    assert read_fingerprint(target) is None
    with pytest.raises(UserError, match="set: is not empty"):
        prepare(Content(str(lines)), ByteTokenizer(), 16, target=target)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": 3}'])
def test_damaged_metadata_is_said(lines: Path, tmp_path: Path, name: str, content: str) -> None:
    target = prepare(Content(str(lines)), ByteTokenizer(), 16, target=tmp_path / "set")
    (target / name).write_text(content)
    with pytest.raises(UserError, match="is damaged or missing .*prepare the data set again"):
        rows_of(target)


def test_the_fingerprint_without_preparing(lines: Path, tmp_path: Path) -> None:
    content, tokenizer = Content(str(lines)), ByteTokenizer()
    record = read_fingerprint(prepare(content, tokenizer, 16, target=tmp_path / "set"))
    assert record is not None
    assert fingerprint(content, tokenizer, 16) == record["fingerprint"]
    assert fingerprint(content, tokenizer, 16, held_out=0.1) != record["fingerprint"]
    # What has its default is not in the hash: runs of earlier releases find their texts again.
    parts = {name: record[name] for name in ("format", "tokenizer", "sequence_length", "files")}
    hashed = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert record["fingerprint"] == hashed
    assert fingerprint(Content(str(lines), field="body"), tokenizer, 16) != record["fingerprint"]


# ------------------------------------------------------------------- bad records


def test_bad_records_are_left_out_and_counted(
    tmp_path: Path, small_pieces: None, capfd: pytest.CaptureFixture[str]
) -> None:
    texts: list[Any] = [*TEXTS]
    for place in (3, 17, 40):
        texts[place] = b'{"text": 5}'
    file = write_lines(tmp_path / "a.jsonl", texts)
    directory = prepare(
        Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "set", max_bad=0.05
    )
    record = read_fingerprint(directory)
    assert record is not None
    assert (record["records"], record["documents"], record["bad"]) == (60, 57, 3)
    assert [bad["where"] for bad in record["bad_records"]] == [f"{file}:{n}" for n in (4, 18, 41)]
    assert "'text' is a int" in record["bad_records"][0]["why"]
    assert len(documents_of(rows_of(directory))) == 57
    errors = capfd.readouterr().err
    assert f"a.jsonl: left out {file}:4: 'text' is a int" in errors and ", 3 bad" in errors
    with pytest.raises(UserError, match=r"a\.jsonl:4: 'text' is a int.*\(max_bad is the share"):
        prepare(Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "set")
    # Within a run there is no such setting.
    with pytest.raises(UserError, match=r"a\.jsonl:4: .*prepare this source with `llamapro prep"):
        prepare(Content(str(file)), ByteTokenizer(), 16, cache=tmp_path / "cache")


def test_too_many_bad_records_end_it(tmp_path: Path, small_pieces: None) -> None:
    file = write_lines(tmp_path / "a.jsonl", [*TEXTS[:30], *[b"[]"] * 3])
    with pytest.raises(
        UserError, match=r"3 of its records are bad, of 33, .* \(0\.05\); the first: .*a\.jsonl:31"
    ):
        prepare(Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "set", max_bad=0.05)
    assert not (tmp_path / "set").exists()


def test_what_cannot_end_well_ends_early(tmp_path: Path) -> None:
    """As soon as too many are bad even when all that are left are good, not before."""
    good = [b'{"text": "abcdefgh"}'] * 6000
    file = write_lines(tmp_path / "a.jsonl", [*[b'{"test": "abcdefgh"}'] * 1500, *good])
    tokenizer = ByteTokenizer()
    with pytest.raises(UserError, match=r"are bad, of 7,5\d\d, "):
        prepare(Content(str(file)), tokenizer, 16, target=tmp_path / "set", max_bad=0.1)
    assert tokenizer.calls == 0
    prepare(Content(str(file)), tokenizer, 16, target=tmp_path / "set", max_bad=0.2)


def test_of_many_bad_records_the_first_are_kept(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BAD_RECORDS_KEPT", 5)
    file = write_lines(tmp_path / "a.jsonl", [*[b"[]"] * 20, *TEXTS])
    record = read_fingerprint(
        prepare(Content(str(file)), ByteTokenizer(), 16, target=tmp_path / "set", max_bad=0.5)
    )
    assert record is not None and record["bad"] == 20
    assert [bad["where"] for bad in record["bad_records"]] == [f"{file}:{n}" for n in range(1, 6)]


# ------------------------------------------------------------------- conversations


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def test_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [
        conversation("question 1", "answer 1", "question 2", "answer 2"),
        conversation("question", "some words that differ " * 3, "more", "some words " * 60),
        conversation("some words that differ " * 80, "answer"),
        conversation("question", ""),
        {"prompt": "question", "completion": "answer"},
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    content = Content(str(file), "chat")
    directory = prepare(content, tokenizer, 128, target=tmp_path / "set", max_bad=0.3)
    record = read_fingerprint(directory)
    assert record is not None
    names = ("records", "documents", "bad", "dropped", "turns_cut", "bytes")
    assert [record[name] for name in names] == [5, 3, 1, 1, 2, 0]
    assert record["bad_records"][0]["where"] == f"{file}:4"
    template = ChatTemplate.load("llama_pro", tokenizer)
    assert record["template"] == template.fingerprint
    rows, found = rows_of(directory, 128), []
    for row in map(rows.__getitem__, range(len(rows))):
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            found.append((row["tokens"][inside].tolist(), row["loss_mask"][inside].tolist()))
    expected = []
    for index in (0, 1, 4):
        fitted = template.fit(messages_of(records[index]), 128)
        assert fitted is not None
        expected.append((fitted[0].tolist(), fitted[1].tolist()))
    assert sorted(found) == sorted(expected)
    assert record["targets"] == sum(sum(mask) for _, mask in expected)
    assert load_tokenizer(directory / "tokenizer").chat_template == template.text


def test_conversations_are_held_out_whole(
    tmp_path: Path, tokenizer: Tokenizer, small_pieces: None
) -> None:
    file = tmp_path / "chat.jsonl"
    records = [conversation(f"question {i}", f"answer {i}") for i in range(60)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    content = Content(str(file), "chat")
    directory = prepare(content, tokenizer, 64, target=tmp_path / "set", held_out=0.3)
    record = read_fingerprint(directory)
    assert record is not None and record["documents"] == 60
    assert 5 < record["splits"]["validation"]["documents"] < 35


def test_a_template_that_cannot_be_used_is_found_first(lines: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="template is 'nothing', which is no file"):
        Preparation(Content(str(lines), "chat"), tokenizer, 16, Path("set"), template="nothing")


# ------------------------------------------------------------------- the verb


@pytest.fixture
def project(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_lines(tmp_path / "texts" / "prose.jsonl", TEXTS)
    write_lines(tmp_path / "texts" / "code.jsonl", TEXTS[:20])
    (tmp_path / "prepare.yaml").write_text(
        f"output: sets\ntokenizer: {tokenizer.source}\nsequence_length: 32\nworkers: 1\nsources:\n"
        "  - {name: prose, path: texts/prose.jsonl, held_out: 0.2}\n"
        "  - {name: code, path: texts/code.jsonl}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_verb_prepares_all_sources_once(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", "prepare.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "  - {name: prose, kind: tfds, path: sets/prose}" in shown
    assert "  - {name: prose, kind: tfds, path: sets/prose, split: validation}" in shown
    assert "path: sets/code, split" not in shown
    assert "documents" in shown and "padding" in shown and " 60 " in shown
    assert len(documents_of(rows_of(Path("sets/code"), 32), 1, 2)) == 20
    before = tree(project / "sets")
    assert cli.main(["prepare", "prepare.yaml"]) == 0
    assert "sets/code: is prepared already" in capsys.readouterr().out
    assert tree(project / "sets") == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.1.path=nowhere", "nowhere: no such file or directory"),
        ("tokenizer=nowhere", "nowhere: no such directory"),
        ("sources.1={name: code, path: texts, kind: chat, template: nowhere}", "template is 'nowh"),
        ("sources.1.field=body", "texts/code.jsonl:1: has no field 'body'"),
        ("sources.1={name: code, path: texts/code.jsonl, field: x, max_bad: 0.5}", "no field "),
        ("sources.1={name: code, path: texts/code.jsonl, kind: chat}", "texts/code.jsonl:1: "),
    ],
)
def test_nothing_is_tokenised_before_all_is_checked(
    project: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert cli.main(["prepare", "prepare.yaml", override]) == 2
    assert message in capsys.readouterr().err
    assert not Path("sets").exists()


def test_another_data_set_in_the_place_of_the_second_is_found_first(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", "prepare.yaml"]) == 0
    subprocess.run(["rm", "-r", "sets/prose"], check=True)
    write_lines(project / "texts" / "code.jsonl", TEXTS[:21])
    assert cli.main(["prepare", "prepare.yaml"]) == 2
    assert "sets/code: was prepared differently: code.jsonl is changed." in capsys.readouterr().err
    assert not Path("sets/prose").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sequence_lenght=4", "override 'sequence_lenght=4': sequence_lenght: unknown key. Did"),
        ("sources.1.name=prose", "'prose' names two entries of sources"),
        ("sources.1.name=a/b", "'a/b' must be letters"),
        ("sources.0.held_out=1", "must be at least 0 and below 1, is 1.0."),
        ("sources.0.max_bad=-0.1", "must be at least 0 and below 1, is -0.1."),
        ("sources.0.template=tokenizer", "which kind 'text' does not read"),
        ("sources.0.split=test", "is 'test', which kind 'text' does not read"),
        ("sequence_length=1", "must be at least 2, is 1."),
        ("workers=0", "must be positive, is 0."),
        ("sources=[]", "names nothing to prepare"),
    ],
)
def test_a_configuration_that_is_wrong(project: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_prepare_config("prepare.yaml", [override])
    assert message in str(error.value)
