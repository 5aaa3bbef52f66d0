"""Training on conversations and replay, and data that is wrong, through `train` itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from runs import digests, run_config, text, write_model, write_texts
from test_data_dataset import tokens_feature, write_foreign

from llamapro_jax.checkpoint_files import committed_steps
from llamapro_jax.data import dataset
from llamapro_jax.data.chat import LLAMA_PRO, ChatTemplate, messages_of
from llamapro_jax.data.dataset import open_rows
from llamapro_jax.data.preparation.prepare import prepare
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import load_tokenizer, train_tokenizer
from llamapro_jax.metrics import read_metrics
from llamapro_jax.training.loop import train
from llamapro_jax.training.texts import check_texts, fingerprints, open_data, open_prepared

LENGTH = 64


def conversations(seed: int) -> list[dict[str, Any]]:
    """Of one or two exchanges; the longer ones do not fit into a row and are cut at a turn."""
    lines = text(seed, 24).splitlines()
    return [
        {
            "messages": [
                {"role": role, "content": " ".join(lines[(i + turn) % 24].split()[:3])}
                for turn, role in enumerate(("user", "assistant") * (1 + i % 2))
            ]
        }
        for i in range(24)
    ]


def write_chat(file: Path, records: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train_data")
    write_model(directory)
    write_texts(directory / "texts")
    write_chat(directory / "texts/chat.jsonl", conversations(1))
    write_chat(directory / "texts/held_chat.jsonl", conversations(2))
    return directory


def config_of(work: Path, output: Path, *sources: dict[str, Any], **changes: Any) -> Any:
    """A run on conversations, or on `sources`, that replays a quarter of text."""
    texts = work / "texts"
    chat = {"name": "chat", "path": str(texts / "chat.jsonl"), "kind": "chat", "weight": "rows"}
    replay = {"share": 0.25, "sources": [{"name": "words", "path": str(texts / "train.txt")}]}
    held_out = {"name": "held", "path": str(texts / "held_chat.jsonl"), "kind": "chat"}
    values = {
        "data__sources": list(sources) or [chat],
        "data__replay": replay,
        "data__eval": [held_out],
        "data__sequence_length": LENGTH,
        "training__steps": 2,
        "training__log_every": 1,
        "training__save_every": 1,
        "training__eval_every": None,
    }
    return run_config(work / "model", texts, output, **(values | changes))


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    return train(config_of(work, work / "trained"))


def unfinished(trained: Path, directory: Path) -> Path:
    """The run as it was after its first step."""
    shutil.copytree(trained, directory)
    shutil.rmtree(directory / "checkpoints/2")
    (directory / "summary.json").unlink()
    return directory


def refused(config: Any, match: str) -> None:
    """Raises, and leaves no new directory, and one that is there as it was."""
    directory = Path(config.output)
    before = digests(directory) if directory.exists() else None
    with pytest.raises(UserError, match=match):
        train(config)
    assert (digests(directory) if directory.exists() else None) == before
    assert not list(directory.parent.glob(".tmp-*"))


# ------------------------------------------------------------------- what is trained on


def test_what_counts_is_what_the_assistant_says(work: Path, trained: Path) -> None:
    tokenizer = load_tokenizer(work / "model")
    template = ChatTemplate.load("llama_pro", tokenizer)
    targets = cut = 0
    for record in conversations(2):
        tokens, mask, turns_cut = template.fit(messages_of(record), LENGTH)
        targets += mask.sum()
        cut += turns_cut
    assert cut > 0
    evaluations = [r for r in read_metrics(trained) if r["kind"] == "eval"]
    assert [r["tokens"] for r in evaluations] == [targets, targets]


def test_replay_is_a_quarter_of_the_rows_and_of_text(work: Path, trained: Path) -> None:
    config = config_of(work, trained)
    data = open_data(config, trained, 320, load_tokenizer(work / "model"))
    batch = data.mixture.batch(0)
    assert data.mixture.names == ["chat", "words"]
    assert batch["source"].tolist().count(1) == 1
    counts = batch["loss_mask"] | (batch["segment_ids"] == 0)
    assert [row.all() for row in counts] == [source == 1 for source in batch["source"]]


def test_every_kind_of_source(work: Path, tmp_path: Path) -> None:
    """Each is prepared once, is the same when the run goes on, and is what it is said to be."""
    datasets = pytest.importorskip("datasets")
    documents = [{"body": line} for line in text(5, 20).splitlines()]
    rows = datasets.Dataset.from_list(documents)
    datasets.DatasetDict({"train": rows, "more": rows.select(range(5))}).save_to_disk(
        str(tmp_path / "saved")
    )
    rows.to_parquet(str(tmp_path / "a.parquet"))
    write_foreign(tmp_path / "tfds", {"body": tfds.features.Text()}, documents)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.c").write_text("int main() { return 0; }\n" * 9)
    prepared = prepared_chat(work, tmp_path / "prepared")

    def source(name: str, path: Path, kind: str, **options: Any) -> dict[str, Any]:
        return {"name": name, "path": str(path), "kind": kind, "weight": "rows", **options}

    sources = [
        source("text", tmp_path / "a.parquet", "text", field="body"),
        source("code", tmp_path / "code", "code"),
        source("chat", work / "texts/chat.jsonl", "chat"),
        source("tfds", tmp_path / "tfds", "tfds", field="body"),
        source("saved", tmp_path / "saved", "datasets", field="body"),
        source("part", tmp_path / "saved", "datasets", field="body", split="more"),
        {**prepared, "weight": "rows"},
    ]
    config = config_of(work, tmp_path / "run", *sources, data__replay=None)
    tokenizer = load_tokenizer(work / "model")
    assert check_texts(config, tokenizer) == ChatTemplate.load("llama_pro", tokenizer).text
    data = open_data(config, tmp_path, 320, tokenizer)
    lengths = {name.removeprefix("sources."): len(rows) for name, rows in data.rows.items()}
    assert lengths["text"] == lengths["tfds"] == lengths["saved"] == 3 * lengths["part"]
    assert lengths["chat"] == lengths["prepared"]
    training = [lengths[entry["name"]] for entry in sources]
    assert data.mixture.shares == [Fraction(n, sum(training)) for n in training]
    # A finished run compares them with those that it began with.
    assert fingerprints(config, tokenizer) == data.fingerprints
    before = fingerprints(config, None)
    assert before == {"sources.prepared": data.fingerprints["sources.prepared"]}
    prepared_chat(work, tmp_path / "other", held_out=0.5)
    (tmp_path / "prepared").rename(tmp_path / "kept")
    (tmp_path / "other").rename(tmp_path / "prepared")
    after = fingerprints(config, None)
    (tmp_path / "prepared").rename(tmp_path / "other")
    (tmp_path / "kept").rename(tmp_path / "prepared")
    assert after.keys() == before.keys() and after != before
    places = {where: (rows.path, rows.split) for where, rows in data.rows.items()}
    elsewhere = open_prepared(config, places, 320)
    for name, array in data.mixture.batch(5).items():
        np.testing.assert_array_equal(elsewhere.mixture.batch(5)[name], array)


def test_a_run_says_how_often_it_passes_over_each_text(work: Path, trained: Path) -> None:
    config = config_of(work, trained)
    data = open_data(config, trained, 320, load_tokenizer(work / "model"))
    chat, words = (len(data.rows[where]) for where in ("sources.chat", "replay.words"))
    assert data.passes(100).splitlines() == [
        f"chat: {chat} rows, 75.0% of the batches, {300 / chat:.2f} passes",
        f"words: {words} rows, 25.0% of the batches, {100 / words:.2f} passes",
    ]


def test_the_run_carries_the_template(trained: Path, work: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.chat_template is not None and LLAMA_PRO in tokenizer.chat_template
    assert load_tokenizer(work / "model").chat_template is None
    assert tokenizer.fingerprint == load_tokenizer(work / "model").fingerprint


def prepared_chat(work: Path, target: Path, **options: Any) -> dict[str, Any]:
    """A source of conversations that are prepared already."""
    content = Content(str(work / "texts/chat.jsonl"), "chat")
    tokenizer = load_tokenizer(work / "model")
    prepare(content, tokenizer, LENGTH, target=target, **options)
    return {"name": "prepared", "path": str(target), "kind": "tfds"}


def write_template(file: Path, template: str = LLAMA_PRO.replace("<|user|>", "[USER]")) -> str:
    file.write_text(template)
    return str(file)


def test_conversations_with_two_templates_are_refused(work: Path, tmp_path: Path) -> None:
    other = write_template(tmp_path / "a.jinja", "{# another #}" + LLAMA_PRO)
    chat = {"name": "chat", "path": str(work / "texts/chat.jsonl"), "kind": "chat"}
    source = prepared_chat(work, tmp_path / "prepared")
    both = config_of(work, tmp_path / "run", {**chat, "template": other}, source)
    refused(both, "data.sources.prepared: .* another chat template than those of data.sources.chat")
    same = config_of(work, tmp_path / "run", chat, source)
    (tmp_path / "prepared/tokenizer/chat_template.jinja").unlink()
    refused(same, "chat_template.jinja: is missing, with which the conversations were written")


# ------------------------------------------------------------------- what is wrong from the start


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ('{"messages": [', r"chat.jsonl:25: is not JSON"),
        (
            '{"prompt": "a question", "completion": ""}',
            r"chat.jsonl:25: .*empty",
        ),
    ],
)
def test_a_broken_record_names_its_line(
    work: Path, tmp_path: Path, record: str, match: str
) -> None:
    file = write_chat(tmp_path / "chat.jsonl", conversations(1))
    with file.open("a") as lines:
        lines.write(record + "\n")
    source = {"name": "chat", "path": str(file), "kind": "chat"}
    refused(config_of(work, tmp_path / "run", source), match)


def test_a_broken_line_of_text_is_named(work: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "broken\n')
    source = {"name": "a", "path": str(tmp_path / "a.jsonl")}
    refused(config_of(work, tmp_path / "run", source), "a.jsonl:2: is not JSON")
    (tmp_path / "a.jsonl").write_text('{"body": "fine"}\n')
    refused(config_of(work, tmp_path / "run", source), "a.jsonl:1: has no field 'text'")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "does not say which part is"),
        ("{% for m in messages %}", "a.jinja"),
        ("tokenizer", "the tokenizer has no chat template"),
    ],
)
def test_a_template_that_cannot_be_trained_with(
    work: Path, tmp_path: Path, template: str, match: str
) -> None:
    if template != "tokenizer":
        template = write_template(tmp_path / "a.jinja", template)
    chat = {"name": "chat", "path": str(work / "texts/chat.jsonl"), "kind": "chat"}
    config = config_of(work, tmp_path / "run", {**chat, "template": template})
    refused(config, f"data.sources.chat: .*{match}")


def test_data_of_another_tokenizer(work: Path, tmp_path: Path) -> None:
    """Found before the other source is tokenised, which takes long."""
    tokenizer = train_tokenizer([text(9).upper()], 300, tmp_path / "tokenizer")
    prepare(Content(str(work / "texts/train.txt")), tokenizer, LENGTH, target=tmp_path / "set")
    chat = {"name": "chat", "path": str(work / "texts/chat.jsonl"), "kind": "chat"}
    source = {"name": "other", "path": str(tmp_path / "set"), "kind": "tfds"}
    cache = tmp_path / "cache"
    config = config_of(work, tmp_path / "run", chat, source, data__cache_directory=str(cache))
    refused(config, r"other \(.*was prepared with tokenizer [0-9a-f]{12}, the model's is")
    assert not cache.exists()


def write_tokens(directory: Path, rows: int, bad: int | None = None) -> dict[str, Any]:
    """Tokens that somebody else made, of which one is beyond the vocabulary."""
    examples = [{"tokens": np.full(LENGTH, 5 + i)} for i in range(rows)]
    if bad is not None:
        examples[bad]["tokens"][7] = 320
    write_foreign(directory, tokens_feature(LENGTH), examples)
    return {"name": "foreign", "path": str(directory), "kind": "tfds"}


def test_a_token_beyond_the_vocabulary(work: Path, tmp_path: Path) -> None:
    source = write_tokens(tmp_path / "set", 8, bad=3)
    match = r"foreign \(.*row 3: token 320 is not in the model's vocabulary of 320"
    refused(config_of(work, tmp_path / "run", source), match)


@pytest.mark.slow
def test_a_bad_row_that_is_met_later_costs_no_step(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "ROWS_LOOKED_AT", 1)
    source = write_tokens(tmp_path / "set", 12, bad=4)
    options = {"data__replay": None, "training__save_every": None, "training__steps": 3}
    config = config_of(work, tmp_path / "run", source, **options, data__eval=[])
    order = open_data(config, tmp_path, 321, None).mixture
    met = [step for step in range(3) if (order.batch(step)["tokens"] == 320).any()]
    assert met and met[0] > 0, "choose another row"
    with pytest.raises(UserError, match="foreign .*row 4: token 320"):
        train(config)
    assert committed_steps(tmp_path / "run/checkpoints") == met
    assert open_rows(source["path"], sequence_length=LENGTH, vocab_size=321)[4]["tokens"][7] == 320


# ------------------------------------------------------------------- what goes wrong later


def truncate(directory: Path) -> None:
    file = max(directory.glob("*array_record*"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def add_line(file: Path) -> None:
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda run, texts: truncate(next(run.glob("data/chat-*"))), "cannot be read, the file is"),
        (lambda run, texts: add_line(texts / "chat.jsonl"), "data.sources.chat: its text or"),
        (lambda run, texts: add_line(texts / "train.txt"), "data.replay.words: its text or"),
        (lambda run, texts: (texts / "chat.jsonl").unlink(), "data.sources.chat: .*no such file"),
    ],
)
def test_a_run_that_is_there_stays_as_it_is(
    work: Path,
    trained: Path,
    tmp_path: Path,
    damage: Callable[[Path, Path], None],
    match: str,
) -> None:
    run = unfinished(trained, tmp_path / "run")
    kept = tmp_path / "kept"
    shutil.copytree(work / "texts", kept)
    config = config_of(work, run)
    try:
        damage(run, work / "texts")
        refused(config, match)
    finally:
        shutil.copytree(kept, work / "texts", dirs_exist_ok=True)
