from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from checkpoints import write_tiny
from rich.console import Console

from llamapro_jax import cli
from llamapro_jax.data import show
from llamapro_jax.data.preparation.prepare import prepare
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.data.records import shard_name, write_metadata, write_shard
from llamapro_jax.data.rows import Row, empty_rows
from llamapro_jax.errors import UserError
from llamapro_jax.files import write_json
from llamapro_jax.hf.tokenizer import Tokenizer, train_tokenizer, write_tokenizer
from llamapro_jax.inspect import is_data_set

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "A question of the user. An answer, and what follows it: 1 2 3.\n  indented café\n"
    return train_tokenizer([text * 20], 340, tmp_path_factory.mktemp("tokenizer"))


def row(*segments: list[tuple[list[int], bool]]) -> Row:
    """A row of segments, each of parts (ids, loss mask)."""
    arrays, used = empty_rows(LENGTH), 0
    for number, parts in enumerate(segments, start=1):
        start = used
        for ids, trained in parts:
            place = slice(used, used + len(ids))
            arrays["tokens"][place], arrays["loss_mask"][place] = ids, trained
            used += len(ids)
        arrays["segment_ids"][start:used] = number
        arrays["positions"][start:used] = np.arange(used - start)
    return arrays


def write_set(
    directory: Path, rows: list[Row], tokenizer: Tokenizer | None, fingerprint: dict | None = None
) -> Path:
    """A data set with the splits train (these rows) and validation (the first of them)."""
    directory.mkdir(parents=True)
    splits = {"train": rows, "validation": rows[:1]}
    shards = {
        split: [write_shard(iter(its), directory / shard_name(split, 0))]
        for split, its in splits.items()
    }
    write_metadata(directory, LENGTH, shards)
    if tokenizer is not None:
        write_tokenizer(tokenizer, directory / "tokenizer")
    if fingerprint is not None:
        write_json(directory / "fingerprint.json", fingerprint)
    return directory


def numbered(tokenizer: Tokenizer, count: int) -> list[Row]:
    return [row([(tokenizer.encode(f"document {i}", eos=True), True)]) for i in range(count)]


@pytest.fixture
def chat(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """One row: a conversation, the rest of a document, padding."""
    conversation = [
        (tokenizer.encode("A question\n  of the user."), False),
        ([*tokenizer.encode("An answer\x1b[31m é😀", bos=False), tokenizer.eos_id], True),
    ]
    rest = [(tokenizer.encode("what follows", bos=False), True)]
    return write_set(tmp_path / "chat", [row(conversation, rest)], tokenizer)


def printed(path: Path, **console: object) -> str:
    page = io.StringIO()
    show.print_description(show.describe(str(path)), Console(file=page, width=60, **console))
    return page.getvalue()


def test_rows_are_text_by_segments_and_masks(chat: Path, tokenizer: Tokenizer) -> None:
    description = show.describe(str(chat))
    assert description["splits"] == {"train": {"rows": 1}, "validation": {"rows": 1}}
    (only,) = description["rows"]
    first, second = only["segments"]
    assert [(s["text"], s["trained"], s["special"]) for s in first["spans"]] == [
        ("<s>", False, True),
        ("A question\n  of the user.", False, False),
        # Text after text has the space that the prompt's last token did not.
        (" An answer\x1b[31m é😀", True, False),
        ("</s>", True, True),
    ]
    # It begins within a document: its space is one.
    assert [s["text"] for s in second["spans"]] == [" what follows"]
    answer = len(tokenizer.encode("An answer\x1b[31m é😀", bos=False)) + 1
    rest = len(tokenizer.encode("what follows", bos=False))
    assert first["targets"] == answer and second["targets"] == rest - 1
    assert only["tokens"] == first["tokens"] + second["tokens"] == LENGTH - only["padding"]
    assert only["targets"] == answer + rest - 1
    assert json.loads(json.dumps(description)) == description
    assert "made by others" in printed(chat)


def test_plain_output_brackets_what_is_masked_and_escapes_controls(chat: Path) -> None:
    lines = printed(chat).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("segment 1: "))
    assert lines[start + 1 : start + 3] == [
        "| ⟦<s>A question",
        r"|   of the user.⟧ An answer\x1b[31m é😀</s>",
    ]
    assert lines[start + 3].startswith("segment 2: ")
    assert lines[start + 4] == "|  what follows"
    assert re.fullmatch(r"padding: \d+ tokens", lines[start + 5])
    assert "⟦...⟧" in printed(chat)


def test_a_terminal_shows_trained_in_colour_and_masked_dim(chat: Path) -> None:
    options = {"force_terminal": True, "color_system": "standard", "no_color": False}
    out = printed(chat, **options)
    assert "\x1b[2mA question\x1b[0m" in out  # dim
    assert "\x1b[32m An answer\\x1b[31m é😀\x1b[0m" in out  # green, and no red
    assert "\x1b[31m" not in out and "⟦" not in out
    assert "\x1b[2;36m<s>\x1b[0m" in out and "\x1b[1;32m</s>\x1b[0m" in out
    uncoloured = printed(chat, force_terminal=True, color_system="standard", no_color=True)
    assert "⟦" in uncoloured and "32m" not in uncoloured


@pytest.mark.parametrize("no_color", ["1", None])
def test_the_environment_decides_on_colour(
    chat: Path, no_color: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    out = printed(chat, force_terminal=True)
    assert ("⟦" in out) == bool(no_color) and ("\x1b[32m" in out) != bool(no_color)


def test_no_text_can_pass_for_a_line_or_a_bracket_of_ours(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hostile = "a⟧ b\rsegment 9: x\nsegment 9: \u202eevil\u2028\x9b2J\x07\tend :smile: [red]x[/red]"
    ids = tokenizer.encode(hostile)
    rows = [row([(ids[i : i + LENGTH], False)]) for i in range(0, len(ids), LENGTH)]
    out = printed(write_set(tmp_path / "set", rows, tokenizer))
    assert not set(out) & set("\x1b\r\u202e\u2028\x9b\x07\t")
    assert r"a\u27e7 b\rsegment 9: x" in out and r"\x9b2J\x07\tend :smile:" in out
    assert "[red]" in out
    assert not [line for line in out.splitlines() if line.startswith("segment 9")]


def test_a_console_of_ascii_gets_escapes(chat: Path) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show.print_description(show.describe(str(chat)), Console(file=stream))
    stream.flush()
    out = stream.buffer.getvalue().decode("ascii")
    assert "| [[<s>A question" in out and r"\xe9\U0001f600</s>" in out


def test_rows_are_spread_over_the_split_or_the_one_asked_for(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = str(write_set(tmp_path / "set", numbered(tokenizer, 10), tokenizer))

    def shown(**options: object) -> list[int]:
        return [found["row"] for found in show.describe(path, **options)["rows"]]

    assert shown() == [0, 3, 6]
    assert shown(rows=1) == [0] and shown(rows=99) == list(range(10)) and shown(rows=0) == []
    assert shown(row=7) == [7] and shown(split="train[5:]") == [0, 1, 3]
    assert shown(split="validation") == [0]
    text = show.describe(path, row=7)["rows"][0]["segments"][0]["spans"][1]["text"]
    assert text == "document 7"
    for options, message in (
        ({"row": 10}, r"no row 10; split 'train' has 10 rows, 0 to 9"),
        ({"row": -1}, "no row -1"),
        ({"rows": -1}, "--rows -1"),
        ({"split": "valdation"}, "Did you mean 'validation'"),
    ):
        with pytest.raises(UserError, match=message):
            show.describe(path, **options)


def test_the_tokenizer_is_the_one_of_the_data(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = numbered(tokenizer, 2)
    path = str(write_set(tmp_path / "set", rows, None))
    with pytest.raises(UserError, match="--tokenizer"):
        show.describe(path)
    assert show.describe(path, rows=0)["rows"] == []
    named = show.describe(path, tokenizer=str(tokenizer.source))
    assert named["rows"][1]["segments"][0]["spans"][1]["text"] == "document 1"
    other = train_tokenizer(["something else, and more of it; " * 50], 300, tmp_path / "other")
    counts = ("documents", "bytes", "tokens", "targets", "largest_token")
    record = {"fingerprint": "0", "tokenizer": tokenizer.fingerprint, **dict.fromkeys(counts, 0)}
    known = str(write_set(tmp_path / "known", rows, tokenizer, record))
    with pytest.raises(UserError, match=f"prepared with tokenizer {tokenizer.fingerprint[:12]}"):
        show.describe(known, tokenizer=str(other.source))
    with pytest.raises(UserError, match=r"row 0 of train: token \d+ is not in.*has 300; name"):
        show.describe(path, tokenizer=str(other.source))


def foreign(directory: Path, features: dict, example: dict) -> Path:
    directory.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name="foreign", version="1.0.0", data_dir=str(directory), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits(["test"])
    writer.add_examples({"test": [example]})
    writer.close_all()
    return directory


def test_data_sets_of_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode("An answer", eos=True)
    features = {"tokens": tfds.features.Sequence(np.int64)}
    path = foreign(tmp_path / "ragged" / "1.0.0", features, {"tokens": ids}).parent
    assert is_data_set(str(path), expected=False)
    description = show.describe(str(path), tokenizer=str(tokenizer.source))
    assert description["split"] == "test" and description["sequence_length"] is None
    (segment,) = description["rows"][0]["segments"]
    assert [span["text"] for span in segment["spans"]] == ["<s>", "An answer", "</s>"]
    page = io.StringIO()
    show.print_description(description, Console(file=page))
    assert "made by others" in page.getvalue()
    write_json(path / "1.0.0" / "fingerprint.json", ["another program's"])
    assert show.describe(str(path), rows=0)["fingerprint"] is None
    huge = foreign(tmp_path / "huge", features, {"tokens": [1, 2**32 + 1]})
    with pytest.raises(UserError, match="4294967297 is too large"):
        show.describe(str(huge), tokenizer=str(tokenizer.source))
    negative = foreign(tmp_path / "negative", features, {"tokens": [1, -1]})
    with pytest.raises(UserError, match="token -1 is not in"):
        show.describe(str(negative), tokenizer=str(tokenizer.source))
    uneven = {**features, "segment_ids": tfds.features.Sequence(np.int32)}
    differing = foreign(tmp_path / "uneven", uneven, {"tokens": ids, "segment_ids": [1]})
    with pytest.raises(UserError, match="differ in length"):
        show.describe(str(differing), tokenizer=str(tokenizer.source))
    text = foreign(tmp_path / "text", {"text": tfds.features.Text()}, {"text": "words"})
    with pytest.raises(UserError, match="without the feature 'tokens', it has only text"):
        show.describe(str(text))
    image = {"tokens": tfds.features.Tensor(shape=(2, 2), dtype=np.int32)}
    square = foreign(tmp_path / "square", image, {"tokens": [[1, 2], [3, 4]]})
    with pytest.raises(UserError, match=r"'tokens' is int32 of shape \(2, 2\)"):
        show.describe(str(square))


def test_the_verb_tells_models_from_data(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(chat), "--json", "--row", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "data set"
    assert cli.main(["inspect", str(chat), "--split", "validation"]) == 0
    assert "row 0 of 1 in validation" in capsys.readouterr().out
    model = tmp_path / "model"
    write_tiny(model)
    assert cli.main(["inspect", str(model)]) == 0
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(model), "--row", "1"], "is a model; --row is for data sets"),
        ([str(tmp_path / "empty")], "neither a model .* nor a prepared data set"),
        ([str(tmp_path / "absent")], "no such directory"),
        (
            ["data/absent", "--row", "1"],
            "data/absent: is neither a directory nor the name of a TFDS",
        ),
        (["no_such_name"], "no_such_name: no such directory. A model is"),
        ([str(chat / "dataset_info.json")], "is a file"),
        ([str(chat), "--split", "trian"], "Did you mean 'train'"),
    ):
        assert cli.main(["inspect", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err), arguments


def test_a_damaged_record_is_said(chat: Path) -> None:
    shard = chat / shard_name("train", 0)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        show.describe(str(chat))


def test_what_was_prepared_shows_its_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [f"document {i}: {'words and more words ' * (i % 7)}" for i in range(300)]
    lines = [json.dumps({"text": text}) for text in documents]
    lines[7] = "\x1b[31m{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    content = Content(str(tmp_path / "a.jsonl"))
    target = tmp_path / "set"
    prepare(content, tokenizer, LENGTH, target=target, held_out=0.2, max_bad=0.1)
    description = show.describe(str(target), rows=10_000)
    train, validation = description["splits"]["train"], description["splits"]["validation"]
    assert train["documents"] + validation["documents"] == 299 and validation["documents"] > 20
    used = sum(found["tokens"] for found in description["rows"])
    targets = sum(found["targets"] for found in description["rows"])
    assert len(description["rows"]) == train["rows"] and used == train["tokens"]
    assert train["targets"] == targets and train["target_share"] == targets / used
    assert train["padding_share"] == pytest.approx(1 - used / (train["rows"] * LENGTH))
    spans = [x for found in description["rows"] for s in found["segments"] for x in s["spans"]]
    text = "".join(span["text"] for span in spans if not span["special"])
    assert documents[3] in text and all(span["trained"] for span in spans)
    out = printed(target)
    assert f"  train: {train['rows']} rows, {train['documents']} documents, " in out
    assert f"{targets / used:.1%} of them count for the loss" in out
    assert "1 bad records left out, the first:" in out and "a.jsonl:8: " in out
    assert "\x1b" not in out


def test_a_prepared_chat_set_masks_all_but_the_answers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    turns = [("user", "A question."), ("assistant", "An answer."), ("user", "And?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages.append({"role": "assistant", "content": "More of it."})
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    target = tmp_path / "set"
    prepare(Content(str(tmp_path / "a.jsonl"), kind="chat"), tokenizer, 128, target=target)
    (segment,) = show.describe(str(target))["rows"][0]["segments"]
    trained = "".join(span["text"] for span in segment["spans"] if span["trained"])
    masked = "".join(span["text"] for span in segment["spans"] if not span["trained"])
    assert "An answer." in trained and "More of it." in trained and trained.endswith("</s>")
    assert "A question." in masked and "answer" not in masked and "question" not in trained
    assert "| ⟧An answer.</s>⟦\n" in printed(target)
